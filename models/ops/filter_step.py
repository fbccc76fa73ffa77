"""How are spectral filters applied to inputs that come one at a time, without keeping the inputs?"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.ops.filters import filter_recurrence


def initial_features(
    batch_size: int, width: int, kind: str, seq_len: int, num_filters: int
) -> Float[Array, "B N D"]:
    """The state of `next_features` before any input; N is at most K + 24, whatever L."""
    return jnp.zeros((batch_size, len(filter_recurrence(kind, seq_len, num_filters)[1]), width))


def next_features(
    h: Float[Array, "B N D"],
    u_t: Float[Array, "B D"],
    kind: str,
    seq_len: int,
    num_filters: int,
    alternate: bool = False,
) -> Float[Array, "B N D"]:
    """The state after one more input. Its first K entries are the features U+_{t,k} = sum_i u_{t-i} phi_k(i), or with
    `alternate` U-_{t,k}, whose terms have the sign (-1)^i; fewer than K where the further filters weigh nothing.

    Source: `filter_recurrence`, which states the error. `h` and `u_t` share a dtype, float32 or float64.
    """
    a, b = filter_recurrence(kind, seq_len, num_filters)
    # Errors of the transition add up over L steps, so it may not be rounded to the 10 bits of tf32.
    moved = jnp.einsum(
        "bnd,nm->bmd",
        h,
        jnp.asarray(-a if alternate else a, h.dtype),
        precision=lax.Precision.HIGHEST,
    )
    return moved + jnp.asarray(np.array(b), h.dtype)[None, :, None] * u_t[:, None, :]
