"""`lra bench efficiency`: settings, resumption, and the record and files of a table."""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lra.bench import efficiency
from lra.bench.efficiency import Settings, compose_cells, compose_settings, make_cells, run
from lra.bench.efficiency_table import make_table
from lra.cli import main
from lra.config.build import build_task
from lra.config.compose import compose
from lra.config.options import CONF, options
from lra.errors import LraError
from lra.report.formats import render

ROOT = Path(__file__).parents[2]
SMALL = ["train.backbone.width=8", "train.backbone.depth=1"]
TWO = ["models=[lru,transformer]", "seq_lens=[64,128]", "batch_size=2", *SMALL]
DEVICE = {"platform": "cpu", "kind": "cpu", "count": 1, "cpu": "a", "cores": 2}
OK = {
    **{"status": "ok", "reason": "", "seq_len": 64, "batch_size": 2, "depth": 1, "width": 8},
    **{"params": 1234, "flops": 10**9, "note": ""},
    "memory": {"train_bytes": 2 * 10**9, "infer_bytes": 10**9, "source": "compiled"},
}


@cache
def compose_once(*overrides):
    return compose(overrides)


@pytest.fixture
def results(monkeypatch):
    """Replaces measurements; maps (model, length) to a result or an error, and lists the calls."""
    given, calls = {}, []

    def run_cell(overrides, seconds, limit_s):
        words = dict(word.split("=", 1) for word in overrides)
        calls.append((words["model"], words.get("task.seq_len")))
        rate = 4.0 if words["model"] == "transformer" else 10.0
        speed = {"steps_per_s": rate, "examples_per_s": 2 * rate, "compile_s": 1.5}
        found = given.get(calls[-1], {**OK, "train": speed, "infer": speed})
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(efficiency, "compose", lambda overrides: compose_once(*overrides))
    monkeypatch.setattr(efficiency, "run_cell", run_cell)
    monkeypatch.setattr(efficiency, "device_facts", lambda: dict(DEVICE))
    return given, calls


