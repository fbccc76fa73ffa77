"""Training gives the same numbers however it is cut or resumed; faults end in one line."""

import json
import os
import shutil
import signal
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run_checks import (
    ONE_STEP_CALLS,
    assert_same_run,
    folder_of,
    killed,
    make_unfinished,
    steps_saved,
)

import lra
from lra.errors import (
    ConfigError,
    DataError,
    DivergedError,
    LraError,
    PreemptedError,
    RunFolderError,
)
from lra.report.diagnose import diagnose
from lra.report.evaluate import evaluate_run
from lra.report.saved_run import SavedRun
from lra.runs.progress import Reporter
from lra.runs.records import read_metrics, read_predictions, read_record
from lra.runs.run_folder import load_records
from lra.tasks import listops
from lra.training import recorder, trainer
from lra.training.evaluation import predict, sample_rows, score
from lra.training.step import epoch_order
from lra.training.trainer import Trainer, intervals


@pytest.fixture
def whole(finished_run):
    """An undisturbed run: its overrides without output.root, its folder, its record."""
    overrides, folder = finished_run
    return overrides, folder, read_record(folder)


def test_record_holds_what_was_run(whole):
    _, folder, record = whole
    stored = read_record(folder)
    assert stored["metrics"] == record["metrics"]
    assert stored["status"] == "finished"
    assert stored["step"] == 40
    assert (
        stored["metrics"]["test"]["count"] == 21
    )  # a last batch of 5 in batches of 8: nobody dropped, nobody twice
    assert stored["metrics"]["val"]["count"] == 24
    assert {"majority", "root_operator", "bag_of_tokens"} <= set(stored["reference"])
    assert stored["resumed_from"] == []
    assert stored["params"]["total"] == sum(stored["params"]["groups"].values())
    assert stored["config"]["trainer"]["steps"] == 40
    predictions = read_predictions(folder)
    assert (
        np.mean(predictions["logits"].argmax(1) == predictions["labels"])
        == stored["metrics"]["test"]["accuracy"]
    )


@pytest.mark.slow
def test_where_calls_are_cut_changes_nothing(whole, tmp_path, monkeypatch):
    overrides, folder, record = whole
    other = [*overrides, f"output.root={tmp_path}", "trainer.call_seconds=1e-9"]
    assert lra.train(other)["metrics"] == record["metrics"]
    assert read_metrics(folder_of(other)) == read_metrics(folder)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("stop_at", [1, 13])
def test_stopped_and_resumed_equals_never_stopped(whole, tmp_path, monkeypatch, stop_at):
    overrides, folder, _ = whole
    here = [*overrides, f"output.root={tmp_path}", ONE_STEP_CALLS]

    def interrupt(self, step, done, seconds, tally):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "advance", interrupt)
    with pytest.raises(PreemptedError, match=f"SIGTERM at step {stop_at} of 40.*resume=auto"):
        lra.train(here)
    assert read_record(folder_of(here))["status"] == "preempted"
    monkeypatch.undo()

    resumed = lra.train([*here, "resume=auto"])
    assert resumed["resumed_from"] == [stop_at]
    assert_same_run(here, folder_of(here), folder)


def test_killed_and_resumed_equals_never_stopped(whole, tmp_path):
    """After SIGKILL the run resumes from its last checkpoint and repeats the metrics after it."""
    overrides, folder, _ = whole
    here = [*overrides, ONE_STEP_CALLS, f"output.root={tmp_path}"]
    assert killed(here, folder_of(here), "step", 17) == [10]
    assert load_records([tmp_path])[0]["status"] == "dead"
    assert lra.train([*here, "resume=auto"])["resumed_from"] == [10]
    assert_same_run(here, folder_of(here), folder)


def test_checkpoint_that_cannot_be_written_ends_in_one_line_and_spares_the_one_before(
    whole, tmp_path, monkeypatch
):
    overrides, _, record = whole
    here = [*overrides, f"output.root={tmp_path}"]
    save = ocp.CheckpointManager.save

    def disk_fills_up(self, step, *args, **kwargs):
        if step == 20:
            (self.directory / "20.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", disk_fills_up)
    with pytest.raises(
        LraError, match=r"checkpoint of step 20 .*the disk is full; earlier checkpoints are intact"
    ):
        lra.train(here)
    folder = folder_of(here)
    assert read_record(folder)["status"] == "failed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["10"]
    monkeypatch.undo()
    resumed = lra.train([*here, "resume=auto"])
    assert resumed["resumed_from"] == [10]
    assert resumed["metrics"] == record["metrics"]


