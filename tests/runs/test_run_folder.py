"""Run folders: atomic files, one owner, recovery after a kill, and loading many records."""

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from deadline import deadline

from lra.errors import LraError, RunFolderError
from lra.runs import records, run_folder
from lra.runs.records import read_predictions
from lra.runs.run_folder import RunFolder, load_records

ROOT = Path(__file__).resolve().parents[2]


def a_record(**changes):
    names = {"task": "listops_short", "model": "stu", "protocol": "strict"}
    return {"status": "finished", **names, "seed": 0, "config": {"seed": 0}, **changes}


def python(code, *arguments, **options):
    """A second process that sees this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


@contextmanager
def largest_file(size):
    """Writes past `size` fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_comes_back_in_strict_json(tmp_path):
    given = a_record(
        metrics={"test": {"accuracy": np.float32(0.5), "loss": float("nan")}},
        memory={"peak_bytes": np.int64(7)},
        step=3,
    )
    with RunFolder(tmp_path / "run") as folder:
        assert folder.read_record() is None
        folder.write_record(given)
        found = folder.read_record()
    assert found == {
        **given,
        "schema": 1,
        "metrics": {"test": {"accuracy": 0.5, "loss": None}},
        "memory": {"peak_bytes": 7},
    }
    text = (tmp_path / "run" / "record.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"status": "done"}, "has status='done': input should be 'running', 'finished', "),
        ({"model": None}, "has model=None: input should be a valid string"),
        ({"config": "lr=1"}, "has config='lr=1': input should be a valid dictionary"),
        (
            {"metrics": {"test": {"accuracy": 61.0}}},
            r"metrics\.test\.accuracy=61.0: input should be",
        ),
        ({"config": {"f": object()}}, "no JSON form"),
    ],
)
def test_a_bad_record_is_refused_and_the_old_one_stays(tmp_path, changes, complaint):
    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(step=1))
        with pytest.raises((ValueError, TypeError), match=complaint):
            folder.write_record(a_record(**changes))
        assert folder.read_record()["step"] == 1


def test_a_second_process_is_refused_with_the_name_of_the_owner(tmp_path):
    code = "import sys; from lra.runs.run_folder import RunFolder; RunFolder(sys.argv[1])"
    with RunFolder(tmp_path / "run"):
        done = python(code, tmp_path / "run", stderr=subprocess.PIPE)
        error = done.communicate(timeout=30)[1].strip().splitlines()[-1]
    assert done.returncode != 0
    assert "RunFolderError" in error
    for part in (str(tmp_path / "run"), f"process {os.getpid()} on", "set another output.root"):
        assert part in error
    RunFolder(tmp_path / "run").close()  # free again


WRITES = {
    "record": lambda folder: folder.write_record(a_record(step=2)),
    "metrics": lambda folder: folder.append_metrics({"step": 2}),
    "truncated metrics": lambda folder: folder.truncate_metrics(0),
    "predictions": lambda folder: folder.write_predictions(np.eye(2), [0, 1], [0, 1]),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("taken", [False, True])
def test_a_run_whose_lock_was_removed_writes_nothing_more(tmp_path, write, taken):
    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(step=1))
        folder.append_metrics({"step": 1})
        (tmp_path / "run.lock").unlink()
        other = RunFolder(tmp_path) if taken else None
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(RunFolderError, match=r"run\.lock was removed during the run") as caught:
            WRITES[write](folder)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        if other:
            WRITES[write](other)
            other.close()


@pytest.mark.parametrize("write", WRITES)
def test_a_run_whose_folder_was_removed_ends_in_one_line(tmp_path, write):
    with RunFolder(tmp_path / "run") as folder:
        folder.append_metrics({"step": 1})
        shutil.rmtree(tmp_path / "run")
        if write == "truncated metrics":  # nothing to truncate
            return
        with pytest.raises(RunFolderError, match="run was removed during the run, so"):
            WRITES[write](folder)
    assert not (tmp_path / "run").exists()


