"""`lra diagnose`: tables against the stored predictions, and the words it accepts."""

import json
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from deadline import deadline
from doc_commands import blocks
from saved_runs import write_record

from lra import cli
from lra.config.build import build_task, data_arguments
from lra.config.compose import compose
from lra.data.store import prepare
from lra.errors import ConfigError, DataError, RunFolderError
from lra.report.diagnose import DIAGNOSTICS, FILE, diagnose, save_result
from lra.runs.records import read_predictions, read_record
from lra.runs.run_folder import RunFolder
from lra.training.evaluation import sample_rows
from lra.training.recorder import describe_data


def tables_of(folder, *words, **options):
    return {name: tables for name, tables, _ in diagnose(folder, words, **options)}


def test_factors_need_the_stored_predictions_alone(copied_run):
    shutil.rmtree(copied_run / "checkpoints")
    found = tables_of(copied_run)["factors"]
    record, stored = read_record(copied_run), read_predictions(copied_run)
    (row,) = found["all"]
    assert row.accuracy == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert row.examples == 21
    assert set(found) == {"all", "label", "length", "depth", "root operator"}
    labels, correct = stored["labels"], stored["logits"].argmax(axis=1) == stored["labels"]
    expected = {str(label): correct[labels == label].mean() for label in set(labels.tolist())}
    assert {row.value: row.accuracy for row in found["label"]} == pytest.approx(expected)
    saved = json.loads((copied_run / FILE).read_text())["factors"]["test"]
    assert (saved["source"], saved["step"]) == ("predictions.npz", record["selection"]["step"])
    (row,) = tables_of(copied_run, examples=5)["factors"]["all"]
    assert row.accuracy == pytest.approx(correct[sample_rows(labels, 5)].mean())
    for words, options in (
        (["permutation"], {}),
        ([], {"split": "val", "examples": 5}),
        ([], {"weights": "last"}),
    ):
        with pytest.raises(RunFolderError, match="holds no checkpoint"):
            tables_of(copied_run, *words, **options)
    record["data"]["splits"]["test"]["sha256"] = "0"
    (copied_run / "record.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="differs from the data of the run"):
        tables_of(copied_run)


def test_several_labels_have_a_row_for_each_place(data_root, tmp_path):
    """The predictions are made by hand."""
    sizes = "task.sizes={train: 4, val: 2, test: 40}"
    overrides = ["task=copy", "task.copy_len=3", sizes, "debug=tiny", f"data.root={data_root}"]
    cfg = compose(overrides)
    store = prepare(task := build_task(cfg), **data_arguments(cfg))
    labels = np.asarray(store.splits["test"].labels)
    guesses = labels.copy()
    guesses[:10, 1] = (guesses[:10, 1] + 1) % task.num_classes
    write_record(tmp_path, overrides, data=describe_data(store), selection={"step": 4})
    with RunFolder(tmp_path) as folder:
        folder.write_predictions(np.eye(task.num_classes)[guesses], labels, np.arange(40))
    found = tables_of(tmp_path)["factors"]
    assert [row.accuracy for row in found["place of the label"]] == [1, 0.75, 1]
    assert found["all"][0].accuracy == pytest.approx(1 - 0.25 / 3)
    with pytest.raises(ConfigError, match="locality: copy has 3 labels"):
        tables_of(tmp_path, "locality")


def test_whole_blocks_and_windows_give_the_recorded_score(copied_run):
    found = tables_of(copied_run, "permutation", "locality", sizes=[32, 8])
    record = read_record(copied_run)
    assert [row.value for row in found["permutation"]["block size"]] == ["8", "32"]
    for table in (found["permutation"]["block size"], found["locality"]["window size"]):
        assert table[-1].accuracy == pytest.approx(record["metrics"]["test"]["accuracy"])
        assert {row.examples for row in table} == {21}


def test_longer_examples_are_scored_beside_those_of_the_run(copied_run):
    words = ["task.min_length=31,45", "task.max_length=44,60"]
    words.append("task.sizes={train: 1, val: 3, test: 9}")
    found = tables_of(copied_run, "length", *words)["length"]["task"]
    record = read_record(copied_run)
    assert found[0].accuracy == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert [row.examples for row in found] == [21, 9, 9]
    assert found[2].value.startswith("task.min_length=45 task.max_length=60 (")
    saved = json.loads((copied_run / FILE).read_text())["length"]["test"]
    assert saved["keys"] == words
    assert [row["value"] for row in saved["tables"]["task"]] == [row.value for row in found]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lenght"], "unknown diagnostic lenght .did you mean length"),
        (["factors", "task.max_length=40"], "only length does; write: length task.max_length=40"),
        (["length", "task.max_lenght=40"], "task=listops_short has no max_lenght .*max_length"),
        (["length", "task._target_=lra.tasks.synthetic.Copy"], "has no _target_ to set"),
        (["length", "task.max_length=10"], "min_length=21, max_length=10"),
        (["length", "task.sizes.test=0", "task.max_length=40"], "task.sizes.test=0 must be"),
        (["length"], "expected a task.KEY=VALUE"),
        (["length", "optim.lr=1"], "the config of a saved run is fixed"),
    ],
)
def test_words_that_are_not_valid_are_refused_in_one_line(words, message, trained_run):
    with pytest.raises(ConfigError, match=message) as caught:
        tables_of(trained_run, *words)
    assert "\n" not in str(caught.value)


