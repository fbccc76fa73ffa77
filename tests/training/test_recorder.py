"""The record of a run: sanity checks, start-up time, kept fields."""

import pytest
from run_checks import folder_of

import lra
from lra.errors import LraError
from lra.report.tables import make_table
from lra.runs.records import read_metrics
from lra.runs.run_folder import RunFolder
from lra.runs.tracking import Tracker


def test_run_at_chance_warns_once_and_is_marked(tiny, caplog, capfd):
    overrides = [
        *tiny,
        "backbone.depth=1",
        "optim.lr=1e-9",
        "trainer.steps=8",
        "trainer.chance_after=0.5",
        "trainer.first_loss_tolerance=1.001",
        "trainer.eval_batch_size=1000",
        "trainer.early_stopping=3",  # would stop at step 8, which is the last
    ]
    record = lra.train(overrides)
    rows = read_metrics(folder_of(overrides))
    assert record["first_loss"] == pytest.approx(rows[0]["train/loss"], rel=1e-6)
    loss, chance = [r.getMessage() for r in caplog.records if r.name.startswith("lra.training")]
    assert f"initial loss {record['first_loss']:.3f} is far from log(10) = 2.303" in loss
    # one warning, although two more evaluations follow
    assert "at step 4 of 8 validation accuracy" in chance
    assert (record["at_chance"], record["learned"], record["stopped_early"]) == (True, False, None)
    assert "FAIL in a table" in capfd.readouterr().out
    (cell,) = (cell for row in make_table([record]).sections[0][1] for cell in row.cells.values())
    assert cell == f"FAIL ({100 * record['metrics']['test']['accuracy']:.1f}) n=1"
    # the first step ends after its compilation and before the end of the run
    time = record["time"]
    assert record["eval_batch"] == 24  # examples of the largest split that is scored
    assert 0 < time["compile_s"] <= time["first_step_s"] <= time["wall_s"] + 0.01


def test_tracker_is_finished_when_the_record_cannot_be_written(tiny, monkeypatch):
    """W&B's exit hook would wait for an unfinished run without a limit."""
    finished = []
    write = RunFolder.write_record

    def full_disk(self, record):
        if record["status"] != "running":
            raise LraError("the disk is full")
        write(self, record)

    monkeypatch.setattr(RunFolder, "write_record", full_disk)
    monkeypatch.setattr(Tracker, "finish", lambda self, *args: finished.append(args))
    with pytest.raises(LraError, match="the disk is full"):
        lra.train([*tiny, "tracker=none", "backbone.depth=1", "trainer.time_limit=2h"])
    status, seconds = finished[0]
    assert status == "finished"
    assert 0 < seconds < 7200


def test_edited_config_is_checked_again(tiny):
    cfg = lra.compose(tiny)
    cfg.trainer.time_limit = "3 hours"
    with pytest.raises(LraError, match="trainer.time_limit=3 hours"):
        lra.train(cfg)
