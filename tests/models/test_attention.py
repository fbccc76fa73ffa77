"""What every kind of attention shares, and softmax attention's slopes; its values stand in test_mixers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from heads import check_16_bits, check_against_loop, turned

from models.attention import Attention, MultiHead
from models.ops.positions import rotate


def attention(**options):
    defaults = {"num_heads": 2, "positions": "none", "causal": False, "max_len": None}
    return Attention(8, 11, **defaults | options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_a_loop(positions, causal):
    def weigh(q, k, t, s):
        if causal and s > t:
            return 0.0, 0.0
        q, k = (turned(q, t), turned(k, s)) if positions == "rotary" else (q, k)
        weight = np.exp(q @ k / 2)
        return weight, weight

    check_against_loop(attention(positions=positions, causal=causal), weigh)


def test_attention_returns_16_bits_for_16_bits():
    check_16_bits(attention(positions="rotary"))


def test_positions_may_start_anywhere():
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
    np.testing.assert_allclose(rotate(x[:, 3:], first=3), rotate(x)[:, 3:], atol=1e-6)
    np.testing.assert_allclose(rotate(x[:, 3:4], first=jnp.int32(3)), rotate(x)[:, 3:4], atol=1e-6)


def test_unknown_positions_name_their_key():
    with pytest.raises(ValueError, match=r"model\.positions=circular is unknown; choose one of"):
        attention(positions="circular")


def test_the_interface_has_no_attention_of_its_own():
    mixer = MultiHead(8, num_heads=2, positions="none", causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError):
        mixer(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool))
