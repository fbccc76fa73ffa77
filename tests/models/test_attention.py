"""Softmax attention against loops, and what all kinds of attention share."""

import re
import shlex
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    SOFTMAX,
    attention_by_loop,
    check_attention_against_loop,
    check_bfloat16,
    inputs,
    mask_of,
    rotated,
    softmax_attention,
)
from flax import nnx
from mixer_checks import count_parameters

import lra
from lra.config.build import build_task, model_builder
from models.attention import Attention, MultiHead


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_a_loop(positions, causal):
    def weigh(q, k, t, s):
        if causal and s > t:
            return 0.0, 0.0
        q, k = (rotated(q, t), rotated(k, s)) if positions == "rotary" else (q, k)
        weight = np.exp(q @ k / 2)
        return weight, weight

    check_attention_against_loop(softmax_attention(positions=positions, causal=causal), weigh)


@pytest.mark.parametrize("qkv_width", [4, 12])
def test_queries_keys_and_values_may_have_a_width_of_their_own(qkv_width):
    def weigh(q, k, t, s):
        weight = np.exp(q @ k / np.sqrt(qkv_width / 2))
        return weight, weight

    mixer = softmax_attention(qkv_width=qkv_width)
    assert (mixer.qkv.kernel.shape, mixer.output.kernel.shape) == (
        (8, 3 * qkv_width),
        (qkv_width, 8),
    )
    check_attention_against_loop(mixer, weigh)


def test_dropout_of_weights_acts_in_training_alone():
    mixer, plain = softmax_attention(attention_dropout=0.5), softmax_attention()
    x, mask = jnp.asarray(inputs(), jnp.float32), mask_of((11, 6), 11)

    def trained(seed):
        return mixer(x, mask, train=True, rngs=nnx.Rngs(dropout=seed))

    np.testing.assert_array_equal(mixer(x, mask), plain(x, mask))
    np.testing.assert_array_equal(trained(0), trained(0))
    assert np.abs(trained(0) - trained(1)).max() > 0.01
    many = jax.vmap(lambda key: mixer(x, mask, train=True, rngs=nnx.Rngs(dropout=key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    np.testing.assert_allclose(many.mean(axis=0), plain(x, mask), atol=0.1)


def normed(x, norm):
    scale, bias = (np.asarray(p[...], np.float64) for p in (norm.norm.scale, norm.norm.bias))
    x = x - x.mean(axis=-1, keepdims=True)
    return scale * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) + bias


def affine(x, layer):
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def transformer_by_loop(model, ids, lra_paper):
    """A document without padding, through both configurations as docs/models describes them."""
    table = np.asarray(model.encoder.table[...], np.float64)
    x = table[np.asarray(ids)]
    if lra_paper:
        x = np.concatenate([np.asarray(model.cls[...], np.float64)[0], x])
        angle = np.arange(len(x))[:, None] / 10_000.0 ** (np.arange(0, x.shape[1], 2) / x.shape[1])
        x[:, ::2] += np.sin(angle)
        x[:, 1::2] += np.cos(angle)

    def weigh(q, k, t, s):
        weight = (
            np.exp(q @ k / np.sqrt(len(q)))
            if lra_paper
            else np.exp(rotated(q, t) @ rotated(k, s) / np.sqrt(len(q)))
        )
        return weight, weight

    for block in model.blocks:
        mixer = block.mixer
        kernels = (np.asarray(layer.kernel[...], np.float64) for layer in (mixer.qkv, mixer.output))
        x = x + attention_by_loop(*kernels, normed(x, block.norm), mixer.num_heads, weigh)
        hidden = affine(normed(x, block.mlp_norm), block.mlp.up)
        if lra_paper:
            hidden = (
                hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
            )
        else:
            value, gate = np.split(hidden, 2, axis=-1)
            hidden = value * gate / (1 + np.exp(-gate))
        x = x + affine(hidden, block.mlp.down)
    x = normed(x, model.final_norm)
    if lra_paper:
        return affine(np.maximum(affine(x[0], model.head.hidden), 0), model.head.output)
    return affine(x.mean(axis=0), model.head)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "transformer_lra"])
