"""Rotary positions (Su et al. 2021, "RoFormer", equation 34): a turn of each channel pair by an angle linear in time."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(x: Float[Array, "B L H W"], base: float = 10_000.0) -> Float[Array, "B L H W"]:
    """Turn channels (j, j + W/2) of position t by the angle t * base^(-2j/W), so that q . k depends on distance only.

    Raises:
        ValueError: W is odd.
    """
    length, half = x.shape[1], x.shape[3] // 2
    if x.shape[3] % 2:
        raise ValueError(f"rotary positions need an even head width, found {x.shape[3]}; change model.num_heads")
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None, :]  # (L, W/2)
    cos, sin = (f(angle)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
