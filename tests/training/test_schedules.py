"""Schedules, averaged weights, smoothed labels, early stopping, and the verdicts on a run, each beside a slow one."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_config import CONFIG, PARAMS
from run_checks import assert_same_run, final_state, folder_of, killed
from tiny import TINY

import lra
from lra.config.build import data_arguments
from lra.data.store import prepare
from lra.errors import ConfigError
from lra.report.tables import make_table
from lra.runs import sanity
from lra.runs.records import read_metrics
from lra.runs.run_folder import load_records
from lra.training import trainer
from lra.training.optimizer import adamw, ema_update
from lra.training.prefetch import on_device
from lra.training.schedules import plateau_scale, plateau_update, schedule
from lra.training.setup import Setup
from lra.training.state import Best, eval_weights, initial_state
from lra.training.step import compile_program, cross_entropy

# ---- schedules


def rate(kind, step, steps, warmup, lr=0.01, start=1e-4, end=1e-3):
    """The learning rate of a step in float64, from its formula."""
    w = round(warmup * steps)
    if step < w:
        return start + (lr - start) * step / w
    done = min((step - w) / max(steps - w, 1), 1)
    return {
        "cosine": end + (lr - end) * (1 + math.cos(math.pi * done)) / 2,
        "linear": lr + (end - lr) * done,
        "rsqrt": lr * math.sqrt(max(w, 1)) / math.sqrt(max(step, w, 1)),
        "constant": lr,
        "plateau": lr,
    }[kind]


@pytest.mark.parametrize("kind", ["cosine", "linear", "rsqrt", "constant", "plateau"])
def test_every_schedule_is_its_formula(kind):
    for steps, warmup in [(20, 0.3), (20, 0.0), (20, 1.0), (1000, 0.1)]:
        rates = schedule(CONFIG | {"schedule": kind, "warmup": warmup}, steps)(np.arange(steps + 1))
        expected = [rate(kind, step, steps, warmup) for step in range(steps + 1)]
        np.testing.assert_allclose(
            rates, expected, rtol=2e-6, atol=1e-8
        )  # of 0.01: optax sums in float32


def test_rsqrt_is_that_of_the_original_code():
    """base * min(1, step / W) / sqrt(max(step, W)), of which our lr is the value at W."""
    ours = schedule(
        CONFIG
        | {"schedule": "rsqrt", "lr": 0.05 / math.sqrt(1000), "lr_start": 0.0, "warmup": 0.2},
        5000,
    )
    theirs = [0.05 * min(1, step / 1000) / math.sqrt(max(step, 1000)) for step in range(5001)]
    np.testing.assert_allclose(ours(np.arange(5001)), theirs, rtol=2e-6, atol=1e-9)


class ReduceLROnPlateau:
    """PyTorch's, as its documentation says: mode and threshold_mode=rel."""

    def __init__(self, higher_is_better, factor, patience, threshold, least):
        self.sign, self.factor, self.patience, self.threshold = (
            higher_is_better,
            factor,
            patience,
            threshold,
        )
        self.least, self.scale, self.bad, self.best = least, 1.0, 0, None

    def step(self, value):
        gain = 1 + self.threshold if self.sign else 1 - self.threshold
        if self.best is None or (
            value > self.best * gain if self.sign else value < self.best * gain
        ):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.scale, self.bad = max(self.scale * self.factor, self.least), 0
        return self.scale


@pytest.mark.parametrize(
    ("metric", "patience", "threshold"),
    [("accuracy", 2, 0.02), ("loss", 0, 0.1), ("accuracy", 0, 0)],
)
def test_plateau_follows_validation_as_pytorch_does(metric, patience, threshold):
    rule = {"metric": metric, "factor": 0.5, "patience": patience, "threshold": threshold}
    cfg = CONFIG | {"schedule": "plateau", "plateau": rule, "lr_end": 0.01 * 0.2}
    tx, _ = adamw(cfg, 10, PARAMS)
    opt, slow = (
        tx.init(PARAMS),
        ReduceLROnPlateau(metric == "accuracy", 0.5, patience, threshold, 0.2),
    )
    rng = np.random.default_rng(0)
    values = np.repeat([0.0, 0.1, 0.3, 0.31, 0.5, 0.52], 4) + 0.005 * np.abs(
        rng.integers(-2, 3, 24)
    )
    values = [0.0, 0.0, *values] if metric == "accuracy" else 3 - values
    scales = []
    for value in values:
        opt = plateau_update(cfg, opt, {metric: float(value)})
        scales.append(plateau_scale(opt))
        assert scales[-1] == pytest.approx(slow.step(float(value)), rel=1e-6)
    assert 1 > min(scales) >= 0.2 - 1e-7
    assert len(set(scales)) > 1


