"""Several devices and several processes give the run of one, and take over each other's checkpoints."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lra
from lra.errors import DataError, LraError, RunFolderError
from lra.runs.records import read_metrics, read_predictions, read_record, run_path
from lra.runs.run_folder import RunFolder
from lra.training import distributed, trainer
from lra.training.data_parallel import DataParallel

ROOT = Path(__file__).parents[2]
# two epochs and a half; dropout and batch norm, whose masks and statistics are those of the whole batch
RUN = [
    "trainer.batch_size=8",
    "trainer.steps=20",
    "trainer.eval_every=5",
    "backbone.dropout=0.1",
    "backbone.norm=batch",
]


def python(code, devices):
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def folder_of(overrides):
    cfg = lra.compose(overrides)
    return run_path(cfg.output.root, trainer.run_config(cfg), dict(cfg.names))


def assert_same_run(folder, other):
    record, expected = read_record(folder), read_record(other)
    assert record["status"] == expected["status"] == "finished"
    for split in ("train", "val", "test"):
        assert record["metrics"][split]["count"] == expected["metrics"][split]["count"]
        assert record["metrics"][split]["loss"] == pytest.approx(
            expected["metrics"][split]["loss"], abs=1e-4
        )
    np.testing.assert_allclose(
        read_predictions(folder)["logits"], read_predictions(other)["logits"], atol=1e-3
    )
    rows, others = read_metrics(folder), read_metrics(other)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, one in zip(rows, others, strict=True):
        if "train/loss" in row:
            assert row["train/loss"] == pytest.approx(one["train/loss"], abs=1e-4)


@pytest.fixture(scope="module")
def alone(data_root, tmp_path_factory):
    """Overrides of a run, and the folder of that run on one device."""
    from tiny import TINY

    overrides = [*TINY, *RUN, f"data.root={data_root}"]
    here = [*overrides, f"output.root={tmp_path_factory.mktemp('alone')}"]
    lra.train(here)
    return overrides, folder_of(here)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["trainer.micro_batch=4"], ["data.placement=host"]])
def test_four_devices_give_the_run_of_one(alone, tmp_path, more):
    overrides, folder = alone
    here = [*overrides, *more, f"output.root={tmp_path}"]
    python(f"import lra; lra.train({here!r})", devices=4)
    record = read_record(folder_of(here))
    assert record["device"]["count"] == 4
    if more == ["trainer.micro_batch=4"]:  # batch norm: to be compared with the same on one device
        one = [*overrides, *more, f"output.root={tmp_path / 'one'}"]
        lra.train(one)
        folder = folder_of(one)
    assert_same_run(folder_of(here), folder)


@pytest.mark.slow
def test_a_checkpoint_of_four_devices_goes_on_on_one(alone, tmp_path):
    overrides, folder = alone
    here = [*overrides, f"output.root={tmp_path}"]
    code = f"""
import os, signal
import lra
from lra import trainer
from lra.errors import PreemptedError
trainer.Rate.steps_per_call = lambda self, done, seconds: 1
trainer.Reporter.advance = lambda self, step, *_: step == 13 and os.kill(os.getpid(), signal.SIGTERM)
try:
    lra.train({here!r})
except PreemptedError:
    print("stopped")
"""
    assert "stopped" in python(code, devices=4)
    assert read_record(folder_of(here))["device"]["count"] == 4
    resumed = lra.train([*here, "resume=auto", "trainer.devices=1"])
    assert resumed["resumed_from"] == [13]
    assert resumed["device"]["count"] == 1
    assert [(part["step"], part["count"]) for part in resumed["segments"]] == [(0, 4), (13, 1)]
    assert_same_run(folder_of(here), folder)


@pytest.mark.slow
def test_devices_that_cannot_share_the_batch_are_refused(tiny):
    code = f"""
