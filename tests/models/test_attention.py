"""What every kind of attention shares, and softmax attention's slopes; its values stand in test_mixers.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from heads import check_16_bits, check_against_loop, turned

from models.attention import Attention, MultiHead
from models.backbone import Backbone
from models.ops.positions import rotate


def attention(**options):
    defaults = {
        "num_heads": 2,
        "positions": "none",
        "causal": False,
        "max_len": None,
        "qkv_width": None,
        "attention_dropout": 0.0,
    }
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


def test_transformer_has_the_published_number_of_parameters():
    """797K: the attention baseline of the MLRA report on ListOps, 4 layers of 128, 8 heads, MLP of 512."""

    def build():
        mixer = partial(
            Attention, num_heads=8, positions="none", causal=False, max_len=None, qkv_width=None, attention_dropout=0.0
        )
        around = {"norm": "layer", "norm_position": "pre", "norm_momentum": 0.9, "final_norm": True}
        branch = {"activation": "none", "glu": "none", "mlp": "gelu", "mlp_ratio": 4, "dropout": 0.0}
        sizes = {"num_classes": 10, "seq_len": 2048, "vocab_size": 18, "depth": 4, "width": 128}
        return Backbone(mixer, **sizes, **around, **branch, pool="mean", positions="none", rngs=nnx.Rngs(0))

    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param)))
    assert count == pytest.approx(797_000, rel=0.02)


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
