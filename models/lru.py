"""Linear Recurrent Unit of Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349).

h_t = lam h_{t-1} + gamma B u_t,  y_t = Re(C h_t) + D u_t,  lam = exp(-exp(nu) + i exp(theta))   (their section 3).
The parameters start as in their appendix A; `bidirectional` concatenates a second scan over the reversed sequence.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float

from models.ops.recurrence import linear_recurrence


class LRU(nnx.Module):
    """Diagonal complex recurrence with a stable exponential parametrisation; causal unless bidirectional.

    Args:
        width: D. seq_len: L, not used, the recurrence has no length.
        state_size: N complex states.
        r_min, r_max: ring from which |lam| is drawn, uniformly in area.
        max_phase: largest angle of lam at the start, in radians.
        gamma_norm: scale each state's input by sqrt(1 - |lam|^2) at the start (learned from there).
        bidirectional: a second scan from the end; C reads both.
    Raises:
        ValueError: the ring is not 0 <= r_min < r_max <= 1, or a size or angle is not positive.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        state_size: int,
        r_min: float | int,
        r_max: float | int,
        max_phase: float | int,
        gamma_norm: bool,
        bidirectional: bool,
        rngs: nnx.Rngs,
    ):
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"model.r_min={r_min}, model.r_max={r_max}: expected 0 <= r_min < r_max <= 1")
        if state_size < 1:
            raise ValueError(f"model.state_size={state_size} must be at least 1")
        if not 0 < max_phase < math.inf:
            raise ValueError(f"model.max_phase={max_phase} must be an angle above 0")
        self.causal, self.bidirectional = not bidirectional, bidirectional
        key = rngs.params
        # uniform in area between the circles: |lam|^2 is uniform; kept away from 0, where log(-log) diverges
        squared = jnp.maximum(key.uniform((state_size,), minval=r_min**2, maxval=r_max**2), 1e-12)
        self.nu_log = nnx.Param(jnp.log(-0.5 * jnp.log(squared)))
        self.theta_log = nnx.Param(jnp.log(max_phase * key.uniform((state_size,), minval=1e-7)))
        self.gamma_log = nnx.Param(0.5 * jnp.log1p(-squared)) if gamma_norm else None
        columns = state_size * (2 if bidirectional else 1)
        self.b_re = nnx.Param(key.normal((width, state_size)) / math.sqrt(2 * width))
        self.b_im = nnx.Param(key.normal((width, state_size)) / math.sqrt(2 * width))
        self.c_re = nnx.Param(key.normal((columns, width)) / math.sqrt(columns))
        self.c_im = nnx.Param(key.normal((columns, width)) / math.sqrt(columns))
        self.d = nnx.Param(key.normal((width,)))

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B L D"]:
        lam = eigenvalues(self.nu_log[...], self.theta_log[...])
        # two real products: complex ones are slow on every backend
        bu = jax.lax.complex(x @ self.b_re[...], x @ self.b_im[...])  # (B, L, N)
        if self.gamma_log is not None:
            bu = bu * jnp.exp(self.gamma_log[...])[None, None, :]
        h = linear_recurrence(lam, bu)
        if self.bidirectional:
            # padding must not enter the scan that starts at the end
            back = linear_recurrence(lam, jnp.where(mask[..., None], bu, 0), reverse=True)
            h = jnp.concatenate([h, back], axis=-1)
        return h.real @ self.c_re[...] - h.imag @ self.c_im[...] + self.d[...][None, None, :] * x


def eigenvalues(nu_log: Float[Array, " N"], theta_log: Float[Array, " N"]) -> Complex[Array, " N"]:
    """lam = exp(-exp(nu_log) + i exp(theta_log)), inside the unit circle for every parameter value."""
    radius, angle = jnp.exp(-jnp.exp(nu_log)), jnp.exp(theta_log)
    return jax.lax.complex(radius * jnp.cos(angle), radius * jnp.sin(angle))
