"""Compares an operation in float64, with its gradients, with a loop over its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

STEP = 1e-5  # of central differences, whose own error is near 1e-9
SLOPE_TOLERANCE = 1e-7


def check_against_loop(ours, loop, arguments, cotangent, *, tolerance=1e-10):
    """Values where the cotangent is not zero, and gradients along a random direction.

    Each argument has its own direction.

    Args:
        ours: maps `arguments` to an array, under `jax.jit` in float64.
        loop: maps `arguments` as NumPy arrays to the same array.
        arguments: a tree of arrays.
        cotangent: weights of the outputs; zero at padding, where `loop` may return anything.
        tolerance: of the values, relative to the largest one; of the slopes, at least 1e-7,
            relative to the sum of their terms.
    """
    arguments = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)

    def weighted(arguments):
        y = ours(arguments)
        return jnp.sum(jnp.where(cotangent != 0, y * cotangent, 0)), y

    with jax.enable_x64(True):
        grads, y = jax.device_get(jax.jit(jax.grad(weighted, has_aux=True))(arguments))
    real = cotangent != 0
    assert y.dtype == np.float64
    expected = loop(arguments)
    assert isinstance(expected, np.ndarray)
    np.testing.assert_allclose(
        y[real], expected[real], rtol=0, atol=tolerance * np.abs(expected[real]).max()
    )
    rng = np.random.default_rng(3)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(arguments)
    ]
    leaves, tree = jax.tree.flatten(arguments)
    for index, (path, leaf, grad) in enumerate(
        zip(paths, leaves, jax.tree.leaves(grads), strict=True)
    ):
        assert np.abs(grad).max() > 0, path
        direction = rng.normal(size=leaf.shape)
        ends = []
        for step in (STEP, -STEP):
            moved = [x + step * direction if i == index else x for i, x in enumerate(leaves)]
            ends.append(np.sum((loop(tree.unflatten(moved)) * cotangent)[real]))
        terms = grad * direction
        # rounding of the loop's sums, divided by the step of the difference
        rounding = 10 * np.finfo(np.float64).eps * np.abs(expected * cotangent)[real].sum() / STEP
        np.testing.assert_allclose(
            terms.sum(),
            (ends[0] - ends[1]) / (2 * STEP),
            rtol=0,
            atol=max(tolerance, SLOPE_TOLERANCE) * np.abs(terms).sum() + rounding,
            err_msg=path,
        )


def check_mixer_against_loop(mixer, u, real, loop, tolerance=1e-10):
    """`mixer(u, real)` at real positions and its gradients against `loop(parameters, u)`.

    A mixer that narrows its inputs to float32 fails by far.
    """
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    check_against_loop(
        lambda arguments: nnx.merge(graph, arguments["params"], rest)(
            arguments["u"], jnp.asarray(real)
        ),
        lambda arguments: loop(arguments["params"], arguments["u"]),
        {"params": nnx.to_pure_dict(params), "u": u},
        np.random.default_rng(1).normal(size=u.shape) * real[..., None],
        tolerance=tolerance,
    )
