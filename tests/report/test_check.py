"""`lra check`: honest records pass, and each forgery fails the rule that it breaks."""

import json
import shutil

import numpy as np
import pytest
from doc_commands import ROOT

from lra.cli import main
from lra.config.build import build_task
from lra.config.compose import compose, run_config
from lra.data.inspect import expected_hashes
from lra.report.check import check_records
from lra.runs import records, sanity
from lra.training.evaluation import score
from lra.training.recorder import data_key

NO_WEIGHTS = shutil.ignore_patterns("checkpoints", "run.lock")


@pytest.fixture
def runs(trained_run, other_seed, tmp_path):
    """Copies of the runs of two seeds, without their weights."""
    return [
        shutil.copytree(folder, tmp_path / "runs" / folder.name, ignore=NO_WEIGHTS)
        for folder in (trained_run, other_seed)
    ]


def failures(folder, data_root):
    """The reasons by rule, of all records at or below a folder."""
    verdicts = check_records([folder], data_root)
    return {name: reason for verdict in verdicts for name, reason in verdict.failed.items()}


def edit(folder, change):
    """Writes record.json with `change(record)`."""
    record = records.read_record(folder)
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def edit_config(folder, change, **fields):
    """Changes the config and fields of a record, and renames its folder accordingly."""
    edit(folder, lambda record: (change(record["config"]), record.update(fields)))
    record = records.read_record(folder)
    name = records.run_path("", record["config"], record).name
    return folder.rename(folder.with_name(name))


def edit_data(folder, change):
    """Changes the splits of a record, and its key accordingly."""

    def with_key(record):
        change(record["data"]["splits"])
        record["data"]["key"] = data_key(record["data"]["splits"])

    edit(folder, with_key)


def edit_predictions(folder, change):
    """Replaces the predictions by `change(logits, labels, rows)`, and the scores accordingly."""
    stored = records.read_predictions(folder)
    logits, labels, rows = change(stored["logits"], stored["labels"], stored["rows"])
    np.savez(folder / "predictions.npz", logits=logits, labels=labels, rows=rows)
    scores = score(logits, labels)
    chance = sanity.chance(labels, logits.shape[1])
    learned = not sanity.is_at_chance(scores["accuracy"], chance, len(labels))
    edit(folder, lambda record: record["metrics"].update(test=scores))
    edit(folder, lambda record: record.update(learned=learned))


def edit_metrics(folder, change):
    """Replaces the lines of metrics.jsonl by `change(lines)`."""
    lines = change(records.read_metrics(folder))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_scores(split, **values):
    return lambda a, b: edit(a, lambda record: record["metrics"][split].update(values))


def set_fields(**values):
    return lambda a, b: edit(a, lambda record: record.update(values))


def drop_hard_examples(a, b):
    def right(logits, labels, rows):
        kept = logits.argmax(axis=1) == labels
        kept[0] = True
        return logits[kept], labels[kept], rows[kept]

    edit_predictions(a, right)


def renumber_the_rest(a, b):
    drop_hard_examples(a, b)
    edit_predictions(a, lambda logits, labels, rows: (logits, labels, np.arange(len(rows))))
    count = len(records.read_predictions(a)["rows"])
    edit_data(a, lambda splits: splits["test"].update(count=count))


