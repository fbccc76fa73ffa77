"""Runs training steps of a small setup and compares trees of arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from lra.training.state import State, copy_tree
from lra.training.step import make_step_functions


def state_of(setup):
    params, stats = copy_tree((setup.params, setup.batch_stats))
    return State(jnp.int32(0), params, stats, setup.tx.init(params), jnp.zeros(3), jnp.bool_(True))


def trained(setup, data, steps, micro_batch=None):
    run = make_step_functions(setup, 8, micro_batch).train_steps
    return jax.device_get(run(state_of(setup), setup.constants, data, jnp.int32(steps)))


def assert_close(tree, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), tree, other)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)
