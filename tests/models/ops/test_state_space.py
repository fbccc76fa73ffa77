"""HiPPO, discretization and kernels against golden values, dense matrices and loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from models.ops.fft_convolution import fft_convolution, smooth_size
from models.ops.state_space import discretize, hippo_normal, log_uniform_steps, vandermonde_kernel

GOLDEN = Path(__file__).parents[2] / "golden"


def random_system(channels=3, states=5, seed=0):
    """Stable eigenvalues and steps of the sizes that S4D starts with, float64."""
    rng = np.random.default_rng(seed)
    lam = -rng.uniform(0.3, 0.7, (channels, states)) + 1j * rng.uniform(0, 100, (channels, states))
    return lam, np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (channels, states)))


@pytest.mark.parametrize("size", [8, 16, 64])
def test_hippo_matches_the_published_eigenvalues(size):
    golden = np.load(GOLDEN / "hippo_legs.npz")
    lam, vectors = hippo_normal(size)
    np.testing.assert_allclose(lam, golden[f"Lambda_{size}"], rtol=1e-10)
    np.testing.assert_allclose(golden[f"B_{size}"], np.sqrt(2 * np.arange(size) + 1), rtol=1e-12)
    # and it is the matrix of the paper, entry by entry
    legs = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1):
            legs[i, j] = -np.sqrt((2 * i + 1) * (2 * j + 1)) if i > j else -(i + 1)
    p = np.sqrt(np.arange(size) + 0.5)
    np.testing.assert_allclose(
        (vectors * lam) @ vectors.conj().T, legs + np.outer(p, p), atol=1e-9 * size**2
    )


def test_zero_order_hold_is_the_matrix_exponential():
    """[A B; 0 0] holds u constant over a step."""
    lam, step = random_system(1, 4)
    lam, step = lam[0], step[0]
    with jax.enable_x64(True):
        log_lam_bar, factor = discretize(jnp.asarray(lam), jnp.asarray(step), "zoh")
    for n in range(4):
        held = expm(step[n] * np.array([[lam[n], 1], [0, 0]]))
        np.testing.assert_allclose(
            [np.exp(np.asarray(log_lam_bar)[n]), factor[n]], held[0], rtol=1e-12
        )


def test_bilinear_is_the_trapezoidal_rule():
    """(x_k - x_{k-1}) / Delta = lam (x_k + x_{k-1}) / 2 + b u_k."""
    lam, step = random_system()
    with jax.enable_x64(True):
        log_lam_bar, factor = discretize(jnp.asarray(lam), jnp.asarray(step), "bilinear")
    before, u = 0.3 - 0.4j, 0.7
    after = np.exp(np.asarray(log_lam_bar)) * before + np.asarray(factor) * u
    np.testing.assert_allclose((after - before) / step, lam * (after + before) / 2 + u, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "rule"), [("s5_causal_zoh", "zoh"), ("s5_bidirectional_bilinear", "bilinear")]
)
def test_discretization_matches_the_published_code(name, rule):
    golden = np.load(GOLDEN / f"{name}.npz")
    with jax.enable_x64(True):
        log_lam_bar, factor = discretize(
            jnp.asarray(golden["Lambda"]), jnp.asarray(golden["dt"]), rule
        )
        np.testing.assert_allclose(jnp.exp(log_lam_bar), golden["Lambda_bar"], rtol=1e-12)
        np.testing.assert_allclose(factor[:, None] * golden["B"], golden["B_bar"], rtol=1e-12)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_slow_states_keep_their_digits_in_float32(rule):
    """1 - |lam_bar| is 5e-8 here, less than float32 resolves next to 1."""
    lam, step = np.array([-0.5 + 1j]), np.array([1e-7])
    single = discretize(jnp.asarray(lam, jnp.complex64), jnp.asarray(step, jnp.float32), rule)
    np.testing.assert_allclose(single[0], lam * step, rtol=1e-6)
    np.testing.assert_allclose(single[1], step, rtol=1e-6)


def test_steps_are_uniform_in_their_logarithm():
    steps = np.asarray(log_uniform_steps(jax.random.key(0), (20_000,), 1e-3, 1e-1))
    quantiles = np.quantile(steps, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, np.linspace(np.log(1e-3), np.log(1e-1), 5), atol=0.05)


@pytest.mark.parametrize(("low", "high"), [(0, 0.1), (0.1, 0.01), (0.1, float("inf"))])
def test_steps_that_are_none_are_refused(low, high):
    with pytest.raises(ValueError, match=r"model\.dt_min"):
        log_uniform_steps(jax.random.key(0), (1,), low, high)


@pytest.mark.parametrize("length", [1, 2, 3, 10, 64, 101])
def test_kernel_equals_powers_one_after_the_other(length):
    lam, step = random_system()
    weights = np.random.default_rng(1).normal(size=(2, 3, 5, 2)) @ [1, 1j]
    expected, power = [], np.ones_like(lam)
    for _ in range(length):
        expected.append(2 * (weights * power).sum(axis=-1).real)
        power = power * np.exp(lam * step)
    with jax.enable_x64(True):
        kernel = vandermonde_kernel(jnp.asarray(weights), jnp.asarray(lam * step), length)
    np.testing.assert_allclose(kernel, np.stack(expected, axis=-1), atol=1e-11)


def test_kernel_in_float32_is_near_at_length_16384():
    lam, step = random_system()
    weights = np.random.default_rng(1).normal(size=(1, 3, 5, 2)) @ [1, 1j]
    with jax.enable_x64(True):
        exact = vandermonde_kernel(jnp.asarray(weights), jnp.asarray(lam * step), 16384)
    single = vandermonde_kernel(
        jnp.asarray(weights, jnp.complex64), jnp.asarray(lam * step, jnp.complex64), 16384
    )
    np.testing.assert_allclose(single, exact, atol=1e-5 * np.abs(exact).max())


def convolution_by_loop(x, kernel, back):
    y = np.zeros_like(x)
    length = x.shape[1]
    for t in range(length):
        for s in range(length):
            if s <= t:
                y[:, t] += kernel[:, t - s] * x[:, s]
            elif back is not None:
                y[:, t] += back[:, s - t - 1] * x[:, s]
    return y


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("both", [False, True])
def test_fft_convolution_equals_a_loop(length, both):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, length, 3)), rng.normal(size=(3, length))
    back = rng.normal(size=(3, length)) if both else None
    with jax.enable_x64(True):
        y = fft_convolution(
            jnp.asarray(x), jnp.asarray(kernel), None if back is None else jnp.asarray(back)
        )
    np.testing.assert_allclose(y, convolution_by_loop(x, kernel, back), atol=1e-12)


def test_transform_sizes_are_smooth():
    assert [smooth_size(n) for n in (1, 7, 13, 2047, 32767)] == [2, 8, 16, 2048, 32768]
