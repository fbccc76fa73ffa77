"""Local attention, a baseline of Long Range Arena (Tay et al. 2020, arXiv 2011.04006): softmax attention within blocks.

The sequence is cut into blocks of C positions; each attends to its own block and, as an option, to the blocks beside it.
Reference code read: google-research/long-range-arena, which departs from this description (see docs/models/local.md).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.attention import MultiHead
from models.ops.blocks import cut, joined


class LocalAttention(MultiHead):
    """Softmax attention within blocks; time and memory grow as L C.

    Args:
        width, num_heads, positions, causal: as in `MultiHead`. seq_len: L, any; the last block may be short.
        block_size: C positions.
        neighbours: blocks beside its own that a position sees, on each side; of the past alone where causal.
    Raises:
        ValueError: as `MultiHead`, or a size is too small; the message names the config key.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_heads: int,
        block_size: int,
        neighbours: int,
        positions: str,
        causal: bool,
        rngs: nnx.Rngs,
    ):
        if block_size < 1:
            raise ValueError(f"model.block_size={block_size} must be at least 1")
        if neighbours < 0:
            raise ValueError(f"model.neighbours={neighbours} must be at least 0")
        super().__init__(width, num_heads=num_heads, positions=positions, causal=causal, rngs=rngs)
        self.block_size, self.neighbours = min(block_size, seq_len), neighbours

    def attend(
        self,
        q: Float[Array, "B L H W"],
        k: Float[Array, "B L H W"],
        v: Float[Array, "B L H W"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B L H W"]:
        q, k = self.turn(q), self.turn(k)
        return block_attention(q, k, v, mask, self.block_size, self.neighbours, self.causal)


def block_attention(
    q: Float[Array, "B L H W"],
    k: Float[Array, "B L H W"],
    v: Float[Array, "B L H W"],
    mask: Bool[Array, "B L"],
    block_size: int,
    neighbours: int,
    causal: bool,
) -> Float[Array, "B L H W"]:
    """softmax(q k^T / sqrt(W)) v over the real positions of a block and of its neighbours."""
    batch, length, *rest = q.shape
    blocks = -(-length // block_size)
    after = 0 if causal else neighbours

    def window(x: Array) -> Array:
        """(B, L, ...) to (B blocks, keys, ...): what each block sees, from the farthest block of the past on."""
        padded = jnp.pad(
            cut(x, block_size), ((0, 0), (neighbours, after)) + ((0, 0),) * (x.ndim - 1)
        )
        seen = jnp.concatenate(
            [padded[:, i : i + blocks] for i in range(neighbours + 1 + after)], axis=2
        )
        return seen.reshape(batch * blocks, -1, *x.shape[2:])

    visible = window(mask)[
        :, None, None, :
    ]  # blocks beyond either end, and what fills the last one, count as padding
    if causal:
        past = np.tri(
            block_size, (neighbours + 1) * block_size, neighbours * block_size, dtype=bool
        )
        visible = visible & past[None, None]
    queries = cut(q, block_size).reshape(batch * blocks, block_size, *rest)
    y = jax.nn.dot_product_attention(queries, window(k), window(v), mask=visible)
    return joined(y.reshape(batch, blocks, block_size, *rest), length)