def test_numbers_out_of_their_range_are_refused(trained_run, tmp_path):
    with pytest.raises(ConfigError, match="--examples 0: expected 1 or more"):
        tables_of(trained_run, examples=0)
    with pytest.raises(ConfigError, match=r"--sizes 33: expected numbers in \[1, 32\]"):
        tables_of(trained_run, "permutation", sizes=[4, 33])
    with pytest.raises(RunFolderError, match="holds no run"):
        tables_of(tmp_path / "nowhere")


def test_locality_refuses_pairs(tmp_path):
    write_record(tmp_path, ["task=retrieval", "debug=tiny"])
    with pytest.raises(ConfigError, match="locality: an example of retrieval is a pair"):
        tables_of(tmp_path, "locality")


def test_results_of_concurrent_processes_are_all_kept(tmp_path):
    def save(i):
        save_result(tmp_path, f"d{i % 8}", f"s{i // 8}", {"step": i})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(24)))
    found = json.loads((tmp_path / FILE).read_text())
    assert found.pop("schema") == 1
    assert found == {f"d{i}": {f"s{j}": {"step": i + 8 * j} for j in range(3)} for i in range(8)}
    save_result(tmp_path, "d0", "s1", {"step": -1})
    found = json.loads((tmp_path / FILE).read_text())["d0"]
    assert found == {"s0": {"step": 0}, "s1": {"step": -1}, "s2": {"step": 16}}
    for damaged, message in {
        "{": "is not JSON",
        "[" * 100_000: "is not JSON",
        "[]": "input should be a valid dictionary",
        '{"schema": 2}': "schema=2: input should be 1",
    }.items():
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(RunFolderError, match=message):
            save_result(tmp_path, "d0", "s0", {})
        assert (tmp_path / FILE).read_text() == damaged
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)  # a plain read would wait for a writer
    with deadline(10), pytest.raises(RunFolderError, match="is not a regular file; move it away"):
        save_result(tmp_path, "d0", "s0", {})


def test_command_accepts_words_after_options_and_draws(copied_run, tmp_path, capsys):
    plot = tmp_path / "found.png"
    words = ["--split", "val", "--sizes", "4,32", "permutation", "--plot", str(plot), "factors"]
    assert cli.main(["diagnose", str(copied_run), *words, "trainer.eval_batch_size=16"]) == 0
    output = capsys.readouterr().out
    header = "| block size | accuracy, % | 95 % interval | examples |\n|---|---:|---:|---:|\n| 4 | "
    assert header in output
    assert "| root operator | accuracy" in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((copied_run / FILE).read_text())) == {"schema", "permutation", "factors"}
    assert cli.main(["diagnose", str(copied_run), "--sizes", "4,x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--sizes 4,x: expected whole numbers" in error


def test_commands_of_the_page_work(trained_run, tmp_path, monkeypatch, capsys):
    """On the shared run in place of the one that the first command trains."""
    train, *lines = blocks("docs/diagnose.md", "bash")[0].splitlines()
    assert compose(shlex.split(train)[2:]).output.root == "mine"
    folder = tmp_path / "mine/listops_short/lru/strict-s0-12345678"
    shutil.copytree(trained_run, folder)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line.replace("mine/listops_short/lru/*", str(folder)))
        assert cli.main(words[1:]) == 0
        assert "| 95 % interval |" in capsys.readouterr().out
    assert set(json.loads((folder / FILE).read_text())) == {"schema", *DIAGNOSTICS}
    assert (tmp_path / "longer.png").read_bytes().startswith(b"\x89PNG")


def test_help_lists_every_diagnostic():
    lines = [line.split()[0] for line in cli.DIAGNOSE_HELP.split("\n\n")[1].splitlines()]
    assert lines == list(DIAGNOSTICS)