import lra
from lra.errors import ConfigError
for more in ([], ["trainer.devices=5"], ["trainer.devices=3", "trainer.batch_size=9", "trainer.micro_batch=1"]):
    try:
        lra.train([*{tiny!r}, "trainer.batch_size=6", *more])
    except ConfigError as error:
        print(error)
"""
    shared, too_many, micro = python(code, devices=4).splitlines()
    assert re.match(
        r"trainer.batch_size=6 \(the global batch\) must be a multiple of the 4 devices", shared
    )
    assert re.match(r"trainer.devices=5: this process has 4 .*take at most 4", too_many)
    assert (
        "trainer.micro_batch=1 must be a divisor of trainer.batch_size=9 and a multiple of the 3 devices"
        in micro
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stu", "s4d", "mega", "transformer"])
def test_no_device_collects_the_examples_of_others(model, tiny):
    """The compiler would, for a Fourier transform and for some reshapes: right numbers, and no gain from devices."""
    code = f"""
import re
import jax, jax.numpy as jnp, numpy as np
import lra
from lra.config import data_arguments
from lra.data.store import prepare
from lra.training.data_parallel import DataParallel
from lra.training.step import Setup, State, compile_program, copy, on_device
cfg = lra.compose([*{tiny!r}, "model={model}", "trainer.batch_size=8"])
setup, layout = Setup(cfg), DataParallel(jax.devices())
data = on_device(prepare(setup.task, **data_arguments(cfg)).splits["train"])
params, stats = setup.params, setup.batch_stats
state = State(jnp.int32(0), params, stats, setup.tx.init(params), jnp.zeros(3), jnp.bool_(True))
state, fixed, data = layout.replicate((state, setup.constants, data))
text = compile_program(setup, 8, None, layout).run.lower(state, fixed, data, np.int32(6)).compile().as_text()
print(len(re.findall(r" all-reduce\\(", text)), len(re.findall(r" (all-gather|all-to-all|collective-permute)\\(", text)))
"""
    sums, gathers = map(int, python(code, devices=4).split())
    assert sums > 0
    assert gathers == 0


# ---- processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pair:
    """`lra train`, or code that is told the words for it, as two processes on loopback."""

    def __init__(self, overrides, code=None):
        members = f"coordinator:'127.0.0.1:{free_port()}',num_processes:2"
        env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
            "PYTHONPATH": str(ROOT)
        }
        command = ["-c", code] if code else ["-m", "lra.cli", "train"]
        more = [*overrides, "trainer.distributed_timeout=120"]
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    *command,
                    *more,
                    f"trainer.distributed={{{members},process_id:{i}}}",
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
            for i in range(2)
        ]

    def wait(self):
        """(exit code, stdout, stderr) of each."""
        try:
            results = [
                (*process.communicate(timeout=200)[:2], process.returncode)
                for process in self.processes
            ]
        finally:
            for process in self.processes:
                process.kill()
        return [(code, out, error) for out, error, code in results]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "host"])
def test_two_processes_give_the_run_of_one(alone, tmp_path, placement):
    overrides, folder = alone
    here = [*overrides, f"output.root={tmp_path}", f"data.placement={placement}"]
    (code, out, error), (other_code, other_out, other_error) = Pair(here).wait()
    assert (code, other_code) == (0, 0), error + other_error
    record = read_record(folder_of(here))
    assert record["device"] == {"platform": "cpu", "kind": "cpu", "count": 2, "processes": 2}
    assert_same_run(folder_of(here), folder)
    assert "test accuracy" in out
    assert all(
        line.startswith("[Gloo]") for line in other_out.splitlines()
    )  # one of them speaks; JAX's transport may


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_one_goes_on(alone, tmp_path):
    overrides, _ = alone
    here = [
        *overrides,
        f"output.root={tmp_path}",
        "trainer.steps=400",
        "trainer.log_every=1",
    ]  # a call a step
    pair = Pair(here)
    metrics = folder_of(here) / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pair.processes[1].send_signal(signal.SIGTERM)
    (code, _, error), (other_code, _, other_error) = pair.wait()
    assert (code, other_code) == (75, 75), error + other_error
    record = read_record(folder_of(here))
    assert record["status"] == "preempted"
    assert 0 < record["step"] < 400
    resumed = lra.train([*here, "resume=auto"])
    assert resumed["resumed_from"] == [record["step"]]
    assert (resumed["status"], resumed["device"]["processes"]) == ("finished", 1)


@pytest.mark.slow
def test_an_error_of_process_0_ends_both_in_one_line(alone, tmp_path):
    overrides, folder = alone
    here = [*overrides, f"output.root={folder.parents[2]}"]  # holds the finished run
    (code, _, error), (other_code, _, other_error) = Pair(here).wait()
    assert (code, other_code) == (4, 4)
    assert "holds this run already, finished" in error
    assert "on process 0: " in other_error
    assert "Traceback" not in error + other_error


@pytest.mark.slow
def test_processes_that_differ_are_refused_on_all_and_one_that_fails_alone_ends_both(
    tiny, tmp_path
):
    """Four runs of one pair: what all know of leaves them able to go on, the last ends both processes."""
    code = f"""
