"""Systems, their closed forms and the Kalman predictor, against loops and definitions."""

import numpy as np
import pytest

from lra.studies.filters import ar_error, memory_rows
from lra.studies.gap import make_system
from lra.studies.lds import (
    PRINTED,
    System,
    kalman_predictions,
    least_squares_taps,
    random_symmetric,
    real_form,
)
from models.lds_layers import stu_taps, with_feedback

SYSTEMS = {
    "printed": PRINTED,
    "random": random_symmetric(np.random.default_rng(1), 5, 2),
    "complex": make_system("complex", 0.1),
}


def by_definition(system: System, u):
    h, y = np.zeros(len(system.lam), complex), []
    for u_t in u:
        h = np.diag(system.lam) @ h + system.b @ u_t
        y.append((system.c @ h).real + system.d @ u_t)
    return np.stack(y)


@pytest.mark.parametrize("name", SYSTEMS)
def test_outputs_follow_the_definition(name):
    system = SYSTEMS[name]
    u = np.random.default_rng(2).normal(size=(30, system.b.shape[1]))
    expected = by_definition(system, u)
    np.testing.assert_allclose(system.outputs(u), expected, atol=1e-12)
    h = system.impulse_response(30)
    by_convolution = [sum(u[t - i] @ h[i] for i in range(t + 1)) for t in range(30)]
    np.testing.assert_allclose(by_convolution, expected, atol=1e-12)
    a, b, c = real_form(system)
    real = by_definition(System(np.ones(1), b, c, system.d), u[:1])
    np.testing.assert_allclose(real, expected[:1], atol=1e-12)
    np.testing.assert_allclose(c @ a @ b, h[1].T, atol=1e-12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_kalman_predictor_is_the_conditional_mean(name):
    """The mean of y_t given the earlier outputs, from the joint normal distribution of all."""
    system, noise, start, length = SYSTEMS[name], 0.3, 0.7, 6
    rng = np.random.default_rng(3)
    u = rng.normal(size=(length, system.b.shape[1]))
    mean = by_definition(system, u)
    y = mean + rng.normal(size=mean.shape)
    a, _, c = real_form(system)
    responses = np.concatenate([c @ np.linalg.matrix_power(a, t + 1) for t in range(length)])
    joint = start * responses @ responses.T + noise * np.eye(len(responses))
    expected, width = mean.copy(), y.shape[1]
    for t in range(1, length):
        past, now = slice(0, t * width), slice(t * width, (t + 1) * width)
        weights = joint[now, past] @ np.linalg.inv(joint[past, past])
        expected[t] += weights @ (y - mean).ravel()[past]
    np.testing.assert_allclose(kalman_predictions(system, u, y, noise, start), expected, atol=1e-9)


def test_kalman_predictor_of_a_known_start_without_noise_is_exact():
    u = np.random.default_rng(4).normal(size=(50, 3))
    y = PRINTED.outputs(u)
    np.testing.assert_allclose(kalman_predictions(PRINTED, u, y, 0.0), y, atol=1e-12)


def test_least_squares_taps_have_the_least_expected_error():
    """The error agrees with random inputs, and no other matrices have a smaller one."""
    length, rng = 40, np.random.default_rng(5)
    h, taps = PRINTED.impulse_response(length), with_feedback(stu_taps(length, 1))
    m, error = least_squares_taps(taps, h)

    def mean_error(m):
        gap = h - np.einsum("lj,jio->lio", taps, m)
        u = rng.normal(size=(4000, length, 3))
        late = [np.einsum("sti,tio->so", u[:, t::-1], gap[: t + 1]) for t in range(length)]
        return np.mean(np.sum(np.square(late), axis=(0, 2)))

    assert mean_error(m) == pytest.approx(error, rel=0.05)
    assert mean_error(m * 1.2) > 1.2 * error


def test_autoregression_of_order_d_is_exact():
    assert ar_error(np.random.default_rng(6), 4, 100) < 1e-9


def test_memory_of_taps_grows_with_the_gap_and_that_of_filters_does_not():
    rows = memory_rows(1024, 1e-3)
    assert rows[0]["input taps"] == pytest.approx(rows[0]["log(1/error) / delta"], rel=0.1)
    assert rows[-1]["input taps"] > 10 * rows[0]["input taps"]
    assert max(row["filters"] for row in rows) < 25
