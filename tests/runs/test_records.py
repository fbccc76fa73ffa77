"""Does a run's folder keep its promises: whole files, one owner, nothing lost, nothing mistaken for a living run?"""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lra.errors import LraError, RunFolderError
from lra.runs import machine, records, run_folder
from lra.runs.records import config_hash, read_predictions, run_path
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
        ({"status": "done"}, "status 'done'"),
        ({"model": None}, "not a name"),
        ({"config": "lr=1"}, "config that is not an object"),
        ({"config": {"f": object()}}, "no JSON form"),
    ],
)
def test_a_bad_record_is_refused_and_the_old_one_stays(tmp_path, changes, complaint):
    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(step=1))
        with pytest.raises((ValueError, TypeError), match=complaint):
            folder.write_record(a_record(**changes))
        assert folder.read_record()["step"] == 1


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    code = "import sys; from lra.runs.records import RunFolder; RunFolder(sys.argv[1])"
    with RunFolder(tmp_path / "run"):
        done = python(code, tmp_path / "run", stderr=subprocess.PIPE)
        error = done.communicate(timeout=30)[1].strip().splitlines()[-1]
    assert done.returncode != 0
    assert "RunFolderError" in error
    for part in (str(tmp_path / "run"), f"process {os.getpid()} on", "set another output"):
        assert part in error
    RunFolder(tmp_path / "run").close()  # free again


def test_a_passing_probe_does_not_refuse_a_starting_run(tmp_path):
    import fcntl
    import threading

    RunFolder(tmp_path).close()
    descriptor = os.open(tmp_path / records.LOCK, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, (descriptor,)).start()
    RunFolder(tmp_path).close()


def test_a_probe_is_not_taken_for_an_owner(tmp_path):
    import fcntl

    RunFolder(tmp_path).close()
    with open(tmp_path / records.LOCK) as another_probe:
        fcntl.flock(another_probe, fcntl.LOCK_SH)
        assert not run_folder.is_locked(tmp_path)


