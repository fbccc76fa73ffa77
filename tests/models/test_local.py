"""Local attention against softmax over the keys that a query's blocks hold, one key at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    check_attention_against_loop,
    check_bfloat16,
    rotated,
)
from flax import nnx

from models.local import LocalAttention


def local(seq_len=11, **options):
    defaults = {
        "num_heads": 2,
        "block_size": 4,
        "neighbours": 0,
        "positions": "none",
        "causal": False,
    }
    return LocalAttention(8, seq_len, **defaults | options, rngs=nnx.Rngs(0))


@pytest.mark.fast_variants(5)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("block_size", "neighbours", "positions"),
    [
        (4, 0, "none"),
        (4, 1, "rotary"),
        (3, 2, "none"),
        (11, 0, "none"),
        (1, 0, "none"),
        (1, 1, "none"),
        (50, 3, "none"),
    ],
)
def test_local_attention_equals_a_loop(block_size, neighbours, positions, causal):
    """With C = 3 and 4 the last block is short; it is all padding in the second sequence."""

    def weigh(q, k, t, s):
        if abs(t // block_size - s // block_size) > neighbours or (causal and s > t):
            return 0.0, 0.0
        q, k = (rotated(q, t), rotated(k, s)) if positions == "rotary" else (q, k)
        weight = np.exp(q @ k / 2)
        return weight, weight

    check_attention_against_loop(
        local(block_size=block_size, neighbours=neighbours, causal=causal, positions=positions),
        weigh,
    )


def test_16_bits():
    check_bfloat16(local(neighbours=1))


def test_memory_grows_with_the_block_and_not_with_the_length():
    """Forward and backward of 8,192 positions; one L x L matrix would be 268 MB."""
    length = 8192
    mixer = local(length, block_size=64)
    x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
    mask = jnp.ones((1, length), bool)
    step = jax.jit(jax.grad(lambda x: (mixer(x, mask) ** 2).sum()))
    weights = length * 64 * 2 * 4  # L C of both heads
    assert (
        step.lower(x).compile().memory_analysis().temp_size_in_bytes
        < 8 * weights
        < length**2 * 4 / 4
    )


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_heads": 3}, r"model\.num_heads=3"),
        ({"block_size": 0}, r"model\.block_size=0"),
        ({"neighbours": -1}, r"model\.neighbours=-1"),
    ],
)
def test_bad_sizes_name_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        local(**options)
