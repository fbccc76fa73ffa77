"""AdamW with groups beside a loop over scalars; averaged weights, smoothed labels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optim_config import CONFIG, PARAMS
from tiny import TINY

import lra
from lra.config.build import build_task, data_arguments
from lra.config.cost import abstract_model
from lra.data.store import prepare
from lra.errors import ConfigError
from lra.training.optimizer import adamw, assign_groups, ema_update
from lra.training.prefetch import on_device
from lra.training.setup import Setup
from lra.training.state import eval_weights, initial_state
from lra.training.step import cross_entropy, make_step_functions


def rate(step, steps=10):
    if step < 2:
        return 1e-4 + (0.01 - 1e-4) * step / 2
    return 1e-3 + (0.01 - 1e-3) * 0.5 * (1 + np.cos(np.pi * (step - 2) / 8))


def by_loop(x, grads, factor, decay):
    """The value of a scalar parameter after AdamW steps with these gradients."""
    m = v = 0.0
    for t, g in enumerate(grads):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        adam = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.99 ** (t + 1))) + 1e-8)
        x = x - rate(t) * factor * (adam + decay * x)
    return x


def test_official_stu_decays_all_parameters_but_its_feedback():
    cfg = lra.compose([*TINY, "model=stu_official", "optim.weight_decay=0.1"])
    params = nnx.state(abstract_model(cfg, build_task(cfg)), nnx.Param)
    groups = {group.name: group for group in assign_groups(cfg.optim, params)[0]}
    assert {name: group.weight_decay for name, group in groups.items()} == {
        "feedback": 0.0,
        "default": 0.1,
    }
    assert all(path.endswith("m_y") for path in groups["feedback"].paths)


def test_gradients_are_not_clipped_by_default():
    assert lra.compose().optim.clip is None


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
    """Adam ignores a constant scale of the gradients, so the norms are above, below, above."""
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


def test_first_matching_group_takes_the_parameter():
    both = {
        "a": {"match": "m_y", "lr_factor": 1.0, "weight_decay": 0.0},
        "b": {"match": "m_", "lr_factor": 2.0, "weight_decay": 0.0},
    }
    with pytest.raises(
        ConfigError,
        match=r"optim\.groups\.b\.match='m_' matches no parameter; .* are: kernel, mixer/bias",
    ):
        adamw(CONFIG | {"groups": both}, 10, PARAMS)


# ---- averaged weights


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_average_is_a_weighted_mean(decay):
    values = np.random.default_rng(0).normal(size=(50, 3)) + 5
    average = {"w": jnp.full(3, 100.0)}  # has no effect
    for count, value in enumerate(values, 1):
        average = ema_update(
            decay, average, {"w": jnp.asarray(value, jnp.float32)}, jnp.int32(count)
        )
        weights = decay ** np.arange(count)[::-1]
        np.testing.assert_allclose(
            average["w"], weights @ values[:count] / weights.sum(), rtol=1e-5
        )


@pytest.fixture(scope="module")
def steps(data_root):
    """Returns a function of overrides that gives the states after 1, 2, ... steps."""

    def make(*overrides):
        cfg = lra.compose(
            [*TINY, "backbone.depth=1", "model=lru", f"data.root={data_root}", *overrides]
        )
        setup = Setup(cfg)
        data = on_device(prepare(setup.task, **data_arguments(cfg)).splits["train"])
        run, (state, best) = make_step_functions(setup, 4).train_steps, initial_state(setup)
        state, states = state._replace(params=best.params, batch_stats=best.batch_stats), []
        for until in range(1, 6):
            state = run(state, setup.constants, data, jnp.int32(until))
            states.append(jax.device_get(state))
        return states

    return make


@pytest.mark.slow
def test_averages_include_batch_stats_and_do_not_change_training(steps):
    plain, states = steps("backbone.norm=batch"), steps("backbone.norm=batch", "optim.ema=0.8")
    assert all(state.ema_params is None for state in plain)
    weights = 0.8 ** np.arange(5)[::-1]
    for a, b in zip(plain, states, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a[:6], b[:6])
    values = [jax.tree.leaves(eval_weights(state)) for state in plain]
    found = jax.tree.leaves(eval_weights(states[-1]))
    assert len(found) == len(values[0])
    for leaf, *each in zip(found, *values, strict=True):
        expected = np.tensordot(weights, np.asarray(each, np.float64), 1) / weights.sum()
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


# ---- label smoothing


def test_smoothed_cross_entropy_equals_a_loop():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 3, 5)), rng.integers(0, 5, (4, 3))
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.1)
    for index in np.ndindex(4, 3):
        logp = logits[index] - np.log(np.exp(logits[index]).sum())
        targets = [0.9 * (k == labels[index]) + 0.1 / 5 for k in range(5)]
        assert found[index] == pytest.approx(
            -sum(t * p for t, p in zip(targets, logp, strict=True)), rel=1e-5
        )
    plain = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits), jnp.asarray(labels)
    )
    np.testing.assert_array_equal(
        cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.0), plain
    )
    # equal logits, as of an untrained model
    assert cross_entropy(jnp.zeros(10), jnp.int32(3), 0.3) == pytest.approx(math.log(10))


# ---- checks of values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.schedule=cosinus",
            "optim.schedule=cosinus is unknown; choose one of cosine, linear, rsqrt, constant, "
            "plateau",
        ),
        (
            "optim.plateau=3",
            "optim.plateau=3 must have exactly metric, factor, patience and threshold",
        ),
        (
            "optim.plateau.metric=f1",
            "optim.plateau.metric=f1 is unknown; choose one of accuracy, loss",
        ),
        ("optim.plateau.factor=1", r"optim.plateau.factor=1 must be a number in \(0, 1\)"),
        ("optim.plateau.patience=0.5", "optim.plateau.patience=0.5 must be a whole number"),
        ("optim.plateau.threshold=1", "optim.plateau.threshold=1 must be"),
        ("optim.ema=1", r"optim.ema=1 must be a number in \(0, 1\) or null"),
        ("optim.lr=0", "optim.lr=0 must be a number above 0"),
        ("optim.lr=fast", "optim.lr=fast must be a number above 0"),
        ("optim.warmup=1.5", "optim.warmup=1.5 must be a number"),
        ("optim.weight_decay=-0.1", "optim.weight_decay=-0.1 must be a number"),
        ("optim.label_smoothing=1", "optim.label_smoothing=1 must be a number"),
        (
            "trainer.early_stopping=0",
            "trainer.early_stopping=0 must be a whole number of at least 1 or null",
        ),
        ("trainer.chance_after=2", "trainer.chance_after=2 must be a number in"),
        (
            "trainer.first_loss_tolerance=1",
            "trainer.first_loss_tolerance=1 must be a number above 1 or null",
        ),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(tiny, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Setup(lra.compose([*tiny, override]))
    assert "\n" not in str(caught.value)
