"""Load, not correctness: many runs in one process, many processes at one folder. Minutes, so only `pytest -m soak` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY

from lra.runs import records

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]

# two seeds: what a seed compiles is compiled once; each run starts from nothing in a folder of its own
RUN_MANY = """
import gc, json, os, sys
import psutil
import lra

count, root, *overrides = json.loads(sys.argv[1])
process = psutil.Process()
for index in range(count):
    lra.train([*overrides, f"seed={index % 2}", f"output.root={root}/{index}"])
    gc.collect()
    print(json.dumps([process.memory_info().rss, process.num_fds(), process.num_threads()]), file=sys.stderr, flush=True)
"""


def test_a_hundred_runs_in_one_process_grow_neither_in_memory_nor_in_files(data_root, tmp_path):
    arguments = json.dumps([100, str(tmp_path), *TINY, f"data.root={data_root}"])
    done = subprocess.run(
        [sys.executable, "-c", RUN_MANY, arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stderr.splitlines()]
    memory, files, threads = zip(*measured, strict=True)
    growth = max(memory[90:]) / memory[9] - 1
    print(
        f"\nafter 10 runs {memory[9] / 2**20:.0f} MiB, {files[9]} files, {threads[9]} threads; ",
        end="",
    )
    print(
        f"after 100 {memory[-1] / 2**20:.0f} MiB, {files[-1]}, {threads[-1]}; growth {100 * growth:.1f} %"
    )
    assert len(measured) == len(run_folder.load_records([tmp_path])) == 100
    assert growth <= 0.05
    assert files[-1] <= files[9]


WRITE_MANY = """
import sys
from lra.runs.records import RunFolder
root, worker = sys.argv[1], int(sys.argv[2])
for index in range(20):
    with RunFolder(f"{root}/{worker}-{index}") as folder:
        names = dict(task="t", model="m", protocol="p", seed=index, config={"worker": worker})
        for step in range(20):
            folder.append_metrics({"step": step})
            folder.write_record({"status": "finished" if step == 19 else "running", "step": step, **names})
"""


def test_fifty_processes_write_through_the_record_layer_and_lose_nothing(tmp_path, capsys):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITE_MANY, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(worker)], env=environment) for worker in range(50)]
    while any(writer.poll() is None for writer in writers):
        assert (
            len(run_folder.load_records([tmp_path])) <= 1000
        )  # every record seen on the way is whole, or stderr would tell
    assert [writer.returncode for writer in writers] == [0] * 50
    found = run_folder.load_records([tmp_path])
    assert {(r["config"]["worker"], r["seed"]) for r in found} == {
        (w, i) for w in range(50) for i in range(20)
    }
    assert len(found) == 1000
    assert {(r["status"], r["step"]) for r in found} == {("finished", 19)}
    assert all(
        [row["step"] for row in records.read_metrics(r["path"])] == list(range(20)) for r in found
    )
    assert capsys.readouterr().err == ""
    print(f"{len(found)} records, {sum(len(records.read_metrics(r['path'])) for r in found)} lines")