def test_checkpoint_of_other_data_is_refused(whole, tmp_path, monkeypatch):
    overrides, _, _ = whole
    here = [*overrides, f"output.root={tmp_path}"]
    monkeypatch.setattr(
        trainer.Trainer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        lra.train(here)
    monkeypatch.undo()
    described = recorder.describe_data
    monkeypatch.setattr(recorder, "describe_data", lambda store: described(store) | {"splits": {}})
    with pytest.raises(RunFolderError, match="other data"):
        lra.train([*here, "resume=auto"])


def test_checkpoint_of_another_vocabulary_is_refused(whole, tmp_path, monkeypatch):
    """The same bytes under other names of the ids: the weights would mean something else."""
    overrides, _, _ = whole
    here = [*overrides, f"output.root={tmp_path}"]
    monkeypatch.setattr(
        trainer.Trainer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        lra.train(here)
    monkeypatch.undo()
    monkeypatch.setitem(listops.SPECIAL, "s4", ("<pad>", "<unk>", "<end>"))
    with pytest.raises(RunFolderError, match="another vocabulary"):
        lra.train([*here, "resume=auto"])


@pytest.mark.slow
def test_last_weights_are_scored_where_the_protocol_says_so(whole, tmp_path):
    overrides, _, _ = whole
    record = lra.train([*overrides, "protocol=lra2020", f"output.root={tmp_path}"])
    assert record["selection"]["rule"] == "last"
    assert record["selection"]["step"] == 40
    assert record["metrics"]["val"]["accuracy"] == record["selection"]["last_val_accuracy"]


def test_part_of_validation_and_test_is_scored_only_when_asked_and_marked(whole, tmp_path):
    overrides, _, record = whole
    part = lra.train([*overrides, f"output.root={tmp_path}", "trainer.eval_examples=5"])
    assert [part["metrics"][name]["count"] for name in ("val", "test")] == [5, 5]
    assert part["data"]["partial"]
    assert not record["data"]["partial"]
    assert record["metrics"]["test"]["count"] == 21


def test_scored_part_is_a_stratified_sample_that_eval_scores_again(whole, tmp_path):
    """predictions.npz names its rows; a record of the time before scored the first ones."""
    overrides, full, _ = whole
    sizes = ["trainer.steps=4", "trainer.eval_examples=6", "trainer.train_eval_examples=9"]
    here = [*overrides, *sizes, f"output.root={tmp_path}"]
    lra.train(here)
    folder, labels = folder_of(here), read_predictions(full)["labels"]
    stored = read_predictions(folder)
    np.testing.assert_array_equal(stored["rows"], sample_rows(labels, 6))
    np.testing.assert_array_equal(stored["labels"], labels[stored["rows"]])
    assert stored["rows"].tolist() != list(range(6))
    assert "identical, bit for bit" in evaluate_run(folder)
    for split in ("val", "train"):
        assert "record.json: identical" in evaluate_run(folder, split=split)
    (_, tables, _) = next(iter(diagnose(folder)))
    assert tables["all"][0].examples == 6

    record = read_record(folder)
    del record["data"]["sample"]
    (folder / "record.json").write_text(json.dumps(record))
    run = SavedRun(folder)
    np.testing.assert_array_equal(run.data.labels, labels[:6])


def test_best_weights_are_those_of_the_best_evaluation(whole):
    _, folder, record = whole
    scores = {
        row["step"]: row["val/accuracy"] for row in read_metrics(folder) if "val/accuracy" in row
    }
    assert (
        record["selection"]["val_accuracy"]
        == max(scores.values())
        == record["metrics"]["val"]["accuracy"]
    )
    assert record["selection"]["step"] == min(
        step for step, score in scores.items() if score == max(scores.values())
    )
    assert list(scores) == list(range(4, 41, 4))


def test_folder_that_holds_the_run_is_refused_or_shown(whole, monkeypatch):
    overrides, folder, record = whole
    here = [*overrides, f"output.root={folder.parents[2]}"]
    with pytest.raises(RunFolderError, match="finished at step 40.*resume=auto"):
        lra.train(here)
    monkeypatch.setattr(trainer.Trainer, "run", lambda *_: pytest.fail("trained again"))
    assert lra.train([*here, "resume=auto"])["metrics"] == record["metrics"]


def test_folder_that_holds_another_run_is_refused(whole, tmp_path):
    overrides, folder, _ = whole
    here = [*overrides, "optim.lr=0.5", f"output.root={tmp_path}"]
    target = folder_of(here)
    target.mkdir(parents=True)
    (target / "record.json").write_bytes((folder / "record.json").read_bytes())
    with pytest.raises(RunFolderError, match="holds another run"):
        lra.train([*here, "resume=auto"])
    assert read_record(target)["config"]["optim"]["lr"] != 0.5


# ---- files removed or changed by hand


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("removed", ["run.lock", "checkpoints", ""])
def test_files_removed_during_the_run_end_it_in_one_line(
    whole, tmp_path, monkeypatch, caplog, removed
):
    overrides, folder, _ = whole
    here = [*overrides, f"output.root={tmp_path}", ONE_STEP_CALLS]
    target, left = folder_of(here), {}

    def remove(self, step, *_):
        if step == 13:
            path = target / removed
            path.unlink() if path.is_file() else shutil.rmtree(path)
            left.update({p: p.read_bytes() for p in target.rglob("*") if p.is_file()})

    monkeypatch.setattr(Reporter, "advance", remove)
    with pytest.raises(LraError, match="was removed during the run") as caught:
        lra.train(here)
    assert "\n" not in str(caught.value)
    assert not caplog.messages
    monkeypatch.undo()
    if removed == "run.lock":
        assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == left
        assert lra.train([*here, "resume=auto"])["resumed_from"] == [10]
    elif removed == "checkpoints":
        assert read_record(target)["status"] == "failed"
        assert lra.train(here)["resumed_from"] == []
    else:
        assert not target.exists()
        return
    assert_same_run(here, target, folder)


def test_lost_record_is_taken_from_the_checkpoint(copied_run, whole, caplog):
    here, folder = copied_run
    make_unfinished(folder)
    (folder / "record.json").unlink()
    with pytest.raises(RunFolderError, match="checkpoints but no record.json; resume=auto"):
        lra.train(here)
    record = lra.train([*here, "resume=auto"])
    (line,) = caplog.messages
    assert "no record.json; the run continues with the copy in the checkpoint of step 40" in line
    assert [part["step"] for part in record["segments"]] == [0, 40]
    assert record["resumed_from"] == [40]
    assert record["time"]["wall_s"] > whole[2]["time"]["wall_s"] / 2
    assert_same_run(here, folder, whole[1])


def test_checkpoints_without_any_record_are_refused(copied_run, monkeypatch):
    """Checkpoints of older versions hold no copy of the record."""
    here, folder = copied_run
    (folder / "record.json").unlink()
    monkeypatch.setattr(recorder, "newest_progress", lambda folder: (40, {"config": {}}))
    with pytest.raises(RunFolderError, match="no checkpoint that can be read holds a copy of it"):
        lra.train([*here, "resume=auto"])
    assert steps_saved(folder) == [30, 40]


def test_checkpoints_of_another_run_without_record_are_refused(whole, tmp_path):
    overrides, folder, _ = whole
    here = [*overrides, "optim.lr=0.5", f"output.root={tmp_path}"]
    shutil.copytree(folder / "checkpoints", folder_of(here) / "checkpoints")
    with pytest.raises(RunFolderError, match="holds another run"):
        lra.train([*here, "resume=auto"])


@pytest.mark.parametrize("kept", [0, 12])
def test_lost_metrics_are_one_warning_and_recorded(copied_run, whole, caplog, kept):
    here, folder = copied_run
    make_unfinished(folder)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    if kept:
        (folder / "metrics.jsonl").write_bytes(b"".join(lines[:kept]))
    else:
        (folder / "metrics.jsonl").unlink()
    record = lra.train([*here, "resume=auto"])
    (line,) = caplog.messages
    assert f"lacks {len(lines) - kept} of the {len(lines)} lines up to step 40" in line
    assert record["lost_metrics"] == len(lines) - kept
    make_unfinished(folder)  # a second start from the same checkpoint
    assert lra.train([*here, "resume=auto"])["lost_metrics"] == len(lines) - kept
    assert len(caplog.messages) == 1
    assert whole[2]["lost_metrics"] == 0
    assert record["metrics"] == whole[2]["metrics"]


def test_each_segment_has_its_commit_and_versions(copied_run, monkeypatch):
    here, folder = copied_run
    make_unfinished(folder)
    first = read_record(folder)
    monkeypatch.setattr(recorder, "git_commit", lambda: "abc1234")
    monkeypatch.setattr(recorder, "versions", lambda: {"jax": "9.9"})
    record = lra.train([*here, "resume=auto"])
    assert [part["commit"] for part in record["segments"]] == [first["commit"], "abc1234"]
    assert [part["versions"] for part in record["segments"]] == [first["versions"], {"jax": "9.9"}]
    assert (record["commit"], record["versions"]) == ("abc1234", {"jax": "9.9"})


def test_record_of_an_older_version_is_continued(copied_run, whole):
    here, folder = copied_run
    make_unfinished(folder)
    record = read_record(folder)
    del record["lost_metrics"]
    for part in record["segments"]:
        del part["commit"], part["versions"]
    (folder / "record.json").write_text(json.dumps(record))
    assert lra.train([*here, "resume=auto"])["segments"][0] == record["segments"][0]
    assert_same_run(here, folder, whole[1])


# ---- the folder


def test_folder_is_named_by_its_config_without_output_and_resume(tiny, tmp_path):
    name = folder_of(tiny).name
    assert folder_of([*tiny, "resume=auto", f"output.root={tmp_path / 'elsewhere'}"]).name == name
    assert folder_of([*tiny, "optim.lr=0.1"]).name != name


def test_loss_that_is_not_finite_ends_the_run(tiny):
    with pytest.raises(DivergedError, match=r"NaN or infinite at step \d+ of 4; lower optim.lr"):
        lra.train([*tiny, "optim.lr=1e30", "optim.clip=null", "optim.warmup=0"])
    record = read_record(folder_of([*tiny, "optim.lr=1e30", "optim.clip=null", "optim.warmup=0"]))
    assert record["status"] == "diverged"
    assert record["metrics"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.steps=0", "trainer.steps=0 must be a whole number of at least 1"),
        ("resume=perhaps", "resume=perhaps is unknown"),
        ("trainer.batch_size=65", "trainer.batch_size=65 exceeds the 64 training examples"),
        ("seed=x", "seed=x must be a whole number"),
        ("trainer.train_eval_examples=0", "trainer.train_eval_examples=0 must be a whole number"),
        ("trainer.call_seconds=x", "trainer.call_seconds=x must be a number above 0"),
        ("protocol.select=bset", "protocol.select=bset is unknown"),
        ("protocol.select=last", "protocol.name=strict with other values"),
        ("optim.lr=-1", "optim.lr=-1 must be a number above 0"),
        ("backbone.pool=cls", "backbone.pool=cls .* causal"),
        ("backbone.glu=whole", "backbone.glu=whole is unknown; choose one of full"),
        ("model.num_filters=999", "model.num_filters"),
        ("task.seq_len=5", "task.seq_len"),
        (
            "+optim.groups.mine={match: nowhere, lr_factor: 1, weight_decay: 0}",
            "optim.groups.mine.match='nowhere' matches no",
        ),
    ],
)
def test_bad_values_are_refused_in_one_line(tiny, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        lra.train([*tiny, override])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*"))  # no folder was made


def test_run_without_its_data_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(DataError, match="listops-1000"):
        lra.train([*tiny, "task.source=release"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()  # by the user, and kept
    with pytest.raises(DataError, match="listops-1000"):
        lra.train([*tiny, "task.source=release"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_run_that_failed_before_its_first_checkpoint_may_be_repeated(tiny, monkeypatch):
    monkeypatch.setattr(Trainer, "restore", Mock(side_effect=LraError("broken")))
    for _ in range(2):  # not, the second time: the folder holds a run
        with pytest.raises(LraError, match="broken"):
            lra.train(tiny)
        assert read_record(folder_of(tiny))["status"] == "failed"
    monkeypatch.setattr(Trainer, "load_data", Mock(side_effect=DataError("gone")))
    with pytest.raises(DataError, match="gone"):
        lra.train(tiny)
    assert read_record(folder_of(tiny))["error"] == "DataError: gone"  # its record is kept


@pytest.mark.parametrize(
    ("steps", "eval_every", "expected"),
    [(20, None, 100), (400, None, 100), (2500, None, 125), (80_000, None, 4000), (20, 4, 4)],
)
def test_short_runs_are_evaluated_at_most_every_hundred_steps(steps, eval_every, expected):
    words = ["task=listops_short", f"trainer.steps={steps}"]
    cfg = lra.compose([*words, f"trainer.eval_every={eval_every or 'null'}"]).trainer
    assert intervals(cfg)["eval"] == intervals(cfg)["checkpoint"] == expected


def test_every_example_is_drawn_once_an_epoch():
    key = jax.random.key(0)
    first, again, second = (np.asarray(epoch_order(key, e, 50)) for e in (0, 0, 1))
    assert sorted(first) == list(range(50))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


def test_predict_scores_each_example_once_whatever_the_batch():
    inputs = jnp.arange(10.0)[:, None] * jnp.ones((10, 3))

    def apply(x, lengths):
        return x * lengths[:, None]

    expected = np.arange(10.0)[:, None] * np.ones((10, 3)) * 2
    for batch_size in (1, 3, 10, 16):
        done: list[int] = []
        logits = predict(apply, inputs, jnp.full(10, 2), batch_size, done.append)
        np.testing.assert_array_equal(logits, expected)
        assert done == list(range(batch_size, 10, batch_size))


def test_score_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    logits, labels = 50 * rng.normal(size=(7, 4)).astype(np.float32), rng.integers(0, 4, 7)
    losses = [
        -row[k] + np.log(sum(np.exp(v - max(row)) for v in row)) + max(row)
        for row, k in zip(logits.astype(float), labels, strict=True)
    ]
    result = score(logits, labels)
    assert result["count"] == 7
    assert result["loss"] == pytest.approx(sum(losses) / 7)
    assert (
        result["accuracy"]
        == sum(row.argmax() == k for row, k in zip(logits, labels, strict=True)) / 7
    )
