"""Causal sums of linear attention: values, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops import linear_attention
from models.ops.linear_attention import causal_sums, weight_totals


def sums_by_matrix(q, k, v):
    weights = jnp.einsum("blhm,bshm->bhls", q, k)
    return jnp.einsum("bhls,bshw->blhw", jnp.tril(weights), v)


def features(length, batch=2, heads=3, m=5, w=4):
    rng = np.random.default_rng(length)
    return [rng.normal(size=(batch, length, heads, n)) for n in (m, m, w)]


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 19])
def test_sums_and_gradients_equal_those_of_the_matrix(length, monkeypatch):
    """In chunks of 4: none full, one, several, a short one at the end."""
    monkeypatch.setattr(linear_attention, "CHUNK", 4)
    arrays = features(length)
    cotangent = np.random.default_rng(0).normal(size=arrays[2].shape)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in arrays]
        (fast, fast_grads), (slow, slow_grads) = (
            (f(*arrays), jax.vjp(f, *arrays)[1](jnp.asarray(cotangent)))
            for f in (causal_sums, sums_by_matrix)
        )
        np.testing.assert_allclose(fast, slow, atol=1e-12)
        for ours, expected in zip(fast_grads, slow_grads, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_totals_are_sums_with_values_of_one():
    q, k, v = (jnp.asarray(a, jnp.float32) for a in features(9))
    expected = causal_sums(q, k, jnp.ones_like(v))[..., 0]
    np.testing.assert_allclose(weight_totals(q, k), expected, atol=1e-5)


def test_memory_has_no_state_for_each_position_nor_a_square_of_the_length():
    """States of all positions, or the L x L matrix, would take 67 MB."""
    length, width = 4096, 64
    q = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
    step = jax.jit(jax.grad(lambda q, k, v: (causal_sums(q, k, v) ** 2).sum(), argnums=(0, 1, 2)))
    used = step.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes
    assert used < length * width**2 * 4 / 4
