"""The STU against the published code, a float64 loop and its other implementations."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stu_loop import stu_by_loop

import models.ops.stu as module
from models.ops.filters import spectral_filters
from models.ops.stu import (
    basis_first,
    causal_convolution,
    feature_moments,
    feedback,
    feedback_by_chunks,
    feedback_by_steps,
    inverse_power,
    stu,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def random_arguments(length, *, batch=2, d_in=3, d_out=4, k_u=3, minus=True, k_y=None):
    rng = np.random.default_rng(length)
    sigma, phi = spectral_filters(length + 5, 4)  # longer than the input
    arrays = {
        "u": rng.normal(size=(batch, length, d_in)),
        "phi": phi,
        "sigma": sigma,
        "m_u": rng.normal(size=(k_u, d_in, d_out)),
        "m_plus": rng.normal(size=(4, d_in, d_out)),
    }
    if minus:
        arrays["m_minus"] = rng.normal(size=(4, d_in, d_out))
    if k_y:
        arrays["m_y"] = rng.normal(size=(k_y, d_out, d_out)) / (2 * d_out * k_y)
    return arrays


def published(name):
    """Golden arguments and gradients in our conventions, and the file."""
    data = np.load(GOLDEN / f"stu_official_{name}.npz")
    num, d_in = len(data["sigma"]), data["u"].shape[2]

    def ours(prefix):
        return {
            "u": data[prefix + "u"],
            "m_u": data[prefix + "m_u"].transpose(2, 1, 0),
            "m_plus": data[prefix + "m_phi"].reshape(num, d_in, -1),
            "m_y": data[prefix + "m_y"].transpose(1, 2, 0),
        }

    return ours(""), ours("grad_"), data


@partial(jax.jit, static_argnames=("alpha", "lag"))
def value_and_gradients(arrays, fixed, cotangent, alpha=None, lag=1):
    extra = {} if alpha is None else {"m_y": alpha}
    y, pull = jax.vjp(lambda x: stu(**x, **fixed, **extra, lag=lag), arrays)
    return y, pull(cotangent)[0]


def assert_near(found, expected, tolerance, what=""):
    assert (
        np.abs(np.asarray(found) - np.asarray(expected)).max() <= tolerance * np.abs(expected).max()
    ), what


@pytest.mark.parametrize("name", ["small", "long", "ky5"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_stu_equals_published_code(name, dtype, tolerance):
    ours, grads, data = published(name)
    with jax.enable_x64(True):
        arrays = {key: jnp.asarray(value, dtype) for key, value in ours.items()}
        fixed = {"phi": jnp.asarray(data["phi"]), "sigma": jnp.asarray(data["sigma"])}
        y, found = jax.device_get(
            value_and_gradients(arrays, fixed, jnp.asarray(data["cotangent"], dtype))
        )
    assert y.dtype == dtype
    assert_near(y, data["y"], tolerance)
    for key, value in grads.items():
        assert_near(found[key], value, tolerance, key)


@pytest.mark.parametrize(
    ("length", "options", "extra"),
    [
        (1, {"k_y": 2}, {}),
        (1, {"k_y": 1}, {"lag": 2}),
        (2, {}, {"m_y": 1.0, "lag": 2}),
        (3, {"k_y": 32}, {}),
        (7, {"k_y": 1, "k_u": 9}, {}),
        (7, {"minus": False}, {"m_y": 1.0, "lag": 2}),
        (64, {"k_y": 32}, {}),
        (64, {"batch": 1, "minus": False, "k_u": 1}, {}),
        (64, {}, {"m_y": 1.0, "lag": 2}),
        (33, {}, {"m_y": 0.9, "lag": 2}),
        (33, {}, {"m_y": 0.9, "lag": 1}),
        (33, {}, {"m_y": 0.0, "lag": 1}),
        (33, {"k_y": 1}, {"lag": 2}),
        (33, {"k_y": 3}, {"lag": 2}),
    ],
)
def test_stu_equals_loop(length, options, extra):
    arguments = random_arguments(length, **options)
    with jax.enable_x64(True):
        fast = jax.jit(partial(stu, **extra))(
            **{key: jnp.asarray(x) for key, x in arguments.items()}
        )
    assert_near(fast, stu_by_loop(**arguments, **extra), 1e-12)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(("alpha", "lag"), [(1.0, 2), (0.9, 2), (0.9, 1), (1.0, 1), (0.0, 1)])
def test_a_number_is_the_feedback_of_a_multiple_of_the_identity(alpha, lag):
    arguments = random_arguments(33)
    with jax.enable_x64(True):
        arrays = {key: jnp.asarray(x) for key, x in arguments.items()}
        identity = jnp.zeros((lag, 4, 4)).at[-1].set(alpha * jnp.eye(4))
        cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 4)))
        number = jax.device_get(value_and_gradients(arrays, {}, cotangent, alpha=alpha, lag=lag))
        matrices = jax.device_get(value_and_gradients(arrays, {"m_y": identity}, cotangent))
    assert_near(number[0], matrices[0], 1e-12)
    for key in arrays:
        assert_near(number[1][key], matrices[1][key], 1e-11, key)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("num_matrices", [0, 3, 4, 64, None])
def test_orders_and_frequency_blocks_change_nothing(num_matrices, monkeypatch):
    """Values and all gradients equal autodiff of the definition, in blocks of any size."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        u, basis, m = (jnp.asarray(rng.normal(size=s)) for s in [(2, 11, 3), (11, 5), (5, 3, 4)])
        cotangent = jnp.asarray(rng.normal(size=(2, 11, 4)))

        def definition(u, basis, m):
            t = jnp.arange(11)
            toeplitz = jnp.where((t[:, None] >= t[None])[..., None], basis[t[:, None] - t[None]], 0)
            return jnp.einsum("tsj,bsd,jdo->bto", toeplitz, u, m)

        def with_gradients(function):
            return jax.jit(lambda *x: (function(*x), jax.vjp(function, *x)[1](cotangent)))(
                u, basis, m
            )

        monkeypatch.setattr(module, "basis_first", lambda *shape: num_matrices is None)
        monkeypatch.setattr(module, "_block_bytes", lambda: (num_matrices or 0) * 2 * 3 * 4 * 8)
        monkeypatch.setattr(module, "_FEWEST_FREQUENCIES", 1)
        fast, slow = with_gradients(causal_convolution), with_gradients(definition)
        jax.tree.map(lambda ours, reference: assert_near(ours, reference, 1e-12), fast, slow)