import os, sys, time
import lra
from lra import trainer
from lra.errors import LraError
here = sys.argv[1:]
me = int(here[-1].partition("process_id:")[2][0])
def attempt(*more):
    try:
        lra.train([*here, *more])
    except LraError as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
attempt(*["optim.lr=0.1"] * me)
attempt(f"output.root={tmp_path}/{{me}}")
os.chdir(["{tmp_path}", "/"][me])
attempt("output.root=relative")
if me == 0:  # which waits for nobody and sees no connection close
    trainer.prepare = lambda *args, **options: time.sleep(60)
attempt(*["data.root=/proc/nonexistent"] * me)
print("went on")
"""
    both = Pair([*tiny, "trainer.batch_size=8"], code).wait()
    assert [code for code, _, _ in both] == [3, 3], both
    for number, (_, out, error) in enumerate(both):
        config, elsewhere, relative = [line for line in out.splitlines() if "Error: " in line]
        assert re.match(
            r"ConfigError: process 1 was started with optim.lr=0.1, not 0.004 as process 0; start",
            config,
        )
        assert re.match(
            rf"RunFolderError: process 1 does not see {tmp_path}/{number}/.* shared", elsewhere
        )
        assert re.match(r"RunFolderError: process 1 does not see relative/", relative)
        who = "on process 1: " if number == 0 else ""
        assert re.fullmatch(rf"lra: error: {who}/proc/nonexistent: .*\n", error)
        assert "went on" not in out
    (record,) = (tmp_path / "runs").rglob("record.json")
    assert read_record(record.parent)["status"] == "failed"
    assert read_record(record.parent)["error"].startswith(
        "DataError: on process 1: /proc/nonexistent"
    )


@pytest.mark.slow
def test_a_killed_process_ends_the_other_in_one_line(alone, tmp_path):
    overrides, _ = alone
    here = [*overrides, f"output.root={tmp_path}", "trainer.steps=4000", "trainer.log_every=1"]
    pair = Pair(here)
    metrics = folder_of(here) / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pair.processes[1].kill()
    (code, _, error), (other_code, _, _) = pair.wait()
    assert (code, other_code) == (75, -signal.SIGKILL)
    assert re.fullmatch(
        r"lra: error: another process of this run is gone, .*resume=auto.*\n", error
    )
    record = read_record(folder_of(here))
    assert (record["status"], record["error"][:14]) == ("preempted", "PreemptedError")


def test_processes_that_do_not_meet_say_so_in_time(tiny, lra_command):
    members = f"{{coordinator:'127.0.0.1:{free_port()}',num_processes:2,process_id:1}}"
    done = lra_command(
        "train", *tiny, f"trainer.distributed={members}", "trainer.distributed_timeout=1"
    )
    assert done.returncode == 1
    waits, error = done.stderr.splitlines()
    assert re.match(r"lra: process 1 of 2 waits for the others at 127.0.0.1:\d+, ", waits)
    assert re.match(
        r"lra: error: process 1 of 2 has not met .* in 1 s: nothing answers there .*refused", error
    )


def test_waiting_for_other_processes_counts_as_time(tiny, monkeypatch):
    met = []
    monkeypatch.setattr(distributed, "start", lambda cfg: met.append(time.monotonic()))
    monkeypatch.setattr(trainer, "train_here", lambda cfg, started, ending: {"started": started})
    assert lra.train(tiny)["started"] <= met[0]


def test_what_tells_of_a_lost_process(monkeypatch):
    monkeypatch.setattr(distributed, "is_alone", lambda error: True)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "_POLL_S", 0)
    gloo = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: NCCL: out of memory")
    for error in (memory, ValueError("a bug"), KeyError("Gloo")):
        assert distributed.explained(error) is error
    assert "another process of this run is gone" in str(distributed.explained(gloo))
    assert distributed.explained(gloo).exit_code == 75
    monkeypatch.setattr(distributed, "_heard", lambda: DataError("on process 1: no file"))
    assert distributed.explained(gloo).exit_code == 3


def test_other_data_on_one_process_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda key: [key, "other"])
    with pytest.raises(DataError, match="process 1 has other data under its data.root"):
        distributed.check_same_data("own")


def test_one_process_agrees_with_itself():
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert (
        distributed.agree(lambda: object).__class__ is type
    )  # not sent anywhere: any value will do
    with pytest.raises(RunFolderError, match="taken"):
        distributed.agree(lambda: (_ for _ in ()).throw(RunFolderError("taken")))


def test_an_error_there_is_the_same_error_here(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    for name, kind in (("RunFolderError", RunFolderError), ("OSError", LraError)):
        monkeypatch.setattr(
            distributed, "gather", lambda value, name=name: [{"error": [name, "taken"]}, value]
        )
        with pytest.raises(kind, match="on process 0: taken"):
            distributed.agree(lambda: pytest.fail("only process 0 works"))
    monkeypatch.setattr(distributed, "gather", lambda value: [{"value": 7}, value])
    assert distributed.agree(lambda: 8) == 7


def test_an_onlooker_writes_nothing(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.append_metrics({"step": 1})
        before = {path: path.read_bytes() for path in folder.path.iterdir()}
        onlooker = distributed.Onlooker(folder.path)
        with onlooker:  # takes no lock
            onlooker.write_record({"status": "running"})
            onlooker.append_metrics({"step": 2})
            onlooker.truncate_metrics(0)
            onlooker.write_predictions(np.zeros((1, 2)), np.zeros(1), np.zeros(1))
            assert onlooker.read_metrics() == [{"step": 1}]
        assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_one_device_has_no_mesh():
    layout = DataParallel()
    tree = {"x": np.ones(3)}
    assert layout.count == 1
    assert layout.replicate(tree) is layout.split(tree) is layout.gather(tree) is tree


def test_members_are_checked_before_they_are_called(monkeypatch, tiny):
    monkeypatch.setattr(distributed, "has_started", lambda: False)
    members = "{coordinator: 'h:1', num_processes: 2, process_id: %s}"
    for number in (2, -1):
        with pytest.raises(lra.errors.ConfigError, match=r"process_id=-?\d must be in \[0, 2\)"):
            lra.train([*tiny, f"trainer.distributed={members % number}"])
    with pytest.raises(
        lra.errors.ConfigError, match="trainer.distributed.process_id=one does not fit"
    ):
        lra.train([*tiny, f"trainer.distributed={members % 'one'}"])


def test_the_devices_of_a_run_are_not_its_identity(tiny):
    name = folder_of(tiny).name
    assert folder_of([*tiny, "trainer.devices=1", "data.placement=host"]).name == name