def test_plateau_scales_every_group_and_no_other_schedule_does():
    steady, _ = adamw(CONFIG | {"schedule": "constant"}, 10, PARAMS)
    cfg = CONFIG | {"schedule": "plateau", "plateau": CONFIG["plateau"] | {"patience": 0}}
    tx, _ = adamw(cfg, 10, PARAMS)
    opt = tx.init(PARAMS)
    for _ in range(3):  # the first is the best so far
        opt = plateau_update(cfg, opt, {"accuracy": 0.5})
    updates, after = tx.update(PARAMS, opt, PARAMS)
    expected, other = steady.update(PARAMS, steady.init(PARAMS), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.25 * b, rtol=1e-6), updates, expected)
    assert plateau_scale(after) == 0.25
    assert plateau_scale(plateau_update(cfg, other, {"accuracy": 0.1})) == 1.0


# ---- averages and labels


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_average_weighs_a_value_by_its_age(decay):
    values = np.random.default_rng(0).normal(size=(50, 3)) + 5
    average = {"w": jnp.full(3, 100.0)}  # whatever it was
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
    """The states after 1, 2, ... steps of a run, from the state before the first."""

    def make(*overrides):
        cfg = lra.compose(
            [*TINY, "backbone.depth=1", "model=lru", f"data.root={data_root}", *overrides]
        )
        setup = Setup(cfg)
        data = on_device(prepare(setup.task, **data_arguments(cfg)).splits["train"])
        run, (state, best) = compile_program(setup, 4).run, initial_state(setup)
        state, states = state._replace(params=best.params, batch_stats=best.batch_stats), []
        for until in range(1, 6):
            state = run(state, setup.constants, data, jnp.int32(until))
            states.append(jax.device_get(state))
        return states

    return make


def test_averages_are_of_weights_and_statistics_and_change_no_step(steps):
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


def test_smoothed_labels_cost_what_a_loop_says():
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
    assert cross_entropy(jnp.zeros(10), jnp.int32(3), 0.3) == pytest.approx(
        math.log(10)
    )  # what an untrained model has


# ---- a run with all of it

ALL = [
    *(
        *TINY,
        "backbone.depth=1",
        "trainer.steps=40",
        "backbone.dropout=0.1",
        "trainer.eval_every=4",
        "trainer.checkpoint_every=10",
    ),
    *(
        "optim.schedule=plateau",
        "optim.plateau={factor: 0.5, patience: 0, threshold: 0.5}",
        "optim.warmup=0.1",
    ),
    *("optim.ema=0.9", "optim.label_smoothing=0.1", "trainer.early_stopping=4"),
]


EVALUATED = {}  # by step of the undisturbed run: ema_update and newest weights


@pytest.fixture(scope="module")
def whole(data_root, tmp_path_factory):
    overrides = [*ALL, f"data.root={data_root}"]
    here = [*overrides, f"output.root={tmp_path_factory.mktemp('whole')}"]
    evaluate = trainer.Run.evaluate

    def noted(self, step, state, best, val):
        EVALUATED[step] = jax.device_get((state.ema_params, (state.params, state.batch_stats)))
        return evaluate(self, step, state, best, val)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "evaluate", noted)
        return overrides, folder_of(here), lra.train(here)


def test_run_stops_after_evaluations_without_a_gain_and_counts_in_a_table(whole):
    _, folder, record = whole
    best, stopped = record["selection"]["step"], record["stopped_early"]
    assert stopped["step"] == record["step"] == best + 4 * 4 < 40
    assert (
        stopped["reason"]
        == f"trainer.early_stopping=4: no better validation accuracy than that of step {best}"
    )
    table = make_table(load_records([folder]))
    assert record["status"] == "finished"
    assert not any(line.startswith("Not counted") for line in table.remarks)
    assert [row["steps"] for row in table.long if row["kind"] == "ours"] == [record["step"]]


def test_weights_that_are_kept_are_the_averages(whole):
    overrides, folder, record = whole
    _, kept = final_state(overrides, folder).state
    average, newest = EVALUATED[record["selection"]["step"]]
    jax.tree.map(np.testing.assert_array_equal, tuple(kept), average)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (average, newest)), strict=True)
    )


def test_logged_rate_is_the_one_that_validation_left(whole):
    _, folder, _ = whole
    slow, scale, lr = ReduceLROnPlateau(True, 0.5, 0, 0.5, 1e-7 / 4e-3), 1.0, {}
    for row in read_metrics(folder):
        if "train/lr" in row:
            lr[row["step"]] = row["train/lr"]
            assert row["train/lr"] == pytest.approx(
                scale * rate("plateau", row["step"] - 1, 40, 0.1, lr=4e-3, start=1e-7),
                rel=1e-5,
                abs=1e-9,
            )
        else:
            scale = slow.step(row["val/accuracy"])
    assert lr[max(lr)] < 4e-3 / 2


def test_scores_are_of_true_labels(whole):
    _, folder, record = whole
    from lra.runs.records import read_predictions
    from lra.training.evaluation import score

    stored = read_predictions(folder)
    assert record["metrics"]["test"] == score(stored["logits"], stored["labels"])


