"""Helpers for tests of runs on several devices and in several processes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lra.runs.records import read_metrics, read_predictions, read_record

ROOT = Path(__file__).parents[2]
# 2.5 epochs; dropout masks and batch-norm statistics are those of the whole batch
PARALLEL_RUN = [
    "model=lru",
    "backbone.depth=1",
    "trainer.batch_size=8",
    "trainer.steps=20",
    "trainer.eval_every=5",
    "trainer.log_every=5",
    "backbone.dropout=0.1",
    "backbone.norm=batch",
]


def run_python(code, devices):
    """Returns the output of a new process with that many CPU devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | flags | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_close_run(folder, other):
    """Asserts that two runs are the same up to rounding."""
    record, expected = read_record(folder), read_record(other)
    assert record["status"] == expected["status"] == "finished"
    for split in ("train", "val", "test"):
        ours, theirs = record["metrics"][split], expected["metrics"][split]
        assert ours["count"] == theirs["count"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    np.testing.assert_allclose(
        read_predictions(folder)["logits"], read_predictions(other)["logits"], atol=1e-3
    )
    rows, others = read_metrics(folder), read_metrics(other)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, one in zip(rows, others, strict=True):
        if "train/loss" in row:
            assert row["train/loss"] == pytest.approx(one["train/loss"], abs=1e-4)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ProcessPair:
    """A script in two processes; its arguments are overrides, the last one trainer.distributed."""

    def __init__(self, code, overrides):
        members = f"coordinator:'127.0.0.1:{free_port()}',num_processes:2"
        words = [*overrides, "trainer.distributed_timeout=120"]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", code, *words),
                    f"trainer.distributed={{{members},process_id:{number}}}",
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            for number in range(2)
        ]

    def wait(self):
        """Returns (exit code, stdout, stderr) of each process."""
        try:
            outputs = [process.communicate(timeout=200) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [
            (process.returncode, *output)
            for process, output in zip(self.processes, outputs, strict=True)
        ]

    def terminate(self, number):
        self.processes[number].send_signal(signal.SIGTERM)