def test_metrics_are_cut_back_to_the_step_a_run_resumes_from(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.truncate_metrics(0)  # nothing written yet
        for step in range(0, 50, 10):
            folder.append_metrics({"step": step, "train/loss": 1 / (step + 1), "bad": float("inf")})
        folder.truncate_metrics(20)
        folder.append_metrics({"step": np.int32(30), "train/loss": 0.0})
        rows = folder.read_metrics()
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert rows[1] == {"step": 10, "train/loss": 1 / 11, "bad": None}


def test_a_torn_last_line_is_dropped_and_the_next_one_stands_alone(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.append_metrics({"step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    assert records.read_metrics(tmp_path) == [{"step": 1}]
    with RunFolder(tmp_path) as folder:
        folder.append_metrics({"step": 3})
        assert folder.read_metrics() == [{"step": 1}, {"step": 3}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2"):
        records.read_metrics(tmp_path)


def test_predictions_come_back_with_their_rows(tmp_path):
    logits, labels, rows = np.eye(3, 4), np.array([0, 1, 3]), np.array([7, 5, 6])
    with RunFolder(tmp_path) as folder:
        assert read_predictions(tmp_path) is None
        folder.write_predictions(logits, labels, rows)
        found = read_predictions(tmp_path)
        with pytest.raises(ValueError, match=r"rows \(n,\)"):
            folder.write_predictions(logits, labels, rows[:2])
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
        assert folder.read_metrics() == [{"step": 1}, {"step": 3}]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "record.json",
        "run.lock",
    ]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LraError, match=os.strerror(errno.ENOTDIR)):
        RunFolder(tmp_path / "file" / "run")


WRITE_FOR_EVER = """
import sys
from lra.runs.records import RunFolder
folder, step = RunFolder(sys.argv[1]), 0
while True:
    step += 1
    folder.append_metrics({"step": step, "text": "y" * 5000})
    names = dict(task="t", model="m", protocol="p", seed=0, config={"text": "x" * 200_000})
    folder.write_record({"status": "running", "step": step, **names})
    if step == 3:
        print("writing", flush=True)
"""


def test_a_killed_writer_leaves_whole_files_and_a_dead_run(tmp_path):
    folder, chance = tmp_path / "run", random.Random(0)
    for _ in range(6):
        writer = python(WRITE_FOR_EVER, folder)
        assert writer.stdout.readline() == "writing\n"
        assert load_records([folder])[0]["status"] == "running"
        time.sleep(chance.uniform(0, 0.03))
        writer.kill()
        writer.communicate()
        (record,) = load_records([tmp_path])
        assert record["status"] == "dead"
        assert record["config"] == {"text": "x" * 200_000}
        with RunFolder(folder) as taken_up:
            rows = taken_up.read_metrics()
            assert 0 <= rows[-1]["step"] - record["step"] <= 1  # the line goes before the record
            taken_up.truncate_metrics(0)
    assert not list(folder.glob(".*"))  # no temporary file outlives the next owner


WRITE_MANY = """
import sys
from lra.runs.records import RunFolder
root, worker = sys.argv[1], int(sys.argv[2])
for index in range(25):
    with RunFolder(f"{root}/{worker}-{index}") as folder:
        names = dict(task="t", model="m", protocol="p", seed=index, config={"worker": worker})
        for step in range(10):
            folder.append_metrics({"step": step})
            folder.write_record({"status": "finished" if step == 9 else "running", "step": step, **names})
"""


def test_eight_processes_and_two_hundred_folders_lose_nothing(tmp_path, capsys):
    writers = [python(WRITE_MANY, tmp_path, worker) for worker in range(8)]
    while any(writer.poll() is None for writer in writers):
        assert (
            len(load_records([tmp_path])) <= 200
        )  # every record seen on the way is whole, or stderr would tell
    assert [writer.wait() for writer in writers] == [0] * 8
    for writer in writers:
        writer.stdout.close()
    found = load_records([tmp_path])
    assert {(r["config"]["worker"], r["seed"]) for r in found} == {
        (w, i) for w in range(8) for i in range(25)
    }
    assert {(r["status"], r["step"]) for r in found} == {("finished", 9)}
    assert all(
        [row["step"] for row in records.read_metrics(r["path"])] == list(range(10)) for r in found
    )
    assert capsys.readouterr().err == ""


def test_loading_finds_all_and_skips_what_is_broken_with_a_line(tmp_path, capsys):
    with RunFolder(tmp_path / "a" / "finished") as folder:
        folder.write_record(a_record())
    with RunFolder(tmp_path / "a" / "dead") as folder:
        folder.write_record(a_record(status="running"))
    for name, text in {
        "torn": '{"schema": 1,',
        "newer": '{"schema": 2}',
        "list": "[1]",
        "short": '{"schema": 1}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
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
    assert len(found) == 3  # though the same folders were named twice
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    for word in (
        "torn/record.json is not JSON",
        "schema 2",
        "holds a list",
        "lacks status",
        "nowhere: no such folder",
    ):
        assert any(word in line for line in lines), word
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_that_finishes_while_it_is_looked_at_is_not_dead(tmp_path, monkeypatch):
    def finishes_now(path):
        with RunFolder(path) as folder:
            folder.write_record(a_record(status="finished"))
        return False

    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(status="running"))
    monkeypatch.setattr(run_folder, "is_locked", finishes_now)
    assert load_records([tmp_path])[0]["status"] == "finished"


def test_three_thousand_records_load_in_seconds(tmp_path):
    text = json.dumps(
        {"schema": 1, **a_record(status="running", config={f"key{i}": i for i in range(100)})}
    )
    for index in range(3000):
        folder = tmp_path / f"run{index}"
        folder.mkdir()
        (folder / "record.json").write_text(text)
        (folder / "run.lock").touch()
    start = time.perf_counter()
    assert len(load_records([tmp_path])) == 3000
    assert time.perf_counter() - start < 5


def test_the_identity_of_a_run_ignores_where_it_runs(tmp_path):
    config = {
        "seed": 0,
        "optim": {"lr": 1e-3, "betas": (0.9, 0.999), "clip": 1.0},
        "data": {"root": "/a", "seed": 1},
        "output": {"root": "runs"},
        "resume": "never",
        "tracker": {"wandb": "off"},
        "tuning_runs": 1,
    }
    same = {
        **config,
        "data": {"seed": 1, "root": "/b"},
        "output": {"root": "/scratch"},
        "resume": "auto",
        "tracker": {"wandb": "online"},
        "tuning_runs": 9,
        "optim": {"clip": 1, "betas": [0.9, 0.999], "lr": 0.001},
    }
    assert config_hash(config) == config_hash(same)
    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(config=config))
        assert config_hash(folder.read_record()["config"]) == config_hash(config)
    for other in ({"seed": 1}, {"data": {"seed": 2}}, {"optim": {**config["optim"], "lr": 2e-3}}):
        assert config_hash({**config, **other}) != config_hash(config)
    assert config_hash({**config, "seed": 1}, without=["seed"]) == config_hash(
        config, without=["seed"]
    )
    assert config_hash({"lr": True}) != config_hash({"lr": 1})
    deep = {**config, "optim": {**config["optim"], "lr": 2e-3}}
    assert (
        config_hash(deep, without=["optim.lr"])
        == config_hash(config, without=["optim.lr"])
        != config_hash(config)
    )
    assert config_hash(config, without=["lr", "data.lr", "opt"]) == config_hash(config)


def test_the_hash_of_a_config_is_for_ever():
    """Folders of recorded runs are named after it: if this fails, resuming and the table lose them."""
    config = {
        "seed": 3,
        "optim": {"lr": 1e-3, "clip": 1.0},
        "data": {"root": "/a"},
        "trainer": {"progress": True},
    }
    config |= {
        "output": {"root": "runs"},
        "resume": "auto",
        "tracker": {"wandb": "off"},
        "tuning_runs": 2,
    }
    assert config_hash(config)[:8] == "ec307d7f"


def test_where_a_run_lives():
    names = {"task": "listops", "model": "stu", "protocol": "s4", "experiment": None}
    path = run_path("runs", {"seed": 3}, names)
    assert path == Path("runs/listops/stu") / f"s4-s3-{config_hash({'seed': 3})[:8]}"


def test_versions_name_what_computes():
    found = machine.versions()
    assert set(found) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "lra"}
    assert found["numpy"] == np.__version__


@pytest.fixture
def checkout(tmp_path):
    """A repository with a copy of the module, and a function that asks the copy for its commit."""
    home, package = tmp_path / "repo", tmp_path / "repo" / "lra" / "runs"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "lra" / "runs" / "machine.py", package)
    (package.parent / "__init__.py").touch()

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *who, *arguments], cwd=home, check=True, capture_output=True, text=True
        ).stdout

    def commit_seen():
        asked = python(
            "from lra.runs.machine import git_commit; print(git_commit())",
            cwd=tmp_path,
            env={"PYTHONPATH": str(home)},
        )
        return asked.communicate(timeout=30)[0].strip()

    git("init", "-q")
    return home, git, commit_seen


def test_the_commit_is_of_the_code_that_runs(checkout):
    home, git, commit_seen = checkout
    git("commit", "-q", "--allow-empty", "-m", "somebody else's repository")
    assert commit_seen() == "None"  # like a virtual environment inside it
    git("add", "lra")
    git("commit", "-q", "-m", "ours")
    head = git("rev-parse", "--short", "HEAD").strip()
    (home / "runs").mkdir()
    (home / "runs" / "result").touch()
    assert commit_seen() == head
    (home / "lra" / "new_model.py").touch()
    assert commit_seen() == f"{head}+dirty"