@pytest.mark.slow
def test_killed_twice_it_ends_as_if_never_killed(whole, tmp_path):
    """Once between two evaluations, once when it has stopped early and has not yet said so: it does not train on."""
    overrides, undisturbed, record = whole
    here = [*overrides, f"output.root={tmp_path}"]
    folder, end = folder_of(here), record["step"]
    assert killed(here, folder, "step", 13) == [10]
    assert killed(here, folder, "predictions written", end)[-1] == end
    resumed = lra.train([*here, "resume=auto"])
    assert resumed["resumed_from"] == [10, end]
    for key in ("stopped_early", "first_loss", "at_chance", "learned"):
        assert resumed[key] == record[key]
    assert_same_run(here, folder, undisturbed, steps=end)


def test_new_process_scores_the_averaged_weights_again(whole, lra_command):
    done = lra_command("eval", whole[1])
    assert "predictions.npz: identical, bit for bit" in done.stdout, done.stderr


# ---- verdicts


def test_a_run_that_learns_nothing_says_so(tiny, capfd):
    overrides = [
        *tiny,
        "backbone.depth=1",
        "optim.lr=1e-9",
        "trainer.steps=8",
        "trainer.chance_after=0.5",
        "trainer.first_loss_tolerance=1.001",
    ]
    record = lra.train(overrides)
    out, err = capfd.readouterr()
    first, chance = err.splitlines()
    rows = read_metrics(folder_of(overrides))
    assert record["first_loss"] == pytest.approx(rows[0]["train/loss"], rel=1e-6)
    assert (
        f"the loss of the first step is {record['first_loss']:.3f}, that of a model that knows nothing log(10)"
        in first
    )
    assert (
        "at step 4 of 8 validation accuracy" in chance
    )  # once, though there are two more evaluations
    assert "within noise of chance" in chance
    assert (record["at_chance"], record["learned"], record["stopped_early"]) == (True, False, None)
    assert "FAIL in a table" in out
    (cell,) = (cell for row in make_table([record]).sections[0][1] for cell in row.cells.values())
    assert cell == f"FAIL ({100 * record['metrics']['test']['accuracy']:.1f}) n=1"


@pytest.mark.parametrize(
    ("loss", "classes", "words"),
    [
        (math.log(10), 10, None),
        (1.99 * math.log(10), 10, None),
        (2.01 * math.log(10), 10, "sure of wrong answers"),
        (0.51 * math.log(2), 2, None),
        (0.49 * math.log(2), 2, "knows labels before"),
    ],
)
def test_first_loss_is_held_against_log_of_classes(loss, classes, words):
    found = sanity.first_loss_problem(loss, classes, 2.0)
    assert (found is None) if words is None else words in found
    assert sanity.first_loss_problem(99.0, classes, None) is None


def test_chance_is_guessing_or_the_most_frequent_label_within_three_standard_errors():
    assert sanity.chance(np.array([0, 1, 2, 3]), 4) == 0.25
    assert sanity.chance(np.array([[0, 1], [1, 1]]), 4) == 0.75
    assert sanity.chance(np.array([[0, 1], [0, 1]]), 4) == 1.0  # each place by itself
    line = 0.25 + 3 * (0.25 * 0.75 / 1000) ** 0.5
    assert sanity.is_at_chance(line - 1e-9, 0.25, 1000)
    assert sanity.is_at_chance(0.0, 0.25, 1000)
    assert not sanity.is_at_chance(line + 1e-9, 0.25, 1000)


def test_early_stopping_counts_evaluations_wherever_a_run_was_cut():
    # evaluations each 5 steps, the best of them at 10
    assert [sanity.evaluations_without_gain(step, 10, 5) for step in (10, 14, 15, 19, 20)] == [
        0,
        0,
        1,
        1,
        2,
    ]
    assert sanity.stopped_early(4, 0, 5, 1) is None  # nothing was evaluated yet
    assert sanity.stopped_early(19, 10, 5, 2) is None
    assert sanity.stopped_early(20, 10, 5, 2)["step"] == 20
    assert sanity.stopped_early(10**6, 10, 5, None) is None


def test_a_run_that_reached_its_last_step_was_not_stopped(tiny):
    def found(steps):
        cfg = lra.compose(
            [*tiny, f"trainer.steps={steps}", "trainer.eval_every=4", "trainer.early_stopping=1"]
        )
        return trainer.Run.stopped_early(SimpleNamespace(cfg=cfg), 8, Best(None, None, 4, 0.5))

    assert found(8) is None
    assert found(9)["step"] == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.schedule=cosinus",
            "optim.schedule=cosinus is unknown; choose one of cosine, linear, rsqrt, constant, plateau",
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
def test_senseless_value_is_one_line(tiny, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Setup(lra.compose([*tiny, override]))
    assert "\n" not in str(caught.value)
