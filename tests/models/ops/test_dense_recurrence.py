"""The dense recurrence against autodiff through its loop, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.dense_recurrence import dense_recurrence


def by_loop(a, bu, activation, reverse):
    f = {"none": lambda x: x, "tanh": jnp.tanh, "relu": lambda x: jnp.maximum(x, 0)}[activation]
    h, states = jnp.zeros_like(bu[:, 0]), [None] * bu.shape[1]
    for t in range(bu.shape[1])[:: -1 if reverse else 1]:
        h = f(h @ a + bu[:, t])
        states[t] = h
    return jnp.stack(states, axis=1)


@pytest.mark.fast_variants(8)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", ["none", "tanh", "relu"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_states_and_gradients_equal_a_loop(length, activation, reverse):
    rng = np.random.default_rng(length)
    with jax.enable_x64(True):
        a, bu = jnp.asarray(rng.normal(size=(4, 4))), jnp.asarray(rng.normal(size=(3, length, 4)))
        cotangent = jnp.asarray(rng.normal(size=bu.shape))
        (fast, pull), (slow, pull_slow) = (
            jax.vjp(lambda a, bu, f=f: f(a, bu, activation, reverse), a, bu)
            for f in (dense_recurrence, by_loop)
        )
        np.testing.assert_allclose(fast, slow, atol=1e-12)
        for ours, expected in zip(pull(cotangent), pull_slow(cotangent), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_the_backward_pass_keeps_states_alone():
    """Forward and backward hold a few copies of the states, and no N x N matrix for each step."""
    batch, length, size = 2, 512, 64
    shapes = (
        jax.ShapeDtypeStruct((size, size), jnp.float32),
        jax.ShapeDtypeStruct((batch, length, size), jnp.float32),
    )
    step = jax.jit(jax.grad(lambda a, bu: (dense_recurrence(a, bu) ** 2).sum(), argnums=(0, 1)))
    assert (
        step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        < 6 * batch * length * size * 4
    )
