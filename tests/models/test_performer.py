"""Performer against loops over its features and against softmax attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    check_attention_against_loop,
    check_bfloat16,
    inputs,
    mask_of,
    rotated,
    softmax_attention,
)
from flax import nnx
from mixer_checks import check_streaming

from models.ops import linear_attention
from models.performer import Performer, orthogonal_features

LIKE_LRA = {"kernel": "relu", "num_features": None}  # what the published LRA code runs
KINDS = [{}, {"kernel": "relu"}, LIKE_LRA]


def performer(seed=0, **options):
    defaults = {
        "num_heads": 2,
        "num_features": 10,
        "kernel": "softmax",
        "positions": "none",
        "causal": False,
    }
    return Performer(8, 11, **defaults | options, rngs=nnx.Rngs(seed))


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=["softmax", "relu", "like LRA"])
def test_performer_equals_a_loop(kind, causal, positions, monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNK", 4)
    monkeypatch.setattr("models.linear.block_rows", lambda *sizes: 4)
    mixer = performer(**kind, causal=causal, positions=positions)
    w = np.eye(4) if kind == LIKE_LRA else np.asarray(mixer.directions[...], np.float64)

    def phi(x):
        if "kernel" in kind:
            return np.maximum(w @ x, 0) + 1e-3
        x = x / 4**0.25
        return np.array([np.exp(w_j @ x - x @ x / 2) for w_j in w]) / np.sqrt(len(w))  # Lemma 1

    def weigh(q, k, t, s):
        if causal and s > t:
            return 0.0, 0.0
        q, k = (rotated(q, t), rotated(k, s)) if positions == "rotary" else (q, k)
        weight = phi(q) @ phi(k)
        return weight, weight

    # 1e-6 is added to the key's exponential features
    check_attention_against_loop(mixer, weigh, tolerance=1e-8 if kind else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
def test_many_features_are_softmax_attention(causal, positions):
    """With the same projections the error falls as 1 / sqrt(M), by 8 here, for large M."""
    options = {"positions": positions, "causal": causal}
    softmax = softmax_attention(**options)
    x, mask = jnp.asarray(0.5 * inputs(), jnp.float32), mask_of((11, 6), 11)

    def error(num_features):
        errors = []
        for seed in range(4):
            mixer = performer(seed, num_features=num_features, **options)
            mixer.qkv, mixer.output = softmax.qkv, softmax.output
            errors.append(jnp.where(mask[..., None], mixer(x, mask) - softmax(x, mask), 0))
        return float(jnp.sqrt(jnp.mean(jnp.square(jnp.stack(errors)))))

    assert error(4096) < 0.008
    assert error(64) > 4 * error(4096)


def test_features_are_orthogonal_in_blocks_and_gaussian_each():
    w = np.asarray(orthogonal_features(jax.random.key(0), 6 * 2000 + 4, 6), np.float64)
    assert w.shape == (12_004, 6)
    for block in (w[:6], w[6:12], w[-4:]):
        products = block @ block.T
        np.testing.assert_allclose(products - np.diag(np.diagonal(products)), 0, atol=1e-5)
    np.testing.assert_allclose(w.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(w.T @ w / len(w), np.eye(6), atol=0.05)
    squared = np.square(w).sum(axis=1)  # chi-squared with 6 degrees of freedom
    assert squared.mean() == pytest.approx(6, rel=0.03)
    assert squared.var() == pytest.approx(12, rel=0.1)


def test_features_follow_the_seed_and_are_not_trained():
    def directions(seed):
        return np.asarray(performer(seed).directions[...])

    np.testing.assert_array_equal(directions(0), directions(0))
    assert np.abs(directions(0) - directions(1)).max() > 0.1
    assert set(nnx.to_pure_dict(nnx.state(performer(), nnx.Param))) == {"qkv", "output"}


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("kind", KINDS, ids=["softmax", "relu", "like LRA"])
@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_streaming_equals_parallel(kind, positions):
    check_streaming(
        performer(**kind, causal=True, positions=positions), jnp.asarray(inputs(), jnp.float32)
    )


def test_memory_over_all_positions_does_not_grow_with_the_features():
    """Forward and backward with 256 features per head; those of all queries take 67 MB."""
    graph, params, rest = nnx.split(
        Performer(
            64,
            0,
            num_heads=4,
            num_features=256,
            kernel="softmax",
            positions="none",
            causal=False,
            rngs=nnx.Rngs(0),
        ),
        nnx.Param,
        ...,
    )
    x, mask = jax.ShapeDtypeStruct((4, 4096, 64), jnp.float32), jnp.ones((4, 4096), bool)
    step = jax.jit(
        jax.grad(lambda params, x: jnp.square(nnx.merge(graph, params, rest)(x, mask)).sum())
    )
    assert (
        step.lower(params, x).compile().memory_analysis().temp_size_in_bytes
        < 4 * 4096 * 4 * 256 * 4
    )


@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients_stay_finite_far_from_the_origin(causal):
    """Here exp(q . k) would overflow, and all features of a query or key would underflow."""
    mixer = performer(causal=causal)
    mask = mask_of((11, 6), 11)
    for scale in (30.0, 1e3):
        x = jnp.asarray(scale * inputs(), jnp.float32)
        y, grad = jax.value_and_grad(lambda x: jnp.square(mixer(x, mask)).sum())(x)
        assert np.isfinite(y)
        assert y > 0
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("causal", [False, True])
def test_16_bits(causal):
    check_bfloat16(performer(causal=causal))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_heads": 3}, r"model\.num_heads=3"),
        ({"num_features": 0}, r"model\.num_features=0"),
        ({"num_features": None}, r"model\.num_features=null"),
        ({"kernel": "cosine"}, r"model\.kernel=cosine is unknown"),
        ({"num_heads": 8, "positions": "rotary"}, r"model\.positions=rotary"),
    ],
)
def test_bad_options_name_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        performer(**options)
