"""S5, one diagonal state space model for all channels.

x' = A x + B u, y = C x + D u (equation 1), diagonalized and sampled:

    x_k = lam_bar x_{k-1} + B_bar u_k,   y_k = 2 Re(C x_k) + D u_k

with J diagonal blocks of HiPPO-N as the initial A, one of each conjugate pair of eigenvalues, and a
learned Delta per state.

Paper: Smith, Warrington, Linderman 2023, "Simplified State Space Layers for Sequence Modeling"
(arXiv 2208.04933). Reference code read: lindermanlab/S5, to whose values the tests compare.

Deviation: padding does not enter the reversed scan; in the published code it does. Otherwise the
values agree.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float

from models.checks import at_least_float32, check_option, require_causal
from models.mixer import Mask, MixerModule, Sequences
from models.ops.products import real_product
from models.ops.recurrence import linear_recurrence
from models.ops.state_space import DISCRETIZATIONS, discretize, hippo_normal, log_uniform_steps

C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")


class S5(MixerModule):
    """Multi-input multi-output diagonal state space model; causal unless bidirectional.

    The scan holds all states, (B, L, P) complex, because C reads them.

    Args:
        state_size: N eigenvalues. With `conj_sym` the model has P = N/2 states, one of each
            conjugate pair, else P = N.
        num_blocks: J, the copies of HiPPO-N of size N/J on the diagonal of the initial A.
        conj_sym: the output is 2 Re(C x) over P = N/2 states, else Re(C x) over N.
        discretization: zoh | bilinear.
        dt_min, dt_max: range of the initial Delta of each state, log-uniform.
        c_init: trunc_standard_normal | lecun_normal (C V, with C of variance 1/N or 1/(N D)) |
            complex_normal (variance 1).
        clip_eigs: clips the real parts of the eigenvalues to at most -1e-4.
        bidirectional: adds a scan over the reversed sequence, with its own columns of C.
    Raises:
        ValueError: an option is unknown, or the sizes do not divide.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        state_size: int,
        num_blocks: int,
        conj_sym: bool,
        discretization: str,
        dt_min: float | int,
        dt_max: float | int,
        c_init: str,
        clip_eigs: bool,
        bidirectional: bool,
        rngs: nnx.Rngs,
    ):
        part = 2 if conj_sym else 1
        if num_blocks < 1 or state_size < 1 or state_size % (part * num_blocks):
            raise ValueError(
                f"model.state_size={state_size} must be a multiple of {part} x "
                f"model.num_blocks={num_blocks}" + " (conjugate pairs in every block)" * conj_sym
            )
        check_option("model.discretization", discretization, DISCRETIZATIONS)
        check_option("model.c_init", c_init, C_INITS)
        self.causal, self.conj_sym = not bidirectional, conj_sym
        self.discretization, self.clip_eigs = discretization, clip_eigs
        block = state_size // num_blocks
        lam, vectors = hippo_normal(block)
        lam, vectors = np.tile(lam[: block // part], num_blocks), vectors[:, : block // part]
        states, directions = state_size // part, 2 if bidirectional else 1
        columns = directions * states
        self.lam_re = nnx.Param(jnp.asarray(lam.real, jnp.float32))
        self.lam_im = nnx.Param(jnp.asarray(lam.imag, jnp.float32))
        self.log_step = nnx.Param(log_uniform_steps(rngs.params(), (states,), dt_min, dt_max))
        # drawn in the basis of HiPPO; in the basis of its eigenvectors they are V^H B and C V
        v_re, v_im = jnp.asarray(vectors.real, jnp.float32), jnp.asarray(vectors.imag, jnp.float32)
        b = lecun_normal(rngs.params(), (width, num_blocks, block), state_size)
        self.b_re = nnx.Param((b @ v_re).reshape(width, states))
        self.b_im = nnx.Param((b @ -v_im).reshape(width, states))
        if c_init == "complex_normal":
            c_re, c_im = math.sqrt(0.5) * rngs.params.normal((2, width, columns))
        else:
            fan_in = state_size * (width if c_init == "lecun_normal" else 1)
            shape = (2, width, directions * num_blocks, block)
            re, im = lecun_normal(rngs.params(), shape, fan_in)
            c_re, c_im = (
                x.reshape(width, columns) for x in (re @ v_re - im @ v_im, re @ v_im + im @ v_re)
            )
        self.c_re, self.c_im = nnx.Param(c_re.T), nnx.Param(c_im.T)
        self.d = nnx.Param(rngs.params.normal((width,)))

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        lam_bar, b_bar = self.system()
        u = at_least_float32(x)
        c_re, c_im = self.c_re[...], self.c_im[...]
        y = apply_ssm(lam_bar, b_bar, c_re, c_im, u, mask, self.conj_sym)
        return (y + self.d[...][None, None] * u).astype(x.dtype)

    def init_state(self, batch_size: int) -> Complex[Array, "B P"]:
        """The state before the first input, zero; a ValueError if the model is bidirectional."""
        require_causal(self.causal)
        return jnp.zeros((batch_size, self.lam_re.shape[0]), jnp.complex64)

    def step(
        self, state: Complex[Array, "B P"], u_t: Float[Array, "B D"]
    ) -> tuple[Complex[Array, "B P"], Float[Array, "B D"]]:
        lam_bar, b_bar = self.system()
        u = at_least_float32(u_t)
        state = lam_bar[None] * state + jax.lax.complex(u @ b_bar.real, u @ b_bar.imag)
        y = read_out(state, self.c_re[...], self.c_im[...], self.conj_sym) + self.d[...][None] * u
        return state, y.astype(u_t.dtype)

    def system(self) -> tuple[Complex[Array, " P"], Complex[Array, "D P"]]:
        """lam_bar and B_bar of the sampled system."""
        re = jnp.minimum(self.lam_re[...], -1e-4) if self.clip_eigs else self.lam_re[...]
        lam = jax.lax.complex(re, self.lam_im[...])
        log_lam_bar, factor = discretize(lam, jnp.exp(self.log_step[...]), self.discretization)
        return jnp.exp(log_lam_bar), jax.lax.complex(self.b_re[...], self.b_im[...]) * factor[None]


def apply_ssm(
    lam_bar: Complex[Array, " P"],
    b_bar: Complex[Array, "D P"],
    c_re: Float[Array, "R D"],
    c_im: Float[Array, "R D"],
    u: Float[Array, "B L D"],
    mask: Bool[Array, "B L"],
    conj_sym: bool,
) -> Float[Array, "B L D"]:
    """y_k = 2 Re(C x_k) of the sampled system, without `conj_sym` Re(C x_k).

    Args:
        c_re, c_im: C transposed, R = P rows or 2P: the second half reads the reversed scan.
    Source: S5, sections 3.1 to 3.3 and appendix A (the parallel scan).
    """
    # two real products, because complex ones are slow on every backend
    bu = jax.lax.complex(u @ b_bar.real, u @ b_bar.imag)
    p = lam_bar.shape[0]
    y = read_out(linear_recurrence(lam_bar, bu), c_re[:p], c_im[:p], conj_sym)
    if len(c_re) > p:
        # padding must not enter the reversed scan
        states = linear_recurrence(lam_bar, jnp.where(mask[..., None], bu, 0), reverse=True)
        y = y + read_out(states, c_re[p:], c_im[p:], conj_sym)
    return y


def read_out(
    x: Complex[Array, "*B P"], c_re: Float[Array, "P D"], c_im: Float[Array, "P D"], conj_sym: bool
) -> Float[Array, "*B D"]:
    """Re(C x), times 2 with `conj_sym`."""
    y = real_product(x, c_re, c_im)
    return 2 * y if conj_sym else y


def lecun_normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Normal of variance 1/fan_in, truncated at two standard deviations.

    As in the published code, fan_in counts the states for B too, not its inputs.
    """
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / (0.87962566 * math.sqrt(fan_in))