def rows_of(result):
    text = render(make_table(result), "markdown")
    return text, [
        [word.strip() for word in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


# --- settings ------------------------------------------------------------------------------------


def test_defaults_are_all_models_at_the_lengths_of_the_file():
    settings = compose_settings([])
    cells = make_cells(settings)
    assert [(cell.row, cell.column) for cell in cells] == [
        (model, str(length)) for model in options("model") for length in settings.seq_lens
    ]
    assert cells[0].overrides[:3] == ["trainer.batch_size=32", "task=text", "protocol=lra2020"]


def test_file_and_types_have_the_same_keys():
    file = OmegaConf.load(CONF / "bench" / "efficiency.yaml")
    assert set(file) - {"defaults"} == {field.name for field in fields(Settings)}


def test_words_reach_the_settings_and_the_trained_config():
    (cell,) = make_cells(
        compose_settings(["models=[lru]", "seq_lens=[64]", "train.task=listops", *SMALL])
    )
    (cfg,) = compose_cells([cell])
    assert (cfg.names.task, cfg.names.model, cfg.names.protocol) == ("listops", "lru", "lra2020")
    assert (cfg.backbone.width, cfg.backbone.depth, cfg.trainer.batch_size) == (8, 1, 32)
    assert cfg.task.seq_len == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stu"], "stu: expected KEY=VALUE"),
        (["model=lru,stu"], "model=lru,stu: model= is now models=[A,B]"),
        (["seq_len=64"], "seq_len=64: seq_len= is now seq_lens=[N,M]"),
        (["limit=3"], "limit=3: limit= is now limit_s=SECONDS"),
        (["seq_lenz=[64]"], "unknown key seq_lenz (did you mean seq_lens?)"),
        (["backbone.width=8"], "unknown key backbone.width; expected one of preset, models,"),
        (["models=lru,stu"], "models=lru,stu: expected a list, models=[lru,stu]"),
        (["models=[nothing]"], "models: nothing is unknown; choose of ar_stu"),
        (["models=[stu"], "cannot read an override:"),
        (["seq_lens=[1k]"], "seq_lens[0]=1k is not valid: Value '1k'"),
        (["seq_lens=[0]"], "seq_lens=[0] must be at least 1"),
        (["batch_size=0"], "batch_size=0 must be at least 1"),
        (["batch_size=null"], "batch_size and seq_lens must not be null without a preset"),
        (["seconds=-1"], "seconds=-1.0 must be a number of seconds above 0"),
        (["preset=mine"], "preset=mine is unknown; choose one of lru_paper"),
        (["preset=lru_paper", "seq_lens=[8]"], "a preset fixes seq_lens; drop seq_lens=[8]"),
        (["models=[lru]", "seq_lens=[64]", "train.backbone.wdth=8"], "unknown key backbone.wdth"),
        (
            ["models=[lru]", "seq_lens=[64]", "train.trainer.micro_batch=auto"],
            "trainer.micro_batch=auto is for training",
        ),
        (
            ["models=[lru]", "seq_lens=[64]", "train.trainer.micro_batch=5"],
            "trainer.micro_batch=5 must be a divisor",
        ),
    ],
)
def test_bad_words_are_refused_in_one_line(words, message, tmp_path, capsys):
    assert main(["bench", "efficiency", *words, "--output", str(tmp_path / "e.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lra: error: {message}")
    assert error.count("\n") == 1


# --- table ---------------------------------------------------------------------------------------


def test_table_has_multiples_of_the_baseline_and_out_of_memory(results, tmp_path):
    given, calls = results
    given["transformer", "128"] = {"status": "oom", "reason": "needs 9.00 GB"}
    given["lru", "128"] = {"status": "failed", "reason": "no | such length"}
    file = tmp_path / "new" / "e.json"
    text, rows = rows_of(run(TWO, file))
    assert len(calls) == 4
    assert rows[2:5] == [
        ["**Training, steps/s (times that of transformer)**", "", ""],
        ["lru", "10 (2.5 x)", "- [1]"],
        ["transformer", "4 (1 x)", "OOM [2]"],
    ]
    assert "[1] lru: no | such length" in text
    assert "[2] transformer: needs 9.00 GB" in text
    assert "batch 2, depth 1, width 8" in text
    assert "Also set: backbone.width=8 backbone.depth=1." in text
    assert "XLA's analysis" in text
    assert "Command: lra bench efficiency 'models=[lru,transformer]'" in text
    assert file.with_suffix(".md").read_text() == text
    assert r"4 (1 x) & OOM [2] \\" in file.with_suffix(".tex").read_text()
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_measured_again(results, tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "write_tables", lambda result, file: None)
    given, calls = results
    file = tmp_path / "e.json"
    given["transformer", "64"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(TWO, file)
    assert calls == [("lru", "64"), ("lru", "128"), ("transformer", "64")]
    assert [cell["column"] for cell in json.loads(file.read_text())["cells"]] == ["64", "128"]

    calls.clear()
    given["transformer", "64"] = {"status": "oom", "reason": "?"}
    given["transformer", "128"] = {"status": "failed", "reason": "?"}
    run(TWO, file)
    assert calls == [("transformer", "64"), ("transformer", "128")]

    calls.clear()  # out of memory is a result; a failure is tried again
    del given["transformer", "128"]
    result = run(TWO, file)
    assert calls == [("transformer", "128")]
    assert json.loads(file.read_text())["cells"] == json.loads(json.dumps(result["cells"]))

    calls.clear()  # another config
    run([*TWO[1:3], "models=[lru]", "train.backbone.width=16", SMALL[1]], file)
    assert calls == [("lru", "64"), ("lru", "128")]
    others = json.loads(file.read_text())["others"]
    assert [(cell["row"], cell["column"]) for cell in others] == [
        (cell["row"], cell["column"]) for cell in result["cells"]
    ]

    calls.clear()
    run([*TWO[1:], "models=[lru]"], file, fresh=True)
    assert len(calls) == 2


def test_a_file_of_something_else_is_not_overwritten(results, tmp_path):
    file = tmp_path / "e.json"
    file.write_text('{"suite": "ops", "cells": [], "others": []}')
    with pytest.raises(LraError, match=r"holds no efficiency table.*--fresh"):
        run(["models=[lru]", "seq_lens=[64]"], file)
    assert "ops" in file.read_text()


def test_an_invalid_config_is_a_failed_cell(results, tmp_path):
    words = ["models=[lru,transformer]", "seq_lens=[64]", "train.model.causal=true"]
    result = run(words, tmp_path / "e.json")
    assert [(cell["row"], cell["status"]) for cell in result["cells"]] == [
        ("lru", "failed"),
        ("transformer", "ok"),
    ]
    assert "model=lru has no causal" in result["cells"][0]["reason"]


def test_preset_is_the_table_of_the_paper(results, tmp_path):
    """LRU paper, Table 9: sizes and the steps/s of its A100."""
    words = ["preset=lru_paper", "models=[lru,stu]"]
    cells = make_cells(compose_settings(words))
    found = {}
    for cell, cfg in zip(cells[:6], compose_cells(cells[:6]), strict=True):
        task, model = build_task(cfg), cfg.model
        sizes = cfg.backbone.depth, cfg.backbone.width, model.state_size, cfg.trainer.batch_size
        found[cell.row] = (*sizes, task.seq_len, model.bidirectional, cell.published)
    assert found == {
        "lru, scifar": (6, 512, 384, 50, 1024, False, 15.9),
        "lru, listops": (6, 128, 256, 32, 2048, False, 2.1),
        "lru, text": (6, 256, 192, 32, 4096, False, 14.7),
        "lru, retrieval": (6, 128, 256, 64, 4000, False, 5.7),
        "lru, pathfinder": (6, 192, 256, 64, 1024, True, 15.5),
        "lru, pathx": (6, 128, 256, 32, 16384, True, 2.4),
    }
    text, rows = rows_of(run(words, tmp_path / "e.json"))
    by_name = {row[0]: row for row in rows}
    assert by_name["model"][3:6] == ["published steps/s", "ours / published", "Training, steps/s"]
    assert by_name["lru, listops"][3:6] == ["2.1", "4.76 x", "10"]
    assert by_name["stu, listops"][3:6] == ["", "", "10"]
    assert "Published training steps/s: LRU on one A100, arXiv 2303.06349." in text
    assert not (tmp_path / "e.png").exists()  # one length a row


def test_tables_in_results_are_computed_from_the_recorded_json():
    file = ROOT / "results" / "bench_efficiency_cpu.json"
    result = json.loads(file.read_text())
    assert {cell["row"] for cell in result["cells"]} == set(options("model"))
    table = make_table(result)
    text = render(table, "markdown")
    assert file.with_suffix(".md").read_text() == text
    assert file.with_suffix(".tex").read_text() == render(table, "latex")
    page = (ROOT / "docs" / "speed.md").read_text()
    assert result["command"] in page
    shown = {" ".join(line.split()) for line in page.splitlines()}
    lines = [" ".join(line.split()) for line in text.splitlines()]
    sections = [n for n, line in enumerate(lines) if line.startswith("| **")]
    for title in ("Training, steps/s", "Training, peak memory"):
        (number,) = (i for i, n in enumerate(sections) if f"**{title}" in lines[n])
        assert set(lines[sections[number] : sections[number + 1]]) <= shown
