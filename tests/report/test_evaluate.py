"""`lra eval`: saved weights give the recorded scores, and differences are reported."""

import io
import json
import os
import pickle
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from lra.cli import main
from lra.errors import ConfigError, DataError, LraError, MismatchError, RunFolderError
from lra.report import evaluate, saved_run
from lra.report.evaluate import environment_differences, evaluate_run
from lra.runs.records import read_predictions, read_record
from lra.training import evaluation
from lra.training.evaluation import score


def change_record(folder, change):
    record = read_record(folder)
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def test_a_new_process_reproduces_the_predictions_bit_for_bit(trained_run, lra_command):
    before = {file: file.stat().st_mtime_ns for file in trained_run.rglob("*")}
    done = lra_command("eval", trained_run)
    assert done.returncode == 0, done.stderr
    assert "predictions.npz: identical, bit for bit" in done.stdout
    record = read_record(trained_run)
    assert f"test accuracy {100 * record['metrics']['test']['accuracy']:.2f} %" in done.stdout
    step = record["selection"]["step"]
    assert f"weights of step {step} (best), from the checkpoint of step 8" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in trained_run.rglob("*")} == before


def test_other_splits_and_the_last_weights_are_scored(trained_run):
    record = read_record(trained_run)
    for split in ("val", "train"):
        text = evaluate_run(trained_run, split=split)
        assert f"{split} accuracy {100 * record['metrics'][split]['accuracy']:.2f} %" in text
        assert "record.json: identical" in text
    text = evaluate_run(trained_run, split="val", weights="last")
    assert f"val accuracy {100 * record['selection']['last_val_accuracy']:.2f} %" in text
    assert "weights of step 8 (last)" in text
    assert "no comparison" in text


def write_predictions(folder, stored):
    """Replaces the predictions of a run and its recorded scores."""
    np.savez(folder / "predictions.npz", **stored)
    scores = score(stored["logits"], stored["labels"])
    change_record(folder, lambda record: record["metrics"].update(test=scores))


def test_changed_predictions_are_counted_and_only_ties_pass(copied_run, monkeypatch):
    stored = read_predictions(copied_run)
    logits = stored["logits"]
    second, first = np.argsort(logits[0])[-2:]
    margin = logits[0, first] - logits[0, second]
    monkeypatch.setattr(evaluate, "TIE_MARGIN", 2 * margin)
    logits[0, second] = logits[0, first] + margin / 2  # the stored class is another
    write_predictions(copied_run, stored)
    text = evaluate_run(copied_run)
    assert "1 of 21 classes differ, 1 of them where both have two largest logits closer" in text
    logits[0, second] = logits[0, first] + 5 * margin
    write_predictions(copied_run, stored)
    with pytest.raises(MismatchError, match="1 of 21 classes differ, 0 of them") as caught:
        evaluate_run(copied_run)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


def test_stored_ties_at_the_labels_are_a_mismatch(copied_run):
    """A forged score: the stored logits alone are nearly equal."""
    stored = read_predictions(copied_run)
    logits = np.zeros_like(stored["logits"])
    logits[np.arange(21), stored["labels"]] = 5e-4
    write_predictions(copied_run, stored | {"logits": logits})
    assert read_record(copied_run)["metrics"]["test"]["accuracy"] == 1
    with pytest.raises(MismatchError, match=r"\d+ of 21 classes differ, 0 of them"):
        evaluate_run(copied_run)


def test_rows_that_the_run_did_not_score_are_a_mismatch(copied_run):
    stored = read_predictions(copied_run)
    write_predictions(copied_run, stored | {"rows": stored["rows"] + 1})
    with pytest.raises(MismatchError, match="the rows in predictions.npz are not those that"):
        evaluate_run(copied_run)


def test_rounding_differences_are_reported_with_the_environment(copied_run):
    stored = read_predictions(copied_run)
    stored["logits"][3, 2] = np.nextafter(stored["logits"][3, 2], np.float32(np.inf))
    np.savez(copied_run / "predictions.npz", **stored)
    change_record(copied_run, lambda record: record["versions"].update(jax="0.0.1"))
    text = evaluate_run(copied_run)
    assert "0 of 21 classes differ" in text
    assert re.search(r"the run was made in another environment: jax 0.0.1, here \d", text)
    record = read_record(copied_run)
    record["device"] |= {"count": 4, "processes": 2}
    differences = environment_differences(record)
    assert differences[:2] == ["devices 4, here 1", "processes 2, here 1"]
    assert differences[2].startswith("jax 0.0.1")


@pytest.mark.parametrize("split", ["test", "val"])
@pytest.mark.parametrize(("name", "value"), [("accuracy", 0.99), ("loss", 0.1), ("count", 22)])
def test_an_edited_score_is_a_mismatch(copied_run, capsys, split, name, value):
    change_record(copied_run, lambda record: record["metrics"][split].update({name: value}))
    assert main(["eval", str(copied_run), "--split", split]) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert f"record.json states {name} {value}, but the " in line


def test_labels_of_other_data_are_a_mismatch(copied_run):
    stored = read_predictions(copied_run)
    stored["labels"] = stored["logits"].argmax(axis=1)
    write_predictions(copied_run, stored)
    assert read_record(copied_run)["metrics"]["test"]["accuracy"] == 1
    with pytest.raises(MismatchError, match="the labels in predictions.npz are not those of the"):
        evaluate_run(copied_run)


