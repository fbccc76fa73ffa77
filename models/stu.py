"""Spectral Transform Unit, equation (4), and AR-STU, equation (6), of "Spectral State Space Models" (arXiv 2312.06837).

The mathematics is `models.ops.stu`; this file owns the matrices, all zero at the start as in the paper. The published CIFAR
code differs (random M_u, no negative filters, learned k_y = 2): see `docs/models.md`.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.ops.filters import spectral_filters
from models.ops.stu import stu


class Filter(nnx.Variable):
    """A fixed array that follows from the configuration: no gradient, nothing to save."""


class STU(nnx.Module):
    """Spectral filters over the input plus feedback from the output; causal.

    Args:
        width: D, of input and output.
        seq_len: L, the length the filters are made for.
        num_filters: K, largest eigenpairs of the Hankel matrix.
        k_u: direct input taps M_u (equation (4) has 3).
        k_y: None for equation (4), where y_t starts from y_{t-2}; else the number of learned feedback matrices of equation (6).
        negative_filters: also the features U- with signs (-1)^i, as in the paper.
    Raises:
        ValueError: K > L, or a size below 1; the message names the config key.
    """

    causal = True

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_filters: int,
        k_u: int,
        k_y: int | None,
        negative_filters: bool,
        rngs: nnx.Rngs,
    ):
        if k_u < 1 or (k_y is not None and k_y < 1):
            raise ValueError(
                f"model.k_u={k_u} and model.k_y={k_y} count matrices: at least 1 (model.k_y=null for equation (4))"
            )
        sigma, phi = spectral_filters(seq_len, num_filters)
        self.sigma, self.phi = Filter(jnp.asarray(sigma, jnp.float32)), Filter(jnp.asarray(phi, jnp.float32))
        self.m_u = nnx.Param(jnp.zeros((k_u, width, width)))
        self.m_plus = nnx.Param(jnp.zeros((num_filters, width, width)))
        self.m_minus = nnx.Param(jnp.zeros((num_filters, width, width))) if negative_filters else None
        self.m_y = None if k_y is None else nnx.Param(jnp.zeros((k_y, width, width)))

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B L D"]:
        m_minus = None if self.m_minus is None else self.m_minus[...]
        m_y = "lag2" if self.m_y is None else self.m_y[...]
        return stu(x, self.phi[...], self.sigma[...], self.m_u[...], self.m_plus[...], m_minus, m_y)
