"""How is time cut into blocks that are worked on side by side or one after the other?"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def cut(x: Shaped[Array, "B L *rest"], size: int) -> Shaped[Array, "B blocks size *rest"]:
    """Blocks of `size` positions; the last one is filled with zeros."""
    blocks = -(-x.shape[1] // size)
    padded = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    return padded.reshape(x.shape[0], blocks, size, *x.shape[2:])


def joined(x: Shaped[Array, "B blocks size *rest"], length: int) -> Shaped[Array, "B L *rest"]:
    """`cut` undone."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
