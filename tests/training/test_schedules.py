"""Learning-rate schedules beside their formulas, and a run with all options of `optim`."""

import math

import jax
import numpy as np
import pytest
from optim_config import CONFIG, PARAMS
from run_checks import ONE_STEP_CALLS, assert_same_run, final_state, folder_of, killed
from tiny import TINY

import lra
from lra.cli import main
from lra.report.tables import make_table
from lra.runs.records import read_metrics, read_predictions
from lra.runs.run_folder import load_records
from lra.training.checkpoint import Checkpoints
from lra.training.evaluation import score
from lra.training.optimizer import adamw
from lra.training.schedules import plateau_scale, plateau_update, schedule

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
def test_schedules_equal_their_formulas(kind):
    for steps, warmup in [(20, 0.3), (20, 0.0), (20, 1.0), (1000, 0.1)]:
        rates = schedule(CONFIG | {"schedule": kind, "warmup": warmup}, steps)(np.arange(steps + 1))
        expected = [rate(kind, step, steps, warmup) for step in range(steps + 1)]
        # rates are about 0.01; optax sums in float32
        np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=1e-8)


def test_rsqrt_equals_the_original_code():
    """base * min(1, step / W) / sqrt(max(step, W)); `lr` is its value at step W."""
    ours = schedule(
        CONFIG
        | {"schedule": "rsqrt", "lr": 0.05 / math.sqrt(1000), "lr_start": 0.0, "warmup": 0.2},
        5000,
    )
    theirs = [0.05 * min(1, step / 1000) / math.sqrt(max(step, 1000)) for step in range(5001)]
    np.testing.assert_allclose(ours(np.arange(5001)), theirs, rtol=2e-6, atol=1e-9)


class ReduceLROnPlateau:
    """PyTorch's rule as documented, with threshold_mode=rel."""

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
    for _ in range(3):  # the first evaluation is the best so far
        opt = plateau_update(cfg, opt, {"accuracy": 0.5})
    updates, after = tx.update(PARAMS, opt, PARAMS)
    expected, other = steady.update(PARAMS, steady.init(PARAMS), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.25 * b, rtol=1e-6), updates, expected)
    assert plateau_scale(after) == 0.25
    assert plateau_scale(plateau_update(cfg, other, {"accuracy": 0.1})) == 1.0


# ---- a run with plateau, averaged weights, smoothed labels and early stopping

ALL = [
    *TINY,
    ONE_STEP_CALLS,
    "model=lru",
    "backbone.depth=1",
    "trainer.steps=40",
    "backbone.dropout=0.1",
    "trainer.eval_every=4",
    "trainer.checkpoint_every=4",
    "optim.schedule=plateau",
    "optim.plateau={factor: 0.5, patience: 0, threshold: 0.5}",
    "optim.warmup=0.1",
    "optim.ema=0.9",
    "optim.label_smoothing=0.1",
    "trainer.early_stopping=4",
]


@pytest.fixture(scope="module")
def full_run(data_root, tmp_path_factory):
    """An undisturbed run: overrides without output.root, folder, record, and its states by step."""
    overrides = [*ALL, f"data.root={data_root}"]
    here = [*overrides, f"output.root={tmp_path_factory.mktemp('full')}"]
    states, save = {}, Checkpoints.save

    def save_and_keep(self, step, state, progress):
        states[step] = jax.device_get(state[0])
        save(self, step, state, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_keep)
        return overrides, folder_of(here), lra.train(here), states


def test_early_stopping_ends_a_run_that_counts_in_a_table(full_run):
    _, folder, record, _ = full_run
    best, stopped = record["selection"]["step"], record["stopped_early"]
    assert stopped["step"] == record["step"] == best + 4 * 4 < 40
    assert stopped["reason"].startswith("trainer.early_stopping=4: no better validation accuracy")
    table = make_table(load_records([folder]))
    assert record["status"] == "finished"
    assert not any(line.startswith("Not counted") for line in table.remarks)
    assert [row["steps"] for row in table.long if row["kind"] == "ours"] == [record["step"]]


def test_best_weights_are_averages(full_run):
    overrides, folder, record, states = full_run
    _, best = final_state(overrides, folder).state
    state = states[record["selection"]["step"]]
    jax.tree.map(np.testing.assert_array_equal, tuple(best), tuple(state.ema_params))
    newest = jax.tree.leaves((state.params, state.batch_stats))
    averages = jax.tree.leaves(state.ema_params)
    assert any((a != b).any() for a, b in zip(averages, newest, strict=True))


def test_logged_rate_includes_the_plateau_factor(full_run):
    _, folder, _, _ = full_run
    slow, scale, lr = ReduceLROnPlateau(True, 0.5, 0, 0.5, 1e-7 / 4e-3), 1.0, {}
    for row in read_metrics(folder):
        if "train/lr" in row:
            lr[row["step"]] = row["train/lr"]
            expected = scale * rate("plateau", row["step"] - 1, 40, 0.1, lr=4e-3, start=1e-7)
            assert row["train/lr"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
        else:
            scale = slow.step(row["val/accuracy"])
    assert lr[max(lr)] < 4e-3 / 2


def test_scores_use_true_labels(full_run):
    _, folder, record, _ = full_run
    stored = read_predictions(folder)
    assert record["metrics"]["test"] == score(stored["logits"], stored["labels"])


def test_eval_scores_the_averaged_weights(full_run, capsys):
    assert main(["eval", str(full_run[1])]) == 0
    assert "predictions.npz: identical, bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_twice_ends_as_if_never_killed(full_run, tmp_path):
    """The second kill comes after early stopping: the resumed run does not train on."""
    overrides, undisturbed, record, _ = full_run
    here = [*overrides, f"output.root={tmp_path}"]
    folder, end = folder_of(here), record["step"]
    assert killed(here, folder, "step", 14) == [8, 12]
    assert killed(here, folder, "predictions", end)[-1] == end
    resumed = lra.train([*here, "resume=auto"])
    assert resumed["resumed_from"] == [12, end]
    for key in ("stopped_early", "first_loss", "at_chance", "learned"):
        assert resumed[key] == record[key]
    assert_same_run(here, folder, undisturbed, steps=end)
