"""Load tests: many runs in one process, many processes that write records.

They take minutes. Only `pytest -m soak` runs them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY

from lra.runs.records import read_metrics
from lra.runs.run_folder import load_records

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]
NUM_RUNS = 100
NUM_WRITERS, NUM_RECORDS = 50, 20

# Two seeds, so that most runs find their programs compiled. Each run has a folder of its own.
RUN_MANY = """
import gc, json, os, sys
import psutil
import lra

count, root, *overrides = json.loads(sys.argv[1])
process = psutil.Process()
for index in range(count):
    lra.train([*overrides, f"seed={index % 2}", f"output.root={root}/{index}"])
    gc.collect()
    usage = process.memory_info().rss, process.num_fds(), process.num_threads()
    print(json.dumps(usage), file=sys.stderr, flush=True)
"""


def test_many_runs_in_one_process_do_not_leak_memory_or_files(data_root, tmp_path):
    arguments = json.dumps([NUM_RUNS, str(tmp_path), *TINY, f"data.root={data_root}"])
    done = subprocess.run(
        [sys.executable, "-c", RUN_MANY, arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    usage = [json.loads(line) for line in done.stderr.splitlines()]
    memory, files, threads = zip(*usage, strict=True)
    growth = max(memory[-10:]) / memory[9] - 1
    for index in (9, -1):
        mib = memory[index] / 2**20
        print(f"\n{mib:.0f} MiB, {files[index]} files, {threads[index]} threads", end="")
    print(f"; growth {growth:.1%}")
    assert len(usage) == len(load_records([tmp_path])) == NUM_RUNS
    assert growth <= 0.05
    assert files[-1] <= files[9]


WRITE_MANY = """
import sys
from lra.runs.run_folder import RunFolder
root, worker, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for index in range(count):
    with RunFolder(f"{root}/{worker}-{index}") as folder:
        names = dict(task="t", model="m", protocol="p", seed=index, config={"worker": worker})
        for step in range(20):
            folder.append_metrics({"step": step})
            status = "finished" if step == 19 else "running"
            folder.write_record({"status": status, "step": step, **names})
"""


def test_many_processes_write_records_and_lose_none(tmp_path, capsys):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_MANY, str(tmp_path), str(worker), str(NUM_RECORDS)],
            env=environment,
        )
        for worker in range(NUM_WRITERS)
    ]
    total = NUM_WRITERS * NUM_RECORDS
    while any(writer.poll() is None for writer in writers):
        assert len(load_records([tmp_path])) <= total  # warns of a torn record on stderr
    assert [writer.returncode for writer in writers] == [0] * NUM_WRITERS
    found = load_records([tmp_path])
    assert len(found) == total
    assert {(r["config"]["worker"], r["seed"]) for r in found} == {
        (worker, index) for worker in range(NUM_WRITERS) for index in range(NUM_RECORDS)
    }
    assert {(r["status"], r["step"]) for r in found} == {("finished", 19)}
    for record in found:
        assert [row["step"] for row in read_metrics(record["path"])] == list(range(20))
    assert capsys.readouterr().err == ""