def repeat_rows(a, b):
    edit_predictions(a, lambda logits, labels, rows: (logits, labels, rows // 2 * 2))


def repeat_easy_examples(a, b):
    def easy(logits, labels, rows):
        right = np.flatnonzero(logits.argmax(axis=1) == labels)
        kept = np.resize(right if len(right) else [0], len(rows))
        return logits[kept], labels[kept], rows

    edit_predictions(a, easy)


def move_labels_to_predictions(a, b):
    edit_predictions(a, lambda logits, labels, rows: (logits, logits.argmax(axis=1), rows))


def swap_labels(a, b):
    edit_predictions(a, lambda logits, labels, rows: (logits, labels[::-1], rows))


def score_another_split(a, b):
    rows = np.arange(24)  # of validation
    edit_predictions(a, lambda logits, labels, _: (logits[rows % 21], labels[rows % 21], rows))


def select_the_other_evaluation(a, b):
    selection = records.read_record(a)["selection"]
    other = {4: 8, 8: 4}[selection["step"]]
    edit(a, lambda record: record["selection"].update(step=other))


def select_another_rule(a, b):
    edit_config(a, lambda config: config["protocol"].update(select="last"))


def validate_on_test(a, b):
    edit_data(a, lambda splits: splits.update(val=splits["test"]))


def validate_on_test_without_a_rule(a, b):
    validate_on_test(a, b)
    edit_config(a, lambda config: config["protocol"].pop("validation"))


def score_test_in_training(a, b):
    edit_metrics(a, lambda lines: [*lines, {"step": 8, "test/accuracy": 0.4}])


def drop_an_evaluation(a, b):
    def kept(lines):
        return [line for line in lines if not (line["step"] == 4 and "val/loss" in line)]

    edit_metrics(a, kept)


def set_hash(split):
    return lambda a, b: edit_data(a, lambda splits: splits[split].update(sha256="0" * 64))


def copy_a_seed(a, b):
    """Seed 0 once more as seed 2."""
    copy = shutil.copytree(a, a.with_name("copy"))
    edit_config(copy, lambda config: config.update(seed=2), seed=2)


def copy_a_seed_with_noise(a, b):
    copy_a_seed(a, b)
    (copy,) = a.parent.glob("strict-s2-*")
    edit_predictions(copy, lambda logits, labels, rows: (logits * np.float32(1.01), labels, rows))


def take_predictions_of_the_other_seed(a, b):
    shutil.copy(b / "predictions.npz", a)
    edit_predictions(a, lambda *arrays: arrays)


def change_a_setting(a, b):
    edit(a, lambda record: record["config"]["optim"].update(lr=0.5))


def train_longer(a, b):
    edit_config(a, lambda config: config["trainer"].update(steps=800), step=800)


def stop_early(a, b):
    edit(a, lambda record: record.update(stopped_early={"step": 8, "reason": ""}))


def score_a_sample(a, b):
    edit_config(a, lambda config: config["trainer"].update(eval_examples=10))
    (a,) = a.parent.glob("strict-s0-*")
    edit_predictions(a, lambda *arrays: [array[:10] for array in arrays])


def remove(name):
    return lambda a, b: (a / name).unlink()


FORGERIES = {
    "edited accuracy": (set_scores("test", accuracy=0.9), "test scores", "states accuracy 0.9"),
    "edited loss": (set_scores("test", loss=0.5), "test scores", "states loss 0.5"),
    "edited count": (set_scores("test", count=42), "test scores", "states count 42"),
    "no loss": (set_scores("test", loss=None), "test scores", "lacks loss"),
    "an impossible accuracy": (set_scores("test", accuracy=1.5), "schema", "accuracy=1.5"),
    "learned": (set_fields(learned=True), "test scores", "learned is true"),
    "no predictions": (remove("predictions.npz"), "test scores", "is missing"),
    "dropped hard examples": (drop_hard_examples, "rows", "expected each of the 21 rows"),
    "hard examples dropped, rest renumbered": (renumber_the_rest, "test data", "test.count"),
    "repeated rows": (repeat_rows, "rows", "do not fit together"),
    "repeated easy examples": (repeat_easy_examples, "labels", "labels in predictions"),
    "a sample": (score_a_sample, "rows", "data.partial is false"),
    "labels of the predictions": (move_labels_to_predictions, "labels", "labels in predictions"),
    "swapped labels": (swap_labels, "labels", "labels in predictions"),
    "another split": (score_another_split, "rows", "24 rows up to 23"),
    "another step selected": (select_the_other_evaluation, "selection", "selection.step is"),
    "another rule of selection": (select_another_rule, "protocol", "select is last"),
    "validation on test": (validate_on_test, "protocol", "validation equals test"),
    "validation on test, rule left out": (
        validate_on_test_without_a_rule,
        "protocol",
        "validation equals test",
    ),
    "test scored in training": (score_test_in_training, "selection", "scores of test"),
    "a missing evaluation": (drop_an_evaluation, "steps", "evaluations at 1 steps"),
    "no curve": (remove("metrics.jsonl"), "selection", "has no evaluation"),
    "edited validation score": (set_scores("val", accuracy=0.9), "selection", "accuracy is 0.9"),
    "other test data": (set_hash("test"), "test data", "test.sha256 is 0000"),
    "other training data": (set_hash("train"), "train data", "train.sha256 is 0000"),
    "copied seed": (copy_a_seed, "seeds", "seed 0"),
    "copied seed with noise": (copy_a_seed_with_noise, "seeds", "seed 0"),
    "predictions of another run": (
        take_predictions_of_the_other_seed,
        "seeds",
        "logits or validation losses are",
    ),
    "another seed": (set_fields(seed=7), "config", "seed is 7"),
    "another setting": (change_a_setting, "folder", "the folder is strict-s0-"),
    "another model's name": (set_fields(model="lru"), "model", "models.stu.STU, conf/model/lru"),
    "another task's name": (set_fields(task="listops"), "task", "name is listops_short"),
    "another protocol's name": (set_fields(protocol="lra2020"), "protocol", "conf/protocol/lra20"),
    "more steps": (set_fields(step=80), "steps", "step is 80"),
    "more steps in the config": (train_longer, "steps", "expected one each 4 steps up to 800"),
    "an early stop": (stop_early, "steps", "stopped_early.step is 8"),
    "a missing commit": (set_fields(commit="0123abcd"), "commit", "no commit 0123abcd"),
    "no commit": (set_fields(commit="--help"), "commit", "is no commit"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_fails_the_rule_that_it_breaks(name, runs, data_root):
    forge, rule, message = FORGERIES[name]
    forge(*runs)
    assert message in failures(runs[0].parent, data_root)[rule]


def scale_wrong_logits(folder):
    """The same classes with a smaller loss."""

    def change(logits, labels, rows):
        wrong = logits.argmax(axis=1) != labels
        logits[wrong] *= np.float32(0.5)
        return logits, labels, rows

    edit_predictions(folder, change)


def raise_right_logits(folder):
    def change(logits, labels, rows):
        logits[np.arange(12), labels[:12]] += 9
        return logits, labels, rows

    edit_predictions(folder, change)


def select_other_weights(folder):
    """The other evaluation becomes the best one, also in metrics.jsonl."""
    other = {4: 8, 8: 4}[records.read_record(folder)["selection"]["step"]]

    def best(line):
        is_other = line["step"] == other and "val/loss" in line
        return line | {"val/accuracy": 0.9} if is_other else line

    edit_metrics(folder, lambda lines: list(map(best, lines)))
    selection = {"step": other, "val_accuracy": 0.9}
    selection |= {"last_val_accuracy": 0.9} if other == 8 else {}
    edit(folder, lambda record: record["selection"].update(selection))
    set_scores("val", accuracy=0.9)(folder, None)


def damage_the_checkpoint(folder):
    for file in folder.glob("checkpoints/*/SHA256SUMS"):
        file.write_text(file.read_text().replace("0", "1"))


FORGERIES_OF_WEIGHTS = {
    "scaled logits of wrong examples": (scale_wrong_logits, "0 of 21 classes differ"),
    "raised logits of labels": (raise_right_logits, "of 21 classes differ, 0 of them"),
    "other weights": (select_other_weights, "the weights are of"),
    "a smaller model": (lambda a: set_fields(params={"total": 9})(a, None), "total is 9, the mod"),
    "a damaged checkpoint": (damage_the_checkpoint, "checkpoint"),
}


@pytest.mark.parametrize("name", FORGERIES_OF_WEIGHTS)
def test_saved_weights_show_a_forgery_that_nothing_else_shows(
    name, trained_run, tmp_path, data_root
):
    folder = shutil.copytree(trained_run, tmp_path / trained_run.name)
    forge, message = FORGERIES_OF_WEIGHTS[name]
    forge(folder)
    ((rule, reason),) = failures(folder, data_root).items()
    assert rule == "weights"
    assert message in reason


def test_honest_runs_pass_and_a_sample_of_weights_is_enough(
    trained_run, other_seed, data_root, capsys
):
    words = [trained_run, other_seed.parent, "--rescore", 1, "--data-root", data_root]
    assert main(["check", *map(str, words)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "2 records, none failed"
    for line, folder in zip(lines, sorted([trained_run, other_seed]), strict=True):
        assert line.startswith(f"ok {folder}: checked: schema, config, folder, task, model, prot")
        assert "selection, test scores, rows, train data, val data, test data, labels, see" in line
    assert sum(", seeds, weights" in line for line in lines) == 1
    assert sum("weights (not in the sample)" in line for line in lines) == 1


def test_committed_records_pass(tmp_path, capsys):
    words = [ROOT / "results" / "runs", "--rescore", 1, "--data-root", tmp_path]
    assert main(["check", *map(str, words)]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) >= 9
    assert all(line.startswith("ok ") and ", test data, labels, seeds" in line for line in lines)


def test_absent_data_are_never_a_pass(runs, tmp_path):
    """A record of Image with the published hashes, and with others."""
    cfg = compose(["task=image"])
    image, task = build_task(cfg), run_config(cfg)["task"]
    hashes, sizes = expected_hashes(image), image.split_sizes()
    splits = {name: {"count": sizes[name], "sha256": hashes[name]} for name in hashes}
    data = {"source": "release", "splits": splits, "key": data_key(splits), "partial": False}
    run = edit_config(runs[0], lambda config: config.update(task=task), task="image", data=data)
    verdict, _ = check_records([tmp_path], tmp_path / "nowhere")
    assert {f"{name} data" for name in splits} <= set(verdict.passed)
    (names,) = (names for why, names in verdict.unchecked.items() if "data absent: " in why)
    assert names == ["labels"]
    set_hash("train")(run, None)
    edit_data(run, lambda splits: splits["test"].update(count=9_000))
    found = failures(run, tmp_path / "nowhere")
    assert "checksums.json has" in found["train data"]
    assert "count is 9000, the task has 10000" in found["test data"]


def test_a_failure_is_one_line_and_code_6(runs, data_root, capsys):
    set_scores("test", accuracy=0.9)(*runs)
    words = ["check", str(runs[0].parent), "--data-root", str(data_root)]
    assert main(words) == 6
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["FAIL", "ok"]
    assert err == "lra: error: 1 of 2 records failed\n"


@pytest.mark.parametrize("place", ["", "nowhere", "notes.txt"])
def test_a_path_without_runs_is_one_line(place, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no record")
    assert main(["check", str(tmp_path / place)]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no run; name a run folder" in line


def test_a_foreign_class_is_not_run_and_its_claims_stay_unchecked(runs, data_root):
    run, _ = runs
    edit_config(run, lambda config: config["model"].update(_target_="mine.Model"))
    verdict, _ = check_records([run.parent], data_root)
    assert set(verdict.failed) == {"model"}  # stu is another class
    (names,) = (names for why, names in verdict.unchecked.items() if "--allow-target" in why)
    assert names == ["train data", "val data", "test data", "labels"]


def test_an_unfinished_run_claims_no_score(runs, data_root):
    set_fields(status="preempted", metrics=None)(*runs)
    verdict, _ = check_records([runs[0].parent], data_root)
    assert not verdict.failed
    assert {"test scores", "labels"} <= set(verdict.unchecked["the run is preempted"])


def test_without_data_the_test_split_is_generated_and_nothing_is_written(runs, tmp_path):
    verdict, _ = check_records([tmp_path], tmp_path / "nowhere")
    assert not verdict.failed
    assert {"test data", "labels"} <= set(verdict.passed)
    assert verdict.unchecked["`lra data prepare` makes it"] == ["train data", "val data"]
    assert verdict.unchecked["none are kept"] == ["weights"]
    assert not (tmp_path / "nowhere").exists()
