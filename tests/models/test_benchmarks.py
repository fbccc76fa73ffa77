"""Both sides of an operation's benchmark compute the same values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.benchmarks import attention_case, feedback_case, path_x_case, recurrence_case, stu_case

SMALL = [
    stu_case(2, 37, 4, k_y=2, num_filters=5),
    stu_case(1, 16, 8, k_y=5, num_filters=3),
    feedback_case(2, 20, 4, k_y=3),
    recurrence_case(2, 50, 3),
    attention_case(2, 24, 2, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.what)
def test_published_order_gives_the_same_values_and_gradients(case):
    def with_gradients(function):
        y, pull = jax.vjp(lambda *x: function(*x, *case.constants), *case.learned)
        return y, pull(jnp.ones_like(y))

    ours, published = (
        jax.jit(with_gradients, static_argnums=0)(f) for f in (case.ours, case.published)
    )
    for found, expected in zip(*map(jax.tree.leaves, (ours, published)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_path_x_case_is_a_whole_classifier():
    case = path_x_case(batch=2, length=32, width=4, depth=2)
    logits, pull = jax.vjp(lambda *x: case.ours(*x, *case.constants), *case.learned)
    assert logits.shape == (2, 2)
    grads = jax.tree.leaves(pull(jnp.asarray([[1.0, -1.0], [-1.0, 1.0]]))[0])
    assert all(np.isfinite(g).all() for g in grads)
    assert sum(float(np.abs(g).max()) > 0 for g in grads) > len(grads) / 2
