"""AdamW with groups, against a plain loop over scalars."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_config import CONFIG, PARAMS

from lra.errors import ConfigError
from lra.training.optimizer import adamw
from lra.training.schedules import schedule


def rate(step, steps=10):
    if step < 2:
        return 1e-4 + (0.01 - 1e-4) * step / 2
    return 1e-3 + (0.01 - 1e-3) * 0.5 * (1 + np.cos(np.pi * (step - 2) / 8))


def by_loop(x, grads, factor, decay):
    """One scalar's value after AdamW has seen its gradients."""
    m = v = 0.0
    for t, g in enumerate(grads):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        adam = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.99 ** (t + 1))) + 1e-8)
        x = x - rate(t) * factor * (adam + decay * x)
    return x


@pytest.mark.parametrize("step", range(11))
def test_schedule_is_warm_up_then_cosine(step):
    assert float(schedule(CONFIG, 10)(step)) == pytest.approx(rate(step), rel=1e-5)


def test_updates_equal_a_loop_over_scalars():
    tx, groups = adamw(CONFIG, 10, PARAMS)
    assert [(g.name, g.num_params) for g in groups] == [
        ("slow", 2),
        ("no_decay", 1),
        ("default", 1),
    ]
    grads = [1.0, -0.5, 2.0, 0.25]
    params, state = PARAMS, tx.init(PARAMS)
    for g in grads:
        updates, state = tx.update(
            {"mixer": {"m_y": g * jnp.ones(2), "bias": g * jnp.ones(1)}, "kernel": g * jnp.ones(1)},
            state,
            params,
        )
        params = optax.apply_updates(params, updates)

    np.testing.assert_allclose(
        params["mixer"]["m_y"],
        [by_loop(1.0, grads, 0.1, 0.0), by_loop(-2.0, grads, 0.1, 0.0)],
        rtol=1e-5,
    )
    np.testing.assert_allclose(params["mixer"]["bias"], [by_loop(0.5, grads, 1.0, 0.0)], rtol=1e-5)
    np.testing.assert_allclose(params["kernel"], [by_loop(3.0, grads, 1.0, 0.1)], rtol=1e-5)


def test_clipping_scales_all_gradients_by_their_common_norm():
    """Adam is blind to a gradient's scale but not to a change of it, so the steps differ in size: above, below, above."""
    clip, steps = (
        1.5,
        [(30.0, 4.0, -2.0), (0.3, -0.2, 0.1), (-1.0, 5.0, 0.5)],
    )  # m_y (two entries), bias, kernel
    tx, _ = adamw(CONFIG | {"clip": clip}, 10, PARAMS)
    params, state = PARAMS, tx.init(PARAMS)
    for m_y, bias, kernel in steps:
        grads = {
            "mixer": {"m_y": m_y * jnp.ones(2), "bias": bias * jnp.ones(1)},
            "kernel": kernel * jnp.ones(1),
        }
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)

    norms = [np.sqrt(2 * m_y**2 + bias**2 + kernel**2) for m_y, bias, kernel in steps]
    m_y, bias, kernel = zip(
        *(np.array(s) * min(1, clip / n) for s, n in zip(steps, norms, strict=True)), strict=True
    )
    np.testing.assert_allclose(
        params["mixer"]["m_y"], [by_loop(x, m_y, 0.1, 0.0) for x in (1.0, -2.0)], rtol=1e-5
    )
    np.testing.assert_allclose(params["mixer"]["bias"], [by_loop(0.5, bias, 1.0, 0.0)], rtol=1e-5)
    np.testing.assert_allclose(params["kernel"], [by_loop(3.0, kernel, 1.0, 0.1)], rtol=1e-5)


def test_first_group_that_fits_takes_the_parameter():
    both = {
        "a": {"match": "m_y", "lr_factor": 1.0, "weight_decay": 0.0},
        "b": {"match": "m_", "lr_factor": 2.0, "weight_decay": 0.0},
    }
    with pytest.raises(
        ConfigError,
        match=r"optim\.groups\.b\.match='m_' fits no parameter; the paths are: kernel, mixer/bias",
    ):
        adamw(CONFIG | {"groups": both}, 10, PARAMS)
