"""What does softmax attention give, softmax(q k^T / sqrt(W)) v over the keys that are no padding, without an L x L matrix?

Paper: Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, equation (1). Three orders of the same work, chosen
when the program is traced: cuDNN's flash attention (Dao et al. 2022, arXiv 2205.14135) where the GPU has it, the whole matrix of
weights where it is small, else one block of queries after the other, whose weights are taken again in the backward pass (Rabe and
Staats 2021, arXiv 2112.05682, take blocks of keys too; with 16,384 keys a row of weights is small enough).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from models.ops.blocks import cut, joined
from models.ops.by_example import own_examples

# Bytes of weights held at once. Of a CPU, about what its caches hold: in blocks of 4 MiB, forward and backward take a third of
# the time that the whole matrix takes, from L = 256 on. Of an accelerator, enough rows to fill it; not measured.
WEIGHT_BYTES = {"cpu": 4 * 2**20}
WEIGHT_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 8  # below, a CPU's time goes into the steps


def attention(
    q: Float[Array, "B L H W"],
    k: Float[Array, "B L H W"],
    v: Float[Array, "B L H W"],
    mask: Bool[Array, "B L"],
    *,
    causal: bool,
    dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B L H W"]:
    """Each position's mean of the values, weighted over the real positions (of the past and itself, if causal).

    Args:
        mask: real positions, which come first in every sequence.
        dropout: rate at which single weights are left out; `key` draws them.
    """
    batch, length, heads, head_width = q.shape
    rows = block_rows(own_examples(batch) * heads * length)
    if dropout:
        if key is None:
            raise ValueError(
                "model.attention_dropout above 0 needs random numbers in training; pass rngs with `dropout`"
            )
        return by_blocks(q, k, v, mask, causal, rows, dropout, key)  # the library's forms have none
    if has_flash(q.dtype, head_width):
        # lengths, not a mask: cuDNN turns a mask into a bias of B H L L
        lengths = mask.sum(axis=1, dtype=jnp.int32)
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, is_causal=causal, implementation="cudnn"
        )
    if length <= rows:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :], is_causal=causal)
    return by_blocks(q, k, v, mask, causal, rows)


def has_flash(dtype: jnp.dtype, head_width: int, device: Any = None) -> bool:
    """Whether `device` (of this process, by default) has cuDNN's flash attention for heads of this type and width.

    It takes 16-bit numbers alone, on NVIDIA GPUs from Ampere on, heads of a multiple of 8 and at most 128 channels (256 from
    Hopper on). Capability 10.3 wants a newer cuDNN (9.11) than JAX asks for and is left out, as are AMD's GPUs, whose capability
    is a name such as gfx90a.
    """
    device = jax.devices()[0] if device is None else device
    exact = str(getattr(device, "compute_capability", ""))
    capability = exact.partition(".")[0]
    if exact == "10.3":
        return False
    if device.platform not in ("gpu", "cuda") or not capability.isdigit() or int(capability) < 8:
        return False
    widest = 256 if int(capability) >= 9 else 128
    return dtype in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= widest


def block_rows(weights_a_row: int) -> int:
    """Queries taken at once, where one of every head and example has `weights_a_row` weights in all; a power of two."""
    rows = WEIGHT_BYTES.get(jax.default_backend(), WEIGHT_BYTES_ELSEWHERE) // (4 * weights_a_row)
    return max(FEWEST_ROWS, 1 << max(rows, 1).bit_length() - 1)


def by_blocks(
    q: Float[Array, "B L H W"],
    k: Float[Array, "B L H W"],
    v: Float[Array, "B L H W"],
    mask: Bool[Array, "B L"],
    causal: bool,
    rows: int,
    dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B L H W"]:
    """`attention` with the weights of `rows` queries at a time, B H rows L numbers, forward and backward.

    Scores and their sums are at least float32. Gradients are exact; `jax.jvp` works too.
    """
    length, head_width = q.shape[1], q.shape[3]
    rows = min(rows, length)
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    queries = jnp.transpose(cut(q, rows), (1, 0, 3, 2, 4))  # (blocks, B, H, rows, W)
    # wide outside of the blocks, over which the backward pass sums their gradients
    keys = jnp.transpose(k, (0, 2, 3, 1)).astype(dtype)  # (B, H, W, L), once for all blocks
    values = jnp.transpose(v, (0, 2, 1, 3)).astype(dtype)  # (B, H, L, W)
    seen = mask[:, None, None, :]

    @jax.checkpoint
    def block(index: Array, q: Array) -> Array:
        visible = seen
        if causal:
            now = index * rows + jnp.arange(rows)
            visible = visible & (jnp.arange(length)[None, :] <= now[:, None])[None, None]
        scores = jnp.matmul(q, keys.astype(k.dtype), preferred_element_type=dtype) / jnp.sqrt(
            jnp.asarray(head_width, dtype)
        )
        # not -inf: a sequence without a real position would give NaN
        weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(dtype).min), axis=-1)
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - dropout, weights.shape)
            weights = jnp.where(kept, weights / (1 - dropout), 0)
        return jnp.matmul(weights.astype(v.dtype), values.astype(v.dtype))

    y = lax.map(lambda args: block(*args), (jnp.arange(len(queries)), queries))
    return joined(jnp.transpose(y, (1, 0, 3, 2, 4)), length)
