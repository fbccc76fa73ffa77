"""Learning curves and diagnostics as files."""

import json
import shutil

import numpy as np
import pytest

from lra.errors import LraError
from lra.report.intervals import accuracy_row
from lra.report.plots import (
    median_curve,
    plot_diagnostics,
    plot_efficiency,
    plot_learning_curves,
)
from lra.report.selection import select_runs
from lra.runs.records import read_record
from lra.runs.run_folder import load_records


def test_median_is_taken_at_steps_that_all_runs_evaluated():
    runs = [
        np.asarray([[1, 10.0], [2, 20.0], [3, 30.0]]),
        np.asarray([[1, 30.0], [3, 50.0]]),
        np.asarray([[1, 20.0], [3, 90.0]]),
    ]
    steps, median = median_curve(runs)
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(median, [20.0, 50.0])


def test_learning_curves_show_the_runs_of_the_table(copied_run, tmp_path):
    with pytest.raises(LraError, match="no finished run with metrics below"):
        plot_learning_curves([tmp_path / "empty"], tmp_path / "curves.png")
    other = shutil.copytree(copied_run, tmp_path / "other")
    record = read_record(other)
    record["config"]["optim"]["lr"] = 0.1  # another configuration is not another seed
    (other / "record.json").write_text(json.dumps(record))
    (selected,) = select_runs(load_records([tmp_path])).values()
    assert len(selected.runs) == 1
    path = plot_learning_curves([tmp_path], tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LraError, match="cannot draw"):
        plot_learning_curves([tmp_path], tmp_path / "curves.doc")


def test_runs_without_a_sound_curve_are_left_out_with_a_line(copied_run, tmp_path, caplog):
    runs = tmp_path / "runs"
    for name, seed in (("good", 0), ("damaged", 1), ("empty", 2), ("silent", 3)):
        folder = shutil.copytree(copied_run, runs / name)
        record = read_record(folder) | {"seed": seed, "model": "_$x$\x1b[31m", "reference": None}
        (folder / "record.json").write_text(json.dumps(record))
    (runs / "empty" / "metrics.jsonl").unlink()
    lines = (runs / "damaged" / "metrics.jsonl").read_text().splitlines()
    lines[1] = '{"step": 2, "val/accuracy": "high"}'
    (runs / "damaged" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    silent = '{"step": 4, "val/accuracy": null}\n'
    (runs / "silent" / "metrics.jsonl").write_text(silent)
    text = plot_learning_curves([runs], tmp_path / "curves.svg").read_text()
    assert r"_$x$\x1b[31m, n=1" in text  # a comment beside the glyphs
    first, *others = caplog.messages
    assert "damaged/metrics.jsonl, line 2 has val/accuracy='high': input should be" in first
    assert [line.split()[-5:] for line in others] == [
        ["no", "validation", "accuracy", "in", "metrics.jsonl"]
    ] * 2
    shutil.rmtree(runs / "good")
    with pytest.raises(LraError, match="no finished run with metrics below"):
        plot_learning_curves([runs], tmp_path / "curves.svg")


def test_a_missing_folder_of_the_plot_is_one_line(copied_run, tmp_path):
    with pytest.raises(LraError, match=r"nowhere.*No such file or directory; correct the path"):
        plot_learning_curves([copied_run], tmp_path / "nowhere" / "curves.png")


def test_diagnostics_are_drawn_and_other_file_types_refused(tmp_path):
    rows = [accuracy_row("as trained " * 9, np.ones(4)), accuracy_row("x", np.zeros(3))]
    assert "accuracy, %" in plot_diagnostics({"length": rows}, tmp_path / "a.svg").read_text()
    with pytest.raises(LraError, match="cannot draw"):
        plot_diagnostics({"length": rows}, tmp_path / "a.doc")


def test_efficiency_is_drawn_without_cells_that_failed(tmp_path):
    cell = {"row": "stu", "seq_len": 64, "status": "ok", "train": {"steps_per_s": 2.0}}
    cell |= {"infer": {"steps_per_s": 5.0}, "memory": {"train_bytes": 10**9}}
    cells = [cell, cell | {"seq_len": 128}, {"row": "gru", "seq_len": 64, "status": "oom"}]
    text = plot_efficiency(cells, tmp_path / "a.svg").read_text()
    assert "<!-- stu -->" in text
    assert "<!-- gru -->" not in text