def test_a_starting_run_waits_for_a_short_shared_lock(tmp_path):
    RunFolder(tmp_path).close()
    descriptor = os.open(tmp_path / records.LOCK, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, (descriptor,)).start()
    RunFolder(tmp_path).close()


def test_a_shared_lock_does_not_count_as_running(tmp_path):
    RunFolder(tmp_path).close()
    with open(tmp_path / records.LOCK) as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert not run_folder.is_locked(tmp_path)


def test_metrics_are_truncated_to_the_step_a_run_resumes_from(tmp_path):
    with RunFolder(tmp_path) as folder:
        assert folder.truncate_metrics(0) == 0  # nothing written yet
        for step in range(0, 50, 10):
            folder.append_metrics({"step": step, "train/loss": 1 / (step + 1), "bad": float("inf")})
        assert folder.truncate_metrics(20) == 3
        folder.append_metrics({"step": np.int32(30), "train/loss": 0.0})
        rows = records.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert rows[1] == {"step": 10, "train/loss": 1 / 11, "bad": None}


def test_a_truncated_last_line_is_dropped_before_the_next_append(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.append_metrics({"step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    assert records.read_metrics(tmp_path) == [{"step": 1}]
    with RunFolder(tmp_path) as folder:
        folder.append_metrics({"step": 3})
        assert records.read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]


def test_predictions_come_back_with_their_rows(tmp_path):
    logits, labels, rows = np.eye(3, 4), np.array([0, 1, 3]), np.array([5, 6, 8])
    with RunFolder(tmp_path) as folder:
        assert read_predictions(tmp_path) is None
        folder.write_predictions(logits, labels, rows)
        found = read_predictions(tmp_path)
    assert found["logits"].dtype == np.float32
    for name, expected in (("logits", logits), ("labels", labels), ("rows", rows)):
        np.testing.assert_array_equal(found[name], expected)


def test_a_full_disk_is_one_line_and_leaves_the_previous_version(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(step=1))
        folder.append_metrics({"step": 1})
        with largest_file(1 << 20):
            with pytest.raises(LraError, match=r"record\.json: .*MiB free") as caught:
                folder.write_record(a_record(step=2, error="x" * (2 << 20)))
            with pytest.raises(LraError, match=r"metrics\.jsonl"):
                folder.append_metrics({"step": 2, "text": "x" * (2 << 20)})
        assert "\n" not in str(caught.value)
        assert folder.read_record()["step"] == 1
        folder.append_metrics({"step": 3})
        assert records.read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "record.json",
        "run.lock",
    ]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LraError, match=os.strerror(errno.ENOTDIR)):
        RunFolder(tmp_path / "file" / "run")


WRITE_UNTIL_KILLED = """
import sys
from lra.runs.run_folder import RunFolder
folder, step = RunFolder(sys.argv[1]), 0
while True:
    step += 1
    folder.append_metrics({"step": step, "text": "y" * 5000})
    names = dict(task="t", model="m", protocol="p", seed=0, config={"text": "x" * 200_000})
    folder.write_record({"status": "running", "step": step, **names})
    if step == 3:
        print("writing", flush=True)
"""


def test_a_killed_writer_leaves_complete_files_and_a_dead_run(tmp_path):
    folder, delay = tmp_path / "run", random.Random(0)
    for _ in range(3):
        writer = python(WRITE_UNTIL_KILLED, folder)
        assert writer.stdout.readline() == "writing\n"
        assert load_records([folder])[0]["status"] == "running"
        time.sleep(delay.uniform(0, 0.03))
        writer.kill()
        writer.communicate()
        (record,) = load_records([tmp_path])
        assert record["status"] == "dead"
        assert record["config"] == {"text": "x" * 200_000}
        with RunFolder(folder) as taken_up:
            rows = records.read_metrics(folder)
            assert (
                0 <= rows[-1]["step"] - record["step"] <= 1
            )  # the line is written before the record
            taken_up.truncate_metrics(0)
    assert not list(folder.glob(".*"))  # the next owner removes temporary files


