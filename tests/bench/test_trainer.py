"""`lra bench trainer` times equal work, and refuses to compare different trainings."""

import json

import jax
import numpy as np
import pytest

from lra.bench import trainer
from lra.bench.trainer import Outcome
from lra.cli import main
from lra.errors import ConfigError, LraError

TINY = (
    "task=listops_short",
    "task.max_length=30",
    "model=lru",
    "backbone.width=8",
    "backbone.depth=1",
    "trainer.batch_size=4",
)
STARTS = [(9.0, 3.0), (6.0, 1.0)]


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(trainer, "ROUNDS", 1)


@pytest.mark.slow
def test_variants_train_alike(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer, "time_starts", lambda overrides: STARTS)
    monkeypatch.setattr(trainer, "STEPS", 4)
    seen, check = [], trainer.check_same_training
    monkeypatch.setattr(trainer, "check_same_training", lambda o: [seen.append(o), check(o)])
    assert main(["bench", "trainer", *TINY, "--output", str(tmp_path / "t.json")]) == 0
    assert len(seen) == 2
    for outcomes in seen:
        assert set(outcomes) == {"bare_steps", "bare_scan", "device", "host"}
        for outcome in outcomes.values():
            assert outcome.loss == pytest.approx(outcomes["bare_steps"].loss, rel=1e-4)
            np.testing.assert_allclose(outcome.logits, outcomes["bare_steps"].logits, atol=1e-4)
    found = {m["what"]: m for m in json.loads((tmp_path / "t.json").read_text())["measurements"]}
    assert found["as given: trainer / bare steps"]["goal"] == "<= 1.05 x"
    assert found["as given: host-fed / bare steps"]["goal"] == "<= 1.10 x"
    assert all(m["value"] > 0 for m in found.values())
    assert found["start to first step, compilation apart"]["value"] == 6.0
    assert found["second start / first, compilation cache on"]["value"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_other_batches_are_noticed(monkeypatch):
    first_batches = trainer.first_batches

    def shifted(*args):
        return jax.tree.map(lambda x: np.roll(x, 1, axis=0), first_batches(*args))

    monkeypatch.setattr(trainer, "first_batches", shifted)
    with pytest.raises(LraError, match="the test logits of device differ from those of bare_steps"):
        trainer.compare(TINY, 4)


def test_work_that_the_bare_step_does_not_do_is_refused():
    with pytest.raises(ConfigError, match="trainer.micro_batch: the bare step"):
        trainer.compare([*TINY, "trainer.micro_batch=2"], 4)


@pytest.mark.parametrize(
    ("loss", "device", "host", "message"),
    [
        (2.1, 1.0, 1.0, "differ in mean loss"),
        (2.0, 1.5, 1.0, "the test logits of device differ from those of bare_steps"),
        (2.0, 1.0, 1.000001, "differ between data.placement=device and host"),
    ],
)
def test_different_trainings_are_an_error(loss, device, host, message):
    logits = np.ones((3, 2), np.float32)
    outcomes = {
        "bare_steps": Outcome(2.0, logits),
        "device": Outcome(loss, device * logits),
        "host": Outcome(2.0, np.float32(host) * logits),
    }
    with pytest.raises(LraError, match=message):
        trainer.check_same_training(outcomes)


@pytest.mark.slow
def test_a_start_is_measured_to_its_first_step():
    """The second start reads the compilation cache of the first."""
    for first_step, compilation in trainer.time_starts(TINY):
        assert 0 < compilation < first_step


def test_a_start_that_fails_is_an_error(tmp_path):
    with pytest.raises(LraError, match="a start of lra train failed: lra: error: unknown task=x"):
        trainer.time_start(["task=x"], tmp_path, tmp_path)