def damaged_predictions(stored, kind):
    """The bytes of a file that is no predictions.npz."""
    file = io.BytesIO()
    if kind == "compressed":
        np.savez_compressed(file, **stored)
    elif kind == "pickled":
        np.savez(file, **stored | {"labels": np.array([print] * 21, object)})
    elif kind == "labels out of range":
        np.savez(file, **stored | {"labels": stored["labels"] + 10})
    elif kind == "other lengths":
        np.savez(file, **stored | {"rows": np.arange(3)})
    elif kind == "incomplete":
        np.savez(file, logits=stored["logits"])
    else:
        np.savez(file, **stored)
    return file.getvalue()[:-200] if kind == "truncated" else file.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["truncated", "compressed", "pickled", "labels out of range", "other lengths", "incomplete"],
)
def test_damaged_predictions_are_one_line(copied_run, capsys, kind):
    content = damaged_predictions(read_predictions(copied_run), kind)
    (copied_run / "predictions.npz").write_bytes(content)
    assert main(["eval", str(copied_run)]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "predictions.npz is damaged (" in line


TRAP = {"_target_": "pandas.read_pickle", "filepath_or_buffer": "trap.pkl"}


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(zzz=TRAP), "model.zzz._target_=pandas.read_pickle of this"),
        (
            lambda c: c["task"].update(zzz=[{"_target_": "joblib.load", "filename": "trap.pkl"}]),
            "task.zzz.0._target_=joblib.load of this record is no class of lra.tasks.*",
        ),
        (lambda c: c["backbone"].update(depth=TRAP), "backbone.depth._target_=pandas.read_pickle"),
        (
            lambda c: c["model"].update(_target_="trap_module.Mixer"),
            "if you trust it, add --allow-target trap_module.Mixer",
        ),
        (lambda c: c["model"].update(_target_="lra.cli.os"), "lra.cli.os of this record is no"),
        (lambda c: c["task"].update(_target_="lra.tasks.base.Path"), "has no class Path"),
        (lambda c: c["task"].update(name="${oc.env:HOME}"), "config.task.name=${oc.env:HOME} is"),
    ],
)
@pytest.mark.parametrize("command", [["eval"], ["diagnose"]])
def test_a_foreign_record_runs_no_code(
    copied_run, tmp_path, monkeypatch, capsys, command, change, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "trap_module.py").write_text("import os; os.mkdir('ran')")
    change_record(copied_run, lambda record: change(record["config"]))
    words = ["length", "task.max_length=40"] if command == ["diagnose"] else []
    assert main([*command, str(copied_run), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "ran").exists()


def test_an_allowed_target_of_the_current_folder_is_used(copied_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = "import models.stu\n\nclass Mine(models.stu.STU):\n    pass\n"
    (tmp_path / "allowed_module.py").write_text(code)
    target = "allowed_module.Mine"
    change_record(copied_run, lambda record: record["config"]["model"].update(_target_=target))
    assert main(["eval", str(copied_run)]) == 2
    assert main(["eval", str(copied_run), "--allow-target", target]) == 0
    assert "identical, bit for bit" in capsys.readouterr().out
    sys.modules.pop("allowed_module")


@pytest.mark.parametrize("deterministic", [False, True])
def test_determinism_of_the_run_is_kept_and_out_of_memory_is_advice(
    copied_run, monkeypatch, deterministic
):
    def out_of_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    calls = []
    monkeypatch.setattr("lra.report.saved_run.use_deterministic_ops", calls.append)
    monkeypatch.setattr(saved_run, "predict", out_of_memory)
    change_record(
        copied_run, lambda record: record["config"]["trainer"].update(deterministic=deterministic)
    )
    with pytest.raises(LraError, match="out of memory at trainer.eval_batch_size=8; set it lower"):
        evaluate_run(copied_run)
    assert calls == [True] * deterministic


def test_evaluation_batches_hold_no_more_than_the_largest_split(copied_run, monkeypatch):
    """Padding to a larger batch would end in a lack of memory."""
    sizes = []

    def predict(*arguments):
        sizes.append(arguments[-1])
        return evaluation.predict(*arguments)

    monkeypatch.setattr(saved_run, "predict", predict)
    evaluate_run(copied_run, overrides=["trainer.eval_batch_size=5000"])
    change_record(copied_run, lambda record: record.update(eval_batch=5000))
    evaluate_run(copied_run, split="val")
    assert sizes == [24, 24]  # examples of val and, at most, of train; test has 21


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1", "the config of a saved run is fixed"),
        ("nonsense", "the config of a saved run is fixed"),
        ("trainer.eval_batch_size=0", "must be a whole number"),
    ],
)
def test_overrides_that_would_make_another_run_are_refused(trained_run, override, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_run(trained_run, overrides=[override])


def test_missing_or_different_parts_are_named(copied_run, tmp_path):
    with pytest.raises(RunFolderError, match="holds no run"):
        evaluate_run(tmp_path / "nowhere")
    change_record(copied_run, lambda record: record["data"]["splits"]["test"].update(sha256="0"))
    with pytest.raises(DataError, match=r"test under data.root=.* differs from the data of"):
        evaluate_run(copied_run)
    shutil.rmtree(copied_run / "checkpoints")
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        evaluate_run(copied_run)


def test_keys_that_are_newer_than_the_record_have_their_defaults(copied_run):
    change_record(copied_run, lambda record: record["config"]["trainer"].pop("time_limit"))
    assert "identical, bit for bit" in evaluate_run(copied_run)
