"""Linear attention against the paper's equations, one query and key at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    check_attention_against_loop,
    check_bfloat16,
    inputs,
    rotated,
    softmax_attention,
)
from flax import nnx
from mixer_checks import check_streaming

from models.linear import LinearAttention
from models.ops import linear_attention


def linear(**options):
    defaults = {"num_heads": 2, "positions": "none", "causal": False}
    return LinearAttention(8, 11, **defaults | options, rngs=nnx.Rngs(0))


def phi(x):
    """Equation (7)."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


@pytest.fixture(autouse=True)
def _three_chunks(monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNK", 4)
    monkeypatch.setattr("models.linear.block_rows", lambda *sizes: 4)


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_equals_a_loop(positions, causal):
    """Equations (4) and (8); rotary positions as in equation (19) of RoFormer."""

    def weigh(q, k, t, s):
        if causal and s > t:
            return 0.0, 0.0
        total = phi(q) @ phi(k)
        return (rotated(phi(q), t) @ rotated(phi(k), s) if positions == "rotary" else total), total

    check_attention_against_loop(linear(positions=positions, causal=causal), weigh, tolerance=1e-8)


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_streaming_equals_parallel(positions):
    check_streaming(linear(causal=True, positions=positions), jnp.asarray(inputs(), jnp.float32))


@pytest.mark.parametrize("causal", [False, True])
def test_16_bits(causal):
    check_bfloat16(linear(causal=causal, positions="rotary"))
    heads = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    assert {x.dtype for x in linear().features(heads, heads)} == {jnp.dtype("float32")}


def test_a_sequence_without_a_real_position_gives_zeros():
    y = linear()(jnp.asarray(inputs(), jnp.float32), jnp.zeros((2, 11), bool))
    np.testing.assert_array_equal(y, 0)


def test_it_has_the_parameters_of_softmax_attention():
    def shapes(mixer):
        return jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(mixer, nnx.Param)))

    assert shapes(linear()) == shapes(softmax_attention())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_heads": 3}, r"model\.num_heads=3"),
        ({"num_heads": 8, "positions": "rotary"}, r"model\.positions=rotary"),
        ({"positions": "circular"}, r"model\.positions=circular"),
    ],
)
def test_bad_sizes_name_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        linear(**options)
