"""Local attention: softmax attention within blocks.

The sequence is split into blocks of C positions. A position attends to its own block and optionally
to the neighbouring blocks.

Paper: Tay et al. 2020, "Long Range Arena" (arXiv 2011.04006), where it is a baseline. Reference
code read: google-research/long-range-arena, which departs from this description
(docs/models/local.md).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from models.attention import MultiHead
from models.checks import check_positive
from models.mixer import Mask
from models.ops.attention import Heads
from models.ops.blocks import merge_blocks, split_blocks


class LocalAttention(MultiHead):
    """Softmax attention within blocks; time and memory grow as L C.

    Args:
        width, num_heads, positions, causal: as in `MultiHead`.
        seq_len: L, any; the last block may be short.
        block_size: C.
        neighbours: number of neighbouring blocks on each side that a position attends to; only
            earlier ones if causal.
    Raises:
        ValueError: as `MultiHead`, or a size is too small.
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
        check_positive(block_size=block_size)
        if neighbours < 0:
            raise ValueError(f"model.neighbours={neighbours} must be at least 0")
        super().__init__(width, num_heads=num_heads, positions=positions, causal=causal, rngs=rngs)
        self.block_size, self.neighbours = min(block_size, seq_len), neighbours

    def attend(self, q: Heads, k: Heads, v: Heads, mask: Mask) -> Heads:
        q, k = self.apply_rotary(q), self.apply_rotary(k)
        return block_attention(q, k, v, mask, self.block_size, self.neighbours, self.causal)


def block_attention(
    q: Heads, k: Heads, v: Heads, mask: Mask, block_size: int, neighbours: int, causal: bool
) -> Heads:
    """softmax(q k^T / sqrt(W)) v over the real positions of a block and its neighbours."""
    batch, length, *rest = q.shape
    blocks = -(-length // block_size)
    after = 0 if causal else neighbours

    def window(x: Array) -> Array:
        """(B, L, ...) to (B blocks, keys, ...), the keys of each block in order of time."""
        padded = jnp.pad(
            split_blocks(x, block_size), ((0, 0), (neighbours, after)) + ((0, 0),) * (x.ndim - 1)
        )
        windows = jnp.concatenate(
            [padded[:, i : i + blocks] for i in range(neighbours + 1 + after)], axis=2
        )
        return windows.reshape(batch * blocks, -1, *x.shape[2:])

    # False also for blocks beyond either end and for the fill of the last block
    visible = window(mask)[:, None, None, :]
    if causal:
        past = np.tri(
            block_size, (neighbours + 1) * block_size, neighbours * block_size, dtype=bool
        )
        visible = visible & past[None, None]
    queries = split_blocks(q, block_size).reshape(batch * blocks, block_size, *rest)
    y = jax.nn.dot_product_attention(queries, window(k), window(v), mask=visible)
    return merge_blocks(y.reshape(batch, blocks, block_size, *rest), length)
