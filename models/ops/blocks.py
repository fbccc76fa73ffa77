"""Splits sequences into blocks of equal length and merges them again."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def split_blocks(x: Shaped[Array, "B L *rest"], size: int) -> Shaped[Array, "B blocks size *rest"]:
    """Blocks of `size` positions; zeros fill the last one."""
    blocks = -(-x.shape[1] // size)
    padded = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    return padded.reshape(x.shape[0], blocks, size, *x.shape[2:])


def merge_blocks(
    x: Shaped[Array, "B blocks size *rest"], length: int
) -> Shaped[Array, "B L *rest"]:
    """The inverse of `split_blocks`: the first `length` positions."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
