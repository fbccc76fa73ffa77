"""Diagonal recurrences against a float64 loop, its autodiff and the published LRU."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.recurrence import linear_recurrence, states_by_blocks, states_by_steps

GOLDEN = Path(__file__).parents[2] / "golden"
ORDERS = {"chosen": linear_recurrence, "steps": states_by_steps, "blocks": states_by_blocks}


def states_by_loop(lam, bu, reverse=False):
    h, states = np.zeros_like(bu[:, 0]), np.zeros_like(bu)
    for t in range(bu.shape[1])[:: -1 if reverse else 1]:
        h = lam * h + bu[:, t]
        states[:, t] = h
    return states


def random_system(length, kind="complex", batch=2, states=5):
    rng = np.random.default_rng(length)
    lam, bu = 0.95 * rng.uniform(-1, 1, states), rng.normal(size=(batch, length, states))
    if kind == "complex":
        lam, bu = lam * np.exp(1j * rng.uniform(0, 7, states)), bu + 1j * rng.normal(size=bu.shape)
    return lam, bu


@pytest.mark.fast_variants(20)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 600])
def test_states_equal_loop(order, kind, reverse, length):
    lam, bu = random_system(length, kind)
    with jax.enable_x64(True):
        fast = jax.jit(ORDERS[order], static_argnames="reverse")(
            jnp.asarray(lam), jnp.asarray(bu), reverse=reverse
        )
    assert fast.dtype == bu.dtype
    np.testing.assert_allclose(fast, states_by_loop(lam, bu, reverse), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("order", "tolerance"), [("steps", 1e-5), ("blocks", 3e-4)])
def test_slow_states_keep_their_accuracy_over_long_inputs(order, tolerance):
    """complex64 at L = 16,384, states that forget in 10,000 steps."""
    rng = np.random.default_rng(0)
    lam = (0.9999 * np.exp(1j * rng.uniform(0, 6, 4))).astype(np.complex64)
    bu = rng.normal(size=(1, 16_384, 4)).astype(np.complex64)
    exact = states_by_loop(lam.astype(complex), bu.astype(complex))
    found = ORDERS[order](jnp.asarray(lam), jnp.asarray(bu))
    assert np.abs(found - exact).max() < tolerance * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_equal_autodiff_of_a_scan(kind, reverse):
    lam, bu = random_system(7, kind)
    _, cotangent = random_system(7, kind)
    with jax.enable_x64(True):
        arrays = jnp.asarray(lam), jnp.asarray(bu)
        fast, slow = (
            jax.jit(
                lambda *x, f=f: jax.vjp(lambda *y: f(*y, reverse), *x)[1](
                    jnp.asarray(cotangent) ** 2
                )
            )(*arrays)
            for f in (linear_recurrence, states_by_blocks)
        )
        # states_by_blocks is held to the loop above, and its gradients come from JAX alone
        for ours, reference in zip(fast, slow, strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-12, rtol=0)


def test_second_derivatives_equal_autodiff_of_a_scan():
    lam, bu = random_system(7, "real")
    with jax.enable_x64(True):
        hessians = [
            jax.jit(jax.jacrev(jax.grad(lambda x, f=f: jnp.sum(f(x, jnp.asarray(bu)) ** 3))))(
                jnp.asarray(lam)
            )
            for f in (linear_recurrence, states_by_blocks)
        ]
        np.testing.assert_allclose(*hessians, rtol=1e-10)


def test_vmap_runs_systems_side_by_side():
    systems = [random_system(9) for _ in range(3)]
    systems = [(lam * scale, bu) for (lam, bu), scale in zip(systems, (1, 0.5, 0.1), strict=True)]
    with jax.enable_x64(True):
        lam, bu = (jnp.asarray(np.stack(x)) for x in zip(*systems, strict=True))
        fast = jax.jit(jax.vmap(linear_recurrence))(lam, bu)
    for ours, system in zip(fast, systems, strict=True):
        np.testing.assert_allclose(ours, states_by_loop(*system), atol=1e-12)


@pytest.mark.parametrize(
    ("lam_dtype", "bu_dtype", "expected"),
    [
        ("float32", "float32", "float32"),
        ("complex64", "float32", "complex64"),
        ("float32", "complex64", "complex64"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_states_have_the_precision_of_the_input(lam_dtype, bu_dtype, expected):
    lam, bu = random_system(64, "real")
    with jax.numpy_dtype_promotion("strict"):
        states = linear_recurrence(jnp.asarray(lam, lam_dtype), jnp.asarray(bu, bu_dtype))
    assert states.dtype == expected
    rounded = np.asarray(jnp.asarray(bu, bu_dtype)).astype(complex)
    error = np.abs(np.asarray(states).astype(complex) - states_by_loop(lam, rounded)).max()
    assert error < (0.05 if expected == "bfloat16" else 1e-5)


def test_disagreeing_sizes_are_refused():
    with pytest.raises(ValueError, match=r"lam has 3 states and bu has 4.*model\.state_size"):
        linear_recurrence(jnp.ones(3), jnp.ones((1, 5, 4)))


def lru(p, u):
    """The published LRU, from its parameters."""
    lam = jnp.exp(jax.lax.complex(-jnp.exp(p["nu_log"]), jnp.exp(p["theta_log"])))
    b = jax.lax.complex(p["B_re"], p["B_im"]) * jnp.exp(p["gamma_log"])[:, None]
    states = linear_recurrence(lam, (u @ b.T)[None])[0]
    return (states @ jax.lax.complex(p["C_re"], p["C_im"]).T).real + p["D"][None] * u


@pytest.mark.parametrize("name", ["small", "ring"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_lru_equals_published_code(name, dtype, tolerance):
    data = np.load(GOLDEN / f"lru_{name}.npz")
    names = [key.removeprefix("grad_") for key in data if key.startswith("grad_")]
    with jax.enable_x64(True):
        parameters = {key: jnp.asarray(data[key], dtype) for key in names}
        u, cotangent = (jnp.asarray(data[key], dtype) for key in ("u", "cotangent"))
        y, grads = jax.device_get(
            jax.jit(lambda p: (lru(p, u), jax.vjp(lambda q: lru(q, u), p)[1](cotangent)[0]))(
                parameters
            )
        )
    assert y.dtype == dtype
    assert np.abs(y - data["y"]).max() < tolerance * np.abs(data["y"]).max()
    for key in names:
        expected = data[f"grad_{key}"]
        assert np.abs(grads[key] - expected).max() < tolerance * np.abs(expected).max(), key
