"""Rotary positions of Su et al. 2021, "RoFormer" (arXiv 2104.09864), equation (34)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B L H W"], base: float = 10_000.0, first: int | Int[Array, ""] = 0
) -> Float[Array, "B L H W"]:
    """Rotates channels (j, j + W/2) of position t by the angle t * base^(-2j/W).

    Products of rotated queries and keys depend on distances only.

    Args:
        x: of even W.
        first: the position of x[:, 0].
    """
    length, half = x.shape[1], x.shape[3] // 2
    # bfloat16 does not distinguish position 257 from 256
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle = (first + jnp.arange(length)).astype(dtype)[:, None] * frequency[None, :]  # (L, W/2)
    cos, sin = (f(angle)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first_half, second_half = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first_half * cos - second_half * sin, first_half * sin + second_half * cos], axis=-1
    )
