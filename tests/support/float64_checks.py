"""A mixer in float64 against a loop over its paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def check_in_float64(mixer, u, real, loop, tolerance=1e-10):
    """Values at real positions and all gradients of `mixer(u)` against `loop(parameters by name, u)`.

    `tolerance` is relative to the largest entry of each. A mixer that narrows its input to float32 misses it by far.
    """
    weights = np.random.default_rng(1).normal(size=u.shape) * real[..., None]
    with jax.enable_x64(True):
        graph, params, rest = nnx.split(mixer, nnx.Param, ...)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        u = jnp.asarray(np.asarray(u, np.float64))

        def ours(params, u):
            y = nnx.merge(graph, params, rest)(u, jnp.asarray(real))
            return jnp.sum(y * weights), y

        def slow(params, u):
            y = loop(nnx.to_pure_dict(params), u)
            return jnp.sum(y * weights), y

        ((_, y), grads), ((_, expected), slow_grads) = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, u)
            for f in (ours, slow)
        )
    assert y.dtype == jnp.float64
    y, expected = (np.where(real[..., None], x, 0) for x in (y, expected))
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    found = dict(jax.tree_util.tree_leaves_with_path(grads))
    for path, expected in jax.tree_util.tree_leaves_with_path(slow_grads):
        name, scale = jax.tree_util.keystr(path), np.abs(expected).max()
        assert scale > 0, name
        np.testing.assert_allclose(
            found[path], expected, rtol=0, atol=tolerance * scale, err_msg=name
        )
