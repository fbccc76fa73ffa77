"""`lra bench efficiency`: a cell a process, memory that runs out is a result, and nothing is measured twice."""

import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import lra
from lra.bench import efficiency
from lra.bench.efficiency import make_table, measure, measured, plan, random_batch, run
from lra.cli import main
from lra.config.build import build_task
from lra.config.options import options
from lra.errors import LraError
from lra.report.formats import render

TWO = [
    "model=lru,transformer",
    "seq_len=64,128",
    "batch_size=2",
    "backbone.width=8",
    "backbone.depth=1",
]
DEVICE = {"platform": "cpu", "kind": "cpu", "count": 1, "cpu": "a", "cores": 2}


def a_result(train, memory=2_000_000_000, **more):
    speeds = {"steps_per_s": train, "examples_per_s": 2 * train, "compile_s": 1.5}
    size = {
        "seq_len": 64,
        "batch_size": 2,
        "depth": 1,
        "width": 8,
        "params": 1234,
        "flops": 10**9,
        "note": "",
    }
    held = {"train_bytes": memory, "infer_bytes": memory // 2, "source": "compiled"}
    return {
        "status": "ok",
        "reason": "",
        **size,
        "train": speeds,
        "infer": speeds,
        "memory": held,
        **more,
    }


@pytest.fixture
def cells(monkeypatch):
    """What each (model, length) gives instead of a measurement, and the list of those that were asked for."""
    given, asked = {}, []

    def answer(cell, seconds, limit):
        asked.append((cell.row, cell.column))
        found = given.get(asked[-1], a_result(4.0 if cell.row == "transformer" else 10.0))
        if isinstance(found, BaseException):
            raise found
        return found | {"seq_len": int(cell.column or 0)} if found["status"] == "ok" else found

    monkeypatch.setattr(efficiency, "measured", answer)
    monkeypatch.setattr(efficiency, "_device", lambda: dict(DEVICE))
    return given, asked


def rows_of(result):
    text = render(make_table(result), "markdown")
    return text, [
        [word.strip() for word in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_table_has_multiples_of_the_baseline_and_memory_that_ran_out(cells, tmp_path):
    given, asked = cells
    given["transformer", "128"] = {"status": "oom", "reason": "needs 9.00 GB"}
    given["lru", "128"] = {"status": "failed", "reason": "no | such length"}
    file = tmp_path / "new" / "e.json"
    text, rows = rows_of(run(TWO, file, say=lambda line: None))
    assert len(asked) == 4
    assert rows[2:5] == [
        ["**Training, steps/s (times that of transformer)**", "", ""],
        ["lru", "10 (2.5 x)", "- [1]"],
        ["transformer", "4 (1 x)", "OOM [2]"],
    ]
    assert "[1] lru: no | such length" in text
    assert "[2] transformer: needs 9.00 GB" in text
    assert "batch 2, depth 1, width 8" in text
    assert "XLA's analysis" in text
    assert file.with_suffix(".md").read_text() == text
    assert r"4 (1 x) & OOM [2] \\" in file.with_suffix(".tex").read_text()
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_measured_again(cells, tmp_path):
    given, asked = cells
    file = tmp_path / "e.json"
    given["transformer", "64"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(TWO, file, say=lambda line: None)
    assert asked == [("lru", "64"), ("lru", "128"), ("transformer", "64")]
    assert [cell["column"] for cell in json.loads(file.read_text())["cells"]] == ["64", "128"]

    asked.clear()
    given["transformer", "64"] = {"status": "oom", "reason": "?"}
    given["transformer", "128"] = {"status": "failed", "reason": "?"}
    run(TWO, file, say=lambda line: None)
    assert asked == [("transformer", "64"), ("transformer", "128")]

    asked.clear()
    del given["transformer", "128"]
    result = run(
        TWO, file, say=lambda line: None
    )  # out of memory is a result, a failure is tried again
    assert asked == [("transformer", "128")]
    assert json.loads(file.read_text())["cells"] == json.loads(json.dumps(result["cells"]))

    asked.clear()
    run([*TWO[:3], "backbone.width=16", "backbone.depth=1"], file, say=lambda line: None)
    assert len(asked) == 4  # another config
    run(TWO, file, fresh=True, say=lambda line: None)
    assert len(asked) == 8


def test_a_file_of_something_else_is_not_overwritten(cells, tmp_path):
    file = tmp_path / "e.json"
    file.write_text('{"suite": "ops", "cells": [], "others": []}')
    with pytest.raises(LraError, match=r"holds no efficiency table.*--fresh"):
        run(TWO, file)
    assert "ops" in file.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stu"], "stu: expected KEY=VALUE words"),
        (["model=nothing"], "model=nothing is unknown; choose of ar_stu"),
        (["seq_len=1k"], "seq_len=1k must be a whole number"),
        (["batch_size=0"], "batch_size=0 must be a whole number of at least 1"),
        (["seconds=-1"], "seconds=-1 must be a number of seconds above 0"),
        (["preset=mine"], "preset=mine is unknown; choose one of lru_paper"),
        (["preset=lru_paper", "seq_len=8"], "preset=lru_paper fixes seq_len"),
        (["model=lru", "seq_len=64", "backbone.wdth=8"], "unknown key backbone.wdth"),
        (
            ["model=lru", "seq_len=64", "trainer.micro_batch=auto"],
            "trainer.micro_batch=auto is for training",
        ),
        (
            ["model=lru", "seq_len=64", "trainer.micro_batch=5"],
            "trainer.micro_batch=5 must be a divisor",
        ),
    ],
)
def test_bad_words_are_refused_in_one_line(words, said, tmp_path, capsys):
    assert main(["bench", "efficiency", *words, "--output", str(tmp_path / "e.json")]) == 2
    error = capsys.readouterr().err
    assert f"lra: error: {said}" in error
    assert error.count("\n") == 1


def test_a_model_that_refuses_is_a_cell(cells, tmp_path):
    words = ["model=lru,transformer", "seq_len=64", "batch_size=2", "model.causal=true"]
    result = run(words, tmp_path / "e.json", say=lambda line: None)
    assert [(cell["row"], cell["status"]) for cell in result["cells"]] == [
        ("lru", "failed"),
        ("transformer", "ok"),
    ]
    assert "model=lru has no causal" in result["cells"][0]["reason"]


def test_preset_is_the_table_of_the_paper(cells, tmp_path, monkeypatch):
    """LRU paper, Table 9 and its A100's steps/s, as in shared/published/hyperparameters.md."""
    wanted = plan(["preset=lru_paper", "model=lru,stu"])
    found = {}
    for cell, cfg in list(zip(wanted.cells, wanted.configs, strict=True))[:6]:
        task, model = build_task(cfg), cfg.model
        sizes = (
            cfg.backbone.depth,
            cfg.backbone.width,
            model.state_size,
            cfg.trainer.batch_size,
            task.seq_len,
        )
        found[cell.row] = (*sizes, model.bidirectional, cell.published)
    assert found == {
        "lru, scifar": (6, 512, 384, 50, 1024, False, 15.9),
        "lru, listops": (6, 128, 256, 32, 2048, False, 2.1),
        "lru, text": (6, 256, 192, 32, 4096, False, 14.7),
        "lru, retrieval": (6, 128, 256, 64, 4000, False, 5.7),
        "lru, pathfinder": (6, 192, 256, 64, 1024, True, 15.5),
        "lru, pathx": (6, 128, 256, 32, 16384, True, 2.4),
    }
    monkeypatch.setattr(efficiency, "plan", lambda words: wanted)  # composed once
    _, rows = rows_of(
        run(["preset=lru_paper", "model=lru,stu"], tmp_path / "e.json", say=lambda line: None)
    )
    by_name = {row[0]: row for row in rows}
    assert by_name["model"][3:6] == ["published steps/s", "ours / published", "Training, steps/s"]
    assert by_name["lru, listops"][3:6] == ["2.1", "4.76 x", "10"]
    assert by_name["stu, listops"][3:6] == ["", "", "10"]
    assert not (tmp_path / "e.png").exists()  # there is one length a row


SMALL = ["task=listops_short", "task.max_length=30", "model=lru", "trainer.batch_size=3", *TWO[3:]]


def test_a_cell_is_measured():
    found = measure(SMALL, seconds=0.02)
    assert found["status"] == "ok"
    assert (found["seq_len"], found["batch_size"], found["depth"], found["width"]) == (32, 3, 1, 8)
    for name in ("train", "infer"):
        assert found[name]["examples_per_s"] == pytest.approx(3 * found[name]["steps_per_s"])
        assert found[name]["compile_s"] > 0
    assert found["infer"]["steps_per_s"] > found["train"]["steps_per_s"]
    assert (
        4 * found["params"]
        < found["memory"]["infer_bytes"]
        < found["memory"]["train_bytes"]
        < 10**8
    )
    assert found["flops"] > 2 * found["params"]


def test_memory_that_would_run_out_on_a_cpu_is_foreseen(monkeypatch):
    monkeypatch.setattr("lra.training.memory.device_bytes", lambda device: 1000)
    found = measure(SMALL, seconds=0.02)
    assert found["status"] == "oom"
    assert "infer needs 0.00 GB by XLA's analysis, 0.00 GB are free" in found["reason"]


@pytest.mark.parametrize(
    ("code", "stderr", "status", "reason"),
    [
        (-9, "", "oom", "killed by the system"),
        (
            1,
            "Traceback\nXlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
            "oom",
            "XlaRuntimeError: RESOURCE_EXHAUSTED: Out",
        ),
        (-11, "", "failed", "ended without a word"),
        (1, "Traceback\nKeyError: 3", "failed", "KeyError: 3"),
    ],
)
def test_how_a_process_ends_is_a_result(code, stderr, status, reason, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, code, "", stderr)
    )
    found = measured(efficiency.Cell("m", "64", []), 1.0, 9.0)
    assert found["status"] == status
    assert found["reason"].startswith(reason)


def test_a_process_of_its_own_says_what_is_wrong(monkeypatch):
    """The real one, for a model that the backbone refuses."""
    cell = efficiency.Cell(
        "transformer", "64", [*SMALL[:2], "model=transformer", "model.num_heads=3", *TWO[3:]]
    )
    found = measured(cell, 0.02, 300.0)
    assert found["status"] == "failed"
    assert "8" in found["reason"]
    assert "3" in found["reason"]


@pytest.mark.parametrize("name", options("task"))
def test_random_inputs_are_what_a_task_would_store(name):
    task = build_task(lra.compose([f"task={name}"]))
    batch = random_batch(task, 2)
    decoded = jax.eval_shape(task.decode, batch.inputs)
    pair = (2,) if task.dual else ()
    features = () if task.num_tokens is not None else (task.num_features,)
    assert decoded.shape == (2, *pair, task.seq_len, *features)
    assert np.all(np.asarray(batch.lengths) == task.seq_len)
    assert len(np.unique(np.asarray(batch.inputs))) > min(task.num_tokens or 100, 100) // 2


def test_tables_in_results_are_made_of_their_json():
    root = Path(__file__).parents[2]
    file = root / "results" / "bench_efficiency_cpu.json"
    result = json.loads(file.read_text())
    assert {cell["row"] for cell in result["cells"]} == set(options("model"))
    table = make_table(result)
    text = render(table, "markdown")
    assert file.with_suffix(".md").read_text() == text
    assert file.with_suffix(".tex").read_text() == render(table, "latex")
    shown = [
        " ".join(line.split()) for line in (root / "docs" / "speed.md").read_text().splitlines()
    ]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    ends = [n for n, line in enumerate(lines) if line.startswith("| **")]
    assert set(lines[ends[0] : ends[1]]) <= set(shown)  # the first quantity, training steps/s
    memory = next(n for n in ends if "Training, peak memory" in lines[n])
    assert set(lines[memory : ends[ends.index(memory) + 1]]) <= set(shown)