def test_the_whole_model_equals_a_loop(name):
    cfg = lra.compose(
        [
            f"model={name}",
            "task=listops_short",
            "task.max_length=30",
            "backbone.depth=2",
            "backbone.width=12",
        ]
    )
    task = build_task(cfg)
    model = model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0)))
    for at, leaf in enumerate(
        jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable))
    ):
        leaf[...] = leaf[...] + 0.1 * jax.random.normal(
            jax.random.key(at), leaf.shape
        )  # norms and biases start at 1 and 0
    nnx.update(model, nnx.state(model, nnx.Param))
    ids = jax.random.randint(jax.random.key(1), (1, task.seq_len), 1, len(task.vocab))
    expected = transformer_by_loop(model, ids[0], name == "transformer_lra")
    np.testing.assert_allclose(model(ids, jnp.array([task.seq_len]))[0], expected, atol=1e-4)


def test_both_configurations_have_as_many_parameters_a_layer():
    """12 D^2 and what norms and biases add."""

    def block_of(name):
        cfg = lra.compose(
            [f"model={name}", "task=listops", "backbone.depth=1", "backbone.width=512"]
        )
        build = model_builder(cfg, build_task(cfg))
        block = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=jax.random.key(0)))).blocks[0]
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block, nnx.Param)))

    for name in ("transformer", "transformer_lra"):
        assert block_of(name) == pytest.approx(12 * 512**2, rel=0.005)


PAGE = Path(__file__).parents[2] / "docs" / "models" / "transformer.md"
COMMANDS = [
    shlex.split(line)[2:] for line in re.findall(r"^lra train .*$", PAGE.read_text(), flags=re.M)
]


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_commands_of_the_page_build_the_papers_sizes(words):
    cfg = lra.compose(words)
    build = model_builder(cfg, build_task(cfg))
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=jax.random.key(0))))
    found = len(model.blocks), model.blocks[0].mixer.num_heads, *model.blocks[0].mlp.up.kernel.shape
    assert (
        found
        == {  # layers, heads, D, MLP
            "task=listops": (6, 8, 512, 2048),
            "task=text": (6, 8, 512, 2048),
            "task=retrieval": (4, 4, 128, 512),
            "task=image": (3, 4, 64, 128),
            "task=pathfinder": (4, 8, 128, 128),
        }[words[0]]
    )


def test_attention_returns_16_bits_for_16_bits():
    check_bfloat16(softmax_attention(positions="rotary"))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"qkv_width": 5}, r"model\.num_heads=2 must be at least 1 and divide model\.qkv_width=5"),
        ({"qkv_width": 0}, r"model\.qkv_width=0"),
        ({"num_heads": 3}, r"model\.num_heads=3 must be at least 1 and divide backbone\.width=8"),
        (
            {"num_heads": 8, "positions": "rotary"},
            r"model\.positions=rotary needs an even head width",
        ),
        ({"max_len": 10}, r"task\.seq_len=11 is longer than model\.max_len=10"),
        ({"qkv_width": 6, "positions": "rotary"}, r"model\.qkv_width/model\.num_heads = 3"),
        ({"attention_dropout": 1}, r"model\.attention_dropout=1 must be"),
        ({"attention_dropout": -0.1}, r"model\.attention_dropout=-0\.1 must be"),
    ],
)
def test_bad_sizes_name_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        softmax_attention(**options)


def test_unknown_positions_name_their_key():
    with pytest.raises(ValueError, match=r"model\.positions=circular is unknown; choose one of"):
        softmax_attention(positions="circular")


def test_the_interface_has_no_attention_of_its_own():
    mixer = MultiHead(8, num_heads=2, positions="none", causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError):
        mixer(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool))


def test_transformer_has_the_published_number_of_parameters():
    """797K in the MLRA report on ListOps: 4 layers of 128, 8 heads, MLP of 512."""
    sizes = {"num_classes": 10, "seq_len": 2048, "vocab_size": 18, "depth": 4, "width": 128}
    around = {"norm": "layer", "final_norm": True, "activation": "none", "glu": "none"}
    mixer = partial(Attention, **SOFTMAX | {"num_heads": 8})
    count = count_parameters(mixer, **sizes, **around, mlp="gelu")
    assert count == pytest.approx(797_000, rel=0.02)
