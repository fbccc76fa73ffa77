"""Computes softmax attention, softmax(q k^T / sqrt(W)) v over real keys, without an L x L matrix.

Paper: Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, equation (1). Tracing
chooses one of three implementations: cuDNN's flash attention (Dao et al. 2022, arXiv 2205.14135) if
the GPU has it; the whole matrix of weights if it is small; else one block of queries after the
other, whose weights the backward pass recomputes. Rabe and Staats 2021 (arXiv 2112.05682) split the
keys too, which 16,384 weights per row do not need.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from models.ops.batch_sharding import local_batch_size
from models.ops.blocks import merge_blocks, split_blocks

Heads = Float[Array, "B L H W"]  # queries, keys or values

# Bytes of weights held at once: on a CPU about the size of its caches, with which forward and
# backward take a third of the time of the whole matrix from L = 256 on; elsewhere not measured.
WEIGHT_BYTES = {"cpu": 4 * 2**20}
WEIGHT_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 8  # with fewer rows, the overhead of the loop dominates on a CPU


def attention(
    q: Heads,
    k: Heads,
    v: Heads,
    mask: Bool[Array, "B L"],
    *,
    causal: bool,
    dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
) -> Heads:
    """Means of the values, weighted by softmax over the real (if causal: past and own) positions.

    Args:
        mask: real positions, which come first in every sequence.
        dropout: rate, of the attention weights; requires `key`.
    """
    batch, length, heads, head_width = q.shape
    rows = block_rows(local_batch_size(batch) * heads * length)
    if dropout:
        if key is None:
            raise ValueError(
                "model.attention_dropout above 0 needs random numbers in training; "
                "pass rngs with `dropout`"
            )
        # jax.nn.dot_product_attention has no dropout
        return attention_by_blocks(q, k, v, mask, causal, rows, dropout, key)
    if has_flash(q.dtype, head_width):
        # lengths, because cuDNN expands a mask to a bias of B H L L
        lengths = mask.sum(axis=1, dtype=jnp.int32)
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, is_causal=causal, implementation="cudnn"
        )
    if length <= rows:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :], is_causal=causal)
    return attention_by_blocks(q, k, v, mask, causal, rows)


def has_flash(dtype: jnp.dtype, head_width: int, device: Any = None) -> bool:
    """Whether `device` has cuDNN's flash attention for heads of this dtype and width.

    It requires 16-bit inputs, an NVIDIA GPU from Ampere on, and a head width that is a multiple of
    8 and at most 128 (256 from Hopper on). Capability 10.3 is excluded, because it needs a newer
    cuDNN (9.11) than JAX requires; the capability of AMD's GPUs is a name such as gfx90a.
    """
    device = jax.devices()[0] if device is None else device
    exact = str(getattr(device, "compute_capability", ""))
    capability = exact.partition(".")[0]
    if device.platform not in ("gpu", "cuda") or exact == "10.3" or not capability.isdigit():
        return False
    widest = 256 if int(capability) >= 9 else 128 if int(capability) >= 8 else 0
    return dtype in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= widest


def block_rows(weights_a_row: int) -> int:
    """Queries per block, a power of two, if one query has so many weights in all heads."""
    rows = WEIGHT_BYTES.get(jax.default_backend(), WEIGHT_BYTES_ELSEWHERE) // (4 * weights_a_row)
    return max(FEWEST_ROWS, 1 << max(rows, 1).bit_length() - 1)


def attention_by_blocks(
    q: Heads,
    k: Heads,
    v: Heads,
    mask: Bool[Array, "B L"],
    causal: bool,
    rows: int,
    dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
) -> Heads:
    """`attention` with the weights of `rows` queries at a time, in the forward and backward pass.

    Scores and their sums are at least float32. Gradients are exact; `jax.jvp` works too.
    """
    length, head_width = q.shape[1], q.shape[3]
    rows = min(rows, length)
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    queries = jnp.transpose(split_blocks(q, rows), (1, 0, 3, 2, 4))  # (blocks, B, H, rows, W)
    # at least float32 outside the blocks: the backward pass sums the gradients of the blocks
    keys = jnp.transpose(k, (0, 2, 3, 1)).astype(dtype)  # (B, H, W, L), once for all blocks
    values = jnp.transpose(v, (0, 2, 1, 3)).astype(dtype)  # (B, H, L, W)
    real = mask[:, None, None, :]

    @jax.checkpoint
    def block(index: Array, q: Array) -> Array:
        visible = real
        if causal:
            now = index * rows + jnp.arange(rows)
            visible = visible & (jnp.arange(length)[None, :] <= now[:, None])[None, None]
        scores = jnp.matmul(q, keys.astype(k.dtype), preferred_element_type=dtype)
        scores = scores / jnp.sqrt(jnp.asarray(head_width, dtype))
        # not -inf, because a sequence without a real position would give NaN
        weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(dtype).min), axis=-1)
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - dropout, weights.shape)
            weights = jnp.where(kept, weights / (1 - dropout), 0)
        return jnp.matmul(weights.astype(v.dtype), values.astype(v.dtype))

    y = lax.map(lambda args: block(*args), (jnp.arange(len(queries)), queries))
    return merge_blocks(jnp.transpose(y, (1, 0, 3, 2, 4)), length)