WRITE_MANY = """
import sys
from lra.runs.run_folder import RunFolder
root, worker = sys.argv[1], int(sys.argv[2])
for index in range(10):
    with RunFolder(f"{root}/{worker}-{index}") as folder:
        names = dict(task="t", model="m", protocol="p", seed=index, config={"worker": worker})
        for step in range(10):
            folder.append_metrics({"step": step})
            status = "finished" if step == 9 else "running"
            folder.write_record({"status": status, "step": step, **names})
"""


def test_concurrent_writers_lose_nothing(tmp_path, caplog):
    writers = [python(WRITE_MANY, tmp_path, worker) for worker in range(3)]
    while any(writer.poll() is None for writer in writers):
        assert len(load_records([tmp_path])) <= 30  # an incomplete record would log a warning
    assert [writer.wait() for writer in writers] == [0] * 3
    for writer in writers:
        writer.stdout.close()
    found = load_records([tmp_path])
    assert {(r["config"]["worker"], r["seed"]) for r in found} == {
        (w, i) for w in range(3) for i in range(10)
    }
    assert {(r["status"], r["step"]) for r in found} == {("finished", 9)}
    assert all(
        [row["step"] for row in records.read_metrics(r["path"])] == list(range(10)) for r in found
    )
    assert not caplog.messages


def test_pipes_in_a_run_folder_are_refused(tmp_path):
    """A plain read of a pipe would wait for a writer."""
    with RunFolder(tmp_path / "lock") as folder:
        folder.write_record(a_record(status="running"))
    for name, file in (("lock", "run.lock"), ("metrics", "metrics.jsonl")):
        path = tmp_path / name / file
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with deadline(10), pytest.raises(LraError, match=f"{file}: is not a regular file"):
            RunFolder(path.parent)
    with deadline(10):
        assert [record["status"] for record in load_records([tmp_path])] == ["dead"]


def test_loading_skips_each_broken_record_with_a_warning(tmp_path, caplog):
    with RunFolder(tmp_path / "a" / "finished") as folder:
        folder.write_record(a_record())
    with RunFolder(tmp_path / "a" / "dead") as folder:
        folder.write_record(a_record(status="running"))
    for name, text in {
        "torn": '{"schema": 1,',
        "newer": '{"schema": 2}',
        "list": "[1]",
        "short": '{"schema": 1}',
        "deep": "[" * 9999,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "record.json")  # a plain read would wait for a writer
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with RunFolder(tmp_path / "b" / "alive") as folder:
        folder.write_record(a_record(status="running"))
        found = load_records(
            [
                tmp_path,
                tmp_path / "a",
                tmp_path / "a" / "dead" / "record.json",
                tmp_path / "nowhere",
            ]
        )
    status = {Path(record["path"]).name: record["status"] for record in found}
    assert status == {"finished": "finished", "dead": "dead", "alive": "running"}
    assert len(found) == 3  # no folder twice
    lines = caplog.messages
    assert len(lines) == 7
    for word in (
        "torn/record.json is not JSON",
        "newer/record.json has schema=2: input should be 1",
        "list/record.json has =[1]: input should be a valid dictionary",
        "short/record.json lacks status",
        "deep/record.json is not JSON (recursion limit exceeded",
        "pipe/record.json cannot be read: is not a regular file",
        "nowhere: no such folder",
    ):
        assert any(word in line for line in lines), word
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_that_finishes_during_the_lock_check_is_not_dead(tmp_path, monkeypatch):
    def finishes_now(path):
        with RunFolder(path) as folder:
            folder.write_record(a_record(status="finished"))
        return False

    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(status="running"))
    monkeypatch.setattr(run_folder, "is_locked", finishes_now)
    assert load_records([tmp_path])[0]["status"] == "finished"
