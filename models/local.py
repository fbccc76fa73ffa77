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
        batch, length, *rest = q.shape
        size, before = self.block_size, self.neighbours
        after = 0 if self.causal else before
        blocks = -(-length // size)

        def window(x: Array) -> Array:
            """(B, L, ...) to (B blocks, keys, ...), the keys of each block in order of time."""
            around = ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 1)
            padded = jnp.pad(split_blocks(x, size), around)
            parts = [padded[:, i : i + blocks] for i in range(before + 1 + after)]
            return jnp.concatenate(parts, axis=2).reshape(batch * blocks, -1, *x.shape[2:])

        # False also for blocks beyond either end and for the fill of the last block
        visible = window(mask)[:, None, None, :]
        if self.causal:
            past = np.tri(size, (before + 1) * size, before * size, dtype=bool)
            visible = visible & past[None, None]
        queries = split_blocks(q, size).reshape(batch * blocks, size, *rest)
        y = jax.nn.dot_product_attention(queries, window(k), window(v), mask=visible)
        return merge_blocks(y.reshape(batch, blocks, size, *rest), length)