def test_wide_single_sequences_take_the_published_order():
    assert basis_first(1, 1024, 51, 512)
    assert not basis_first(1, 1024, 51, 64)
    assert not basis_first(16, 1024, 51, 512)


@pytest.mark.parametrize("first", [True, False])
def test_features_of_all_filters_are_never_held(first, monkeypatch):
    """Nothing in forward or backward is as large as the (B, L, K, D) of the published order."""
    monkeypatch.setattr(module, "basis_first", lambda *shape: first)
    shapes = [(4, 256, 8), (256, 48), (48, 8, 8)]
    u, basis, m = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def loss(*x):
        return jnp.sum(causal_convolution(*x) ** 2)

    memory = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(u, basis, m).compile().memory_analysis()
    )
    assert memory.temp_size_in_bytes < 4 * 256 * 48 * 8 * 4


@pytest.mark.parametrize("order", [True, False])
def test_bfloat16_products_are_summed_in_float32(order, monkeypatch):
    """As far off as rounding the factors makes it, and not growing with the number of terms."""
    monkeypatch.setattr(module, "basis_first", lambda *shape: order)
    rng = np.random.default_rng(0)
    u, basis, m = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 512, 64), (512, 5), (5, 64, 64)]
    )
    exact, rounded = (
        causal_convolution(u, basis, m, products) for products in (None, jnp.bfloat16)
    )
    error = np.sqrt(np.mean((exact - rounded) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 2**-8


@pytest.mark.parametrize(("length", "k_y"), [(1024, 2), (1024, 32), (16_384, 2), (16_384, 32)])
def test_feedback_on_accelerators_is_shallow(length, k_y):
    """At most L/16 dependent steps of a loop."""
    x, m_y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, length, 4), (k_y, 4, 4)])
    jaxpr = jax.make_jaxpr(feedback_by_chunks)(x, m_y)
    loops = [equation for equation in jaxpr.eqns if equation.primitive.name in ("scan", "while")]
    assert 0 < sum(equation.params["length"] for equation in loops) <= length // 16


