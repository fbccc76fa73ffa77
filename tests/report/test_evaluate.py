"""`lra eval`: saved weights give the recorded scores, and differences are reported."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from lra.errors import ConfigError, DataError, LraError, MismatchError, RunFolderError
from lra.report import saved_run
from lra.report.evaluate import environment_differences, evaluate_run
from lra.runs.records import read_predictions, read_record


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


def test_changed_predictions_are_counted_and_only_ties_pass(copied_run):
    stored = read_predictions(copied_run)
    logits = stored["logits"]
    second, first = np.argsort(logits[0])[-2:]
    logits[0, second] = logits[0, first] + 5e-4  # the stored class is another, by less than 1e-3
    np.savez(copied_run / "predictions.npz", **stored)
    text = evaluate_run(copied_run)
    assert "1 of 21 classes differ, 1 of them where the two largest logits were closer" in text
    logits[0, second] = logits[0, first] + 5e-3
    np.savez(copied_run / "predictions.npz", **stored)
    with pytest.raises(MismatchError, match="1 of 21 classes differ, 0 of them") as caught:
        evaluate_run(copied_run)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


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
