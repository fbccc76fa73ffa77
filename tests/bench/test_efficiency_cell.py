"""A cell of `lra bench efficiency`: what is measured, and how failures and out of memory end."""

import subprocess

import jax
import numpy as np
import pytest

import lra
from lra.bench.efficiency_cell import measure, random_batch, run_cell
from lra.config.build import build_task
from lra.config.options import options

SMALL = [
    "task=listops_short",
    "task.max_length=30",
    "trainer.batch_size=3",
    "backbone.width=8",
    "backbone.depth=1",
]


@pytest.mark.slow
def test_a_cell_is_measured():
    found = measure([*SMALL, "model=lru"], seconds=0.02)
    assert found["status"] == "ok"
    assert (found["seq_len"], found["batch_size"], found["depth"], found["width"]) == (32, 3, 1, 8)
    for name in ("train", "infer"):
        assert found[name]["steps_per_s"] > 0
        assert found[name]["examples_per_s"] == pytest.approx(3 * found[name]["steps_per_s"])
        assert found[name]["compile_s"] > 0
    memory = found["memory"]
    assert 4 * found["params"] < memory["infer_bytes"] < memory["train_bytes"] < 10**8
    assert found["flops"] > 2 * found["params"]


def test_memory_that_would_run_out_on_a_cpu_is_foreseen(monkeypatch):
    monkeypatch.setattr("lra.bench.efficiency_cell.device_bytes", lambda device: 1000)
    found = measure([*SMALL, "model=lru"], seconds=0.02)
    assert found["status"] == "oom"
    assert "infer needs 0.00 GB by XLA's analysis, 0.00 GB are free" in found["reason"]


@pytest.mark.parametrize(
    ("code", "stderr", "status", "reason"),
    [
        (-9, "", "oom", "killed by the system"),
        (1, "Traceback\nXlaRuntimeError: RESOURCE_EXHAUSTED: Out", "oom", "XlaRuntimeError: RES"),
        (-11, "", "failed", "no message, exit code -11"),
        (1, "Traceback\nKeyError: 3", "failed", "KeyError: 3"),
    ],
)
def test_the_end_of_a_process_is_a_result(code, stderr, status, reason, monkeypatch):
    done = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done)
    found = run_cell([], 1.0, 9.0)
    assert found["status"] == status
    assert found["reason"].startswith(reason)


def test_a_cell_that_takes_too_long_fails():
    found = run_cell([*SMALL, "model=lru"], 1.0, 0.01)
    assert found == {"status": "failed", "reason": "took longer than limit_s=0.01 seconds"}


@pytest.mark.slow
def test_a_process_reports_the_error_of_its_config():
    """In a real process, for a model that the backbone refuses."""
    found = run_cell([*SMALL, "model=transformer", "model.num_heads=3"], 0.02, 300.0)
    assert found["status"] == "failed"
    assert "8" in found["reason"]
    assert "3" in found["reason"]


@pytest.mark.parametrize("name", options("task"))
def test_random_inputs_have_the_form_that_the_task_stores(name):
    task = build_task(lra.compose([f"task={name}"]))
    batch = random_batch(task, 2)
    decoded = jax.eval_shape(task.decode, batch.inputs)
    pair = (2,) if task.dual else ()
    features = () if task.num_tokens is not None else (task.num_features,)
    assert decoded.shape == (2, *pair, task.seq_len, *features)
    assert np.all(np.asarray(batch.lengths) == task.seq_len)
    assert len(np.unique(np.asarray(batch.inputs))) > min(task.num_tokens or 100, 100) // 2
