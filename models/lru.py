"""Linear Recurrent Unit (LRU).

    h_t = lam h_{t-1} + gamma B u_t,   y_t = Re(C h_t) + D u_t
    lam = exp(-exp(nu_log) + i exp(theta_log))

(equation 7). The steps of the ablation in section 3 are options: a dense real A with or without a
nonlinearity, and other parametrizations of lam. The initialization is that of appendix A;
`bidirectional` adds a scan over the reversed sequence.

Paper: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences"
(arXiv 2303.06349). Reference code read: NicolasZucchet/minimal-LRU. The ablation and the
deviations: docs/models/lru.md.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float, Inexact

from models.checks import at_least_float32, check_option, check_positive, require_causal
from models.mixer import Mask, MixerModule, Sequences
from models.ops.dense_recurrence import ACTIVATIONS, dense_recurrence
from models.ops.products import matmul_highest, real_product
from models.ops.recurrence import linear_recurrence

PARAMETRIZATIONS = ("dense", "real_imag", "exp", "stable_exp")
PHASES = ("log", "linear")


class LRU(MixerModule):
    """Recurrence with a diagonal complex or a dense real matrix; causal unless bidirectional.

    Args:
        state_size: N, complex states unless dense.
        parametrization: dense, all N x N entries | real_imag, lam itself | exp, lam = exp(-nu + i
            theta) | stable_exp, lam = exp(-exp(nu_log) + i theta), always inside the unit circle.
        phase: log | linear, whether stable_exp learns log theta or theta.
        activation: none | tanh | relu, of the dense recurrence.
        r_min, r_max: ring of the initial |lam|, uniform in area; 0 and 1 give the disk of a Glorot
            matrix's eigenvalues. A dense matrix has Glorot initialization.
        max_phase: largest initial angle of lam, in radians.
        gamma_norm: scales the input of each state by a learned gamma, at first sqrt(1 - |lam|^2).
        bidirectional: adds a scan over the reversed sequence; C reads both.
    Raises:
        ValueError: an option is unknown or does not fit the parametrization, or a number is out of
            its range.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        state_size: int,
        parametrization: str,
        phase: str,
        activation: str,
        r_min: float | int,
        r_max: float | int,
        max_phase: float | int,
        gamma_norm: bool,
        bidirectional: bool,
        rngs: nnx.Rngs,
    ):
        check_option("model.parametrization", parametrization, PARAMETRIZATIONS)
        check_option("model.phase", phase, PHASES)
        check_option("model.activation", activation, ACTIVATIONS)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(
                f"model.r_min={r_min}, model.r_max={r_max}: expected 0 <= r_min < r_max <= 1"
            )
        check_positive(state_size=state_size)
        if not 0 < max_phase < math.inf:
            raise ValueError(f"model.max_phase={max_phase} must be an angle above 0")
        self.dense = parametrization == "dense"
        if self.dense and gamma_norm:
            raise ValueError(
                "model.gamma_norm=true needs eigenvalues, model.parametrization=dense has none; "
                "set model.gamma_norm=false"
            )
        if not self.dense and activation != "none":
            raise ValueError(
                f"model.activation={activation} requires model.parametrization=dense; "
                "set model.activation=none"
            )
        self.causal, self.parametrization = not bidirectional, parametrization
        self.log_phase, self.activation = phase == "log", activation
        key, columns = rngs.params, state_size * (2 if bidirectional else 1)
        if self.dense:
            # Glorot initialization: variance 1/N (figure 2)
            self.a = nnx.Param(key.normal((state_size, state_size)) / math.sqrt(state_size))
            self.b = nnx.Param(key.normal((width, state_size)) / math.sqrt(width))
            self.c = nnx.Param(key.normal((columns, width)) / math.sqrt(columns))
        else:
            # uniform in area means uniform |lam|^2; above 0, where log(-log) diverges
            squared = key.uniform((state_size,), minval=r_min**2, maxval=r_max**2)
            squared = jnp.maximum(squared, 1e-12)
            theta = max_phase * key.uniform((state_size,), minval=1e-7)
            nu = -0.5 * jnp.log(squared)
            if parametrization == "real_imag":
                lam = polar(nu, theta)
                self.lam_re, self.lam_im = nnx.Param(lam.real), nnx.Param(lam.imag)
            elif parametrization == "exp":
                self.nu, self.theta = nnx.Param(nu), nnx.Param(theta)
            else:
                self.nu_log = nnx.Param(jnp.log(nu))
                if self.log_phase:
                    self.theta_log = nnx.Param(jnp.log(theta))
                else:
                    self.theta = nnx.Param(theta)
            self.gamma_log = nnx.Param(0.5 * jnp.log1p(-squared)) if gamma_norm else None
            self.b_re = nnx.Param(key.normal((width, state_size)) / math.sqrt(2 * width))
            self.b_im = nnx.Param(key.normal((width, state_size)) / math.sqrt(2 * width))
            self.c_re = nnx.Param(key.normal((columns, width)) / math.sqrt(columns))
            self.c_im = nnx.Param(key.normal((columns, width)) / math.sqrt(columns))
        self.d = nnx.Param(key.normal((width,)))

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        u = at_least_float32(x)
        bu = self.project_input(u)  # (B, L, N)
        # one direction at a time: concatenating both would hold 4 B L N more numbers
        y = self.read_out(self.states(bu, reverse=False))
        if not self.causal:
            # padding must not enter the reversed scan
            states = self.states(jnp.where(mask[..., None], bu, 0), reverse=True)
            y = y + self.read_out(states, anticausal=True)
        return (y + self.d[...][None, None, :] * u).astype(x.dtype)

    def init_state(self, batch_size: int) -> Inexact[Array, "B N"]:
        """The state before the first input, zero; a ValueError if the model is bidirectional."""
        require_causal(self.causal)
        size = (self.c if self.dense else self.c_re).shape[0]
        return jnp.zeros((batch_size, size), jnp.float32 if self.dense else jnp.complex64)

    def step(
        self, state: Inexact[Array, "B N"], u_t: Float[Array, "B D"]
    ) -> tuple[Inexact[Array, "B N"], Float[Array, "B D"]]:
        u = at_least_float32(u_t)
        bu = self.project_input(u)
        if self.dense:
            state = ACTIVATIONS[self.activation][0](matmul_highest(state, self.a[...]) + bu)
        else:
            state = self.eigenvalues()[None] * state + bu
        return state, (self.read_out(state) + self.d[...][None] * u).astype(u_t.dtype)

    def states(self, bu: Inexact[Array, "B L N"], reverse: bool) -> Inexact[Array, "B L N"]:
        """All states of the recurrence, over the reversed sequence with `reverse`."""
        if self.dense:
            return dense_recurrence(self.a[...], bu, self.activation, reverse)
        return linear_recurrence(self.eigenvalues(), bu, reverse=reverse)

    def project_input(self, u: Float[Array, "*B D"]) -> Inexact[Array, "*B N"]:
        """gamma B u."""
        if self.dense:
            return u @ self.b[...]
        b_re, b_im = self.b_re[...], self.b_im[...]
        if self.gamma_log is not None:
            gamma = jnp.exp(self.gamma_log[...])[None]
            b_re, b_im = gamma * b_re, gamma * b_im  # D N products instead of B L N
        # two real products, because complex ones are slow on every backend
        return jax.lax.complex(u @ b_re, u @ b_im)

    def read_out(self, h: Inexact[Array, "*B N"], anticausal: bool = False) -> Float[Array, "*B D"]:
        """Re(C h) of one direction; the second half of C's rows reads the reversed scan."""
        size = h.shape[-1]
        rows = slice(size, None) if anticausal else slice(size)
        if self.dense:
            return matmul_highest(h, self.c[rows])
        return real_product(h, self.c_re[rows], self.c_im[rows])

    def eigenvalues(self) -> Complex[Array, " N"]:
        """lam."""
        if self.parametrization == "real_imag":
            return jax.lax.complex(self.lam_re[...], self.lam_im[...])
        if self.parametrization == "exp":
            return polar(self.nu[...], self.theta[...])
        nu = jnp.exp(self.nu_log[...])
        return polar(nu, jnp.exp(self.theta_log[...]) if self.log_phase else self.theta[...])


def polar(nu: Float[Array, " N"], theta: Float[Array, " N"]) -> Complex[Array, " N"]:
    """exp(-nu + i theta)."""
    radius = jnp.exp(-nu)
    return jax.lax.complex(radius * jnp.cos(theta), radius * jnp.sin(theta))
