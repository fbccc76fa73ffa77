"""Applies spectral filters to inputs one at a time, with a state of fixed size."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.ops.filters import filter_recurrence


def initial_features(
    batch_size: int, width: int, kind: str, seq_len: int, num_filters: int
) -> Float[Array, "B N D"]:
    """The initial state of `next_features`, zero; N is at most K + 24 for any L."""
    return jnp.zeros((batch_size, len(filter_recurrence(kind, seq_len, num_filters)[1]), width))


def next_features(
    h: Float[Array, "B N D"],
    u_t: Float[Array, "B D"],
    kind: str,
    seq_len: int,
    num_filters: int,
    alternate: bool = False,
) -> Float[Array, "B N D"]:
    """The state after one more input.

    Its first K entries are the features U+_{t,k} = sum_i u_{t-i} phi_k(i), or, with `alternate`,
    U-_{t,k}, whose terms have the sign (-1)^i. There are fewer than K if the remaining filters have
    negligible weights.

    Args:
        h, u_t: of one dtype, float32 or float64.
    Source: `filter_recurrence`, which states the error.
    """
    a, b = filter_recurrence(kind, seq_len, num_filters)
    # highest precision, because errors of the transition accumulate over L steps
    transition = jnp.asarray(-a if alternate else a, h.dtype)
    moved = jnp.einsum("bnd,nm->bmd", h, transition, precision=lax.Precision.HIGHEST)
    return moved + jnp.asarray(np.array(b), h.dtype)[None, :, None] * u_t[:, None, :]