@pytest.mark.fast_variants(3)
@pytest.mark.parametrize(
    ("length", "k_y"), [(2, 1), (3, 2), (7, 3), (64, 1), (65, 5), (65, 32), (32, 32), (200, 2)]
)
def test_feedback_orders_agree(length, k_y):
    rng = np.random.default_rng(length)
    x, m_y = rng.normal(size=(2, length, 3)), rng.normal(size=(k_y, 3, 3)) / k_y
    y = x.copy()
    for t in range(length):
        for j in range(min(k_y, t)):
            y[:, t] += y[:, t - 1 - j] @ m_y[j]
    with jax.enable_x64(True):
        steps, chunks = (
            jax.jit(f)(jnp.asarray(x), jnp.asarray(m_y))
            for f in (feedback_by_steps, feedback_by_chunks)
        )
    assert_near(steps, y, 1e-12)
    assert_near(chunks, y, 1e-12)


def test_feedback_gradients_equal_autodiff_of_the_chunks():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, m_y = (
            jnp.asarray(rng.normal(size=(2, 9, 3))),
            jnp.asarray(rng.normal(size=(4, 3, 3)) / 4),
        )
        fast, slow = (
            jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 3), (0, 1)))(x, m_y)
            for f in (feedback, feedback_by_chunks)
        )
        for ours, reference in zip(fast, slow, strict=True):
            assert_near(ours, reference, 1e-12)


def test_bfloat16_inputs_keep_their_dtype_and_lose_no_more_than_rounding():
    arguments = random_arguments(64)
    u = jnp.asarray(arguments["u"], jnp.bfloat16)
    arrays = {key: jnp.asarray(x, jnp.float32) for key, x in arguments.items()} | {"u": u}
    with jax.numpy_dtype_promotion("strict"):
        y = stu(**arrays)
    assert y.dtype == jnp.bfloat16
    assert_near(
        np.asarray(y, np.float64),
        stu_by_loop(**arguments | {"u": np.asarray(u, np.float64)}),
        2**-7,
    )


def test_filters_may_be_numpy_constants_under_jit():
    arguments = random_arguments(64)
    fixed = {key: arguments.pop(key) for key in ("phi", "sigma")}
    with jax.enable_x64(True):
        y = jax.jit(partial(stu, **fixed))(**{key: jnp.asarray(x) for key, x in arguments.items()})
    assert_near(y, stu_by_loop(**arguments, **fixed), 1e-12)


def test_short_filters_are_refused():
    arguments = random_arguments(10) | {"u": np.zeros((2, 16, 3))}
    with pytest.raises(ValueError, match=r"length 15 and the input 16; set task\.seq_len to 16"):
        stu(**{key: jnp.asarray(x, jnp.float32) for key, x in arguments.items()})


@pytest.mark.fast_variants(3)
@pytest.mark.parametrize(("alpha", "lag"), [(0.0, 1), (0.9, 1), (1.0, 2)])
@pytest.mark.parametrize("negative", [False, True])
def test_feature_moments_are_those_of_the_features_for_white_input(alpha, lag, negative):
    length, num, k_u = 12, 3, 2
    sigma, phi = spectral_filters(length, num)
    count = num * (1 + negative) + k_u
    # the responses to an impulse, one feature at a time, are the features' weights of the inputs
    parts = np.split(np.eye(count)[:, :, None, None], [num, count - k_u], axis=1)
    impulse = np.eye(length, 1)[None]
    with jax.enable_x64(True):
        responses = np.stack(
            [
                stu(
                    jnp.asarray(impulse),
                    phi,
                    sigma,
                    m_u=jnp.asarray(m_u),
                    m_plus=jnp.asarray(m_plus[:num]),
                    m_minus=jnp.asarray(m_minus) if negative else None,
                    m_y=alpha,
                    lag=lag,
                )[0, :, 0]
                for m_plus, m_minus, m_u in zip(*parts, strict=True)
            ],
            axis=1,
        )
    expected = np.zeros((count, count))
    for time in range(length):
        for age in range(time + 1):
            expected += np.outer(responses[age], responses[age]) / length
    found = feature_moments(phi, sigma, k_u, negative, alpha, lag)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_inverse_square_root_whitens_and_its_floor_bounds_it():
    values = np.array([1e-9, 1e-3, 0.5, 4.0])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    moments = rotation * values @ rotation.T
    whitener = inverse_power(moments, 0.5, floor=1e-6)
    white = whitener @ moments @ whitener
    np.testing.assert_allclose(np.linalg.eigvalsh(white), [1e-9 / 4e-6, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(inverse_power(moments, 0.25))[0], 4**-0.25)
