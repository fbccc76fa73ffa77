"""Runs in two processes: the same numbers as in one, agreement, and the loss of a process."""

import re
import signal

import jax
import numpy as np
import pytest
from parallel_runs import PARALLEL_RUN, ProcessPair, assert_close_run, free_port
from run_checks import folder_of
from tiny import TINY

import lra
from lra.errors import ConfigError, DataError, LraError, RunFolderError
from lra.runs.records import read_metrics, read_record
from lra.runs.run_folder import RunFolder
from lra.training import distributed

# ---- two processes

# Runs of one pair of processes. Each error is raised on both, and the next run goes on.
RUNS = """
import os, sys
import lra
from lra.errors import DataError, LraError
from lra.training import prefetch, trainer
from lra.training.prefetch import DeviceData

*here, scratch, timeout, distributed = sys.argv[1:]
here += [timeout, distributed]
me = int(distributed.partition("process_id:")[2][0])

def attempt(*more):
    try:
        record = lra.train([*here, *more])
        print("RESULT", record["status"], record["resumed_from"], flush=True)
    except LraError as error:
        print(f"RESULT {type(error).__name__}: {error}", flush=True)

attempt(*["optim.lr=0.1"] * me)
attempt(f"output.root={scratch}/{me}")
attempt(*["data.root=/proc/nonexistent"] * me)
attempt()
attempt()  # the folder now holds the finished run
attempt("data.placement=host", f"output.root={scratch}/host")

call = DeviceData.call
def call_and_signal(self, step_fns, state, constants, until):
    if me == 1 and until == 13:
        os.kill(os.getpid(), 15)
    return call(self, step_fns, state, constants, until)
DeviceData.call = call_and_signal
attempt("trainer.log_every=13", f"output.root={scratch}/stopped")
"""


@pytest.fixture(scope="module")
def single_run(data_root, tmp_path_factory):
    """A run on one device: its overrides without output.root, and its folder."""
    overrides = [*TINY, *PARALLEL_RUN, f"data.root={data_root}"]
    here = [*overrides, f"output.root={tmp_path_factory.mktemp('single')}"]
    lra.train(here)
    return overrides, folder_of(here)


@pytest.mark.slow
def test_two_processes_agree_and_give_the_run_of_one(single_run, tmp_path):
    overrides, undisturbed = single_run
    here = [*overrides, f"output.root={tmp_path / 'runs'}"]
    both = ProcessPair(RUNS, [*here, str(tmp_path)]).wait()
    assert [code for code, _, _ in both] == [0, 0], both
    for number, (_, out, error) in enumerate(both):
        assert "Traceback" not in error
        config, folder, data, device, again, host, stopped = re.findall("^RESULT (.*)", out, re.M)
        assert re.match(
            r"ConfigError: process 1 was started with optim.lr=0.1, not 0[.0-9]* as process 0",
            config,
        )
        assert re.match(
            rf"RunFolderError: process 1 does not see the folder {tmp_path}/\d/.* share", folder
        )
        who = "on process 1: " if number == 0 else ""
        assert data.startswith(f"DataError: {who}/proc/nonexistent: ")
        assert device == host == "finished []"
        who = "on process 0: " if number == 1 else ""
        assert re.match(f"RunFolderError: {who}.* holds this run already, finished", again)
        assert re.match(r"PreemptedError: stopped by SIGTERM at step 13 of 20", stopped)
    assert "test accuracy" in both[0][1]
    assert "test accuracy" not in both[1][1]  # only process 0 prints
    record = read_record(folder_of(here))
    assert record["device"] == {"platform": "cpu", "kind": "cpu", "count": 2, "processes": 2}
    assert_close_run(folder_of(here), undisturbed)
    assert_close_run(folder_of([*overrides, f"output.root={tmp_path / 'host'}"]), undisturbed)
    # one process continues the run of two
    here = [*overrides, "trainer.log_every=13", f"output.root={tmp_path / 'stopped'}"]
    resumed = lra.train([*here, "resume=auto"])
    assert (resumed["status"], resumed["resumed_from"]) == ("finished", [13])
    assert resumed["device"]["processes"] == 1


LOSE_PROCESS_1 = """
import os, sys
import lra
from lra.cli import main
from lra.training import distributed
from lra.training.prefetch import DeviceData
distributed.HEARTBEAT_TIMEOUT_S, distributed.SHUTDOWN_TIMEOUT_S = 10, 5
call = DeviceData.call
def call_or_die(self, step_fns, state, constants, until):
    if "process_id:1" in sys.argv[-1] and until > 1:
        os.kill(os.getpid(), 9)
    return call(self, step_fns, state, constants, until)
DeviceData.call = call_or_die
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_loss_of_a_process_ends_the_other(single_run, tmp_path):
    overrides, _ = single_run
    here = [*overrides, f"output.root={tmp_path}"]
    (code, _, error), (other_code, _, _) = ProcessPair(LOSE_PROCESS_1, here).wait()
    assert other_code == -signal.SIGKILL
    assert code != 0  # JAX aborts at exit, see docs/training.md
    assert re.search(r"^lra: another process of this run is gone; .*resume=auto", error, re.M)
    record = read_record(folder_of(here))
    assert (record["status"], record["error"][:14]) == ("preempted", "PreemptedError")


# ---- initialization


def test_missing_coordinator_is_one_line(monkeypatch, tiny):
    monkeypatch.setattr(distributed, "backend_started", lambda: False)
    members = f"{{coordinator:'127.0.0.1:{free_port()}',num_processes:2,process_id:1}}"
    with pytest.raises(
        LraError, match=r"process 0 does not answer at 127.0.0.1:\d+ within 1 s .*refused"
    ):
        lra.train([*tiny, f"trainer.distributed={members}", "trainer.distributed_timeout=1"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            "{coordinator: 'h:1', num_processes: 2, process_id: 2}",
            r"process_id=2 must be in \[0, 2\)",
        ),
        ("{coordinator: 'h:1', num_processes: 2, process_id: -1}", "process_id=-1 must be in"),
        (
            "{coordinator: 'h:1', num_processes: 2, process_id: one}",
            "trainer.distributed.process_id=one does not fit",
        ),
        ("{coordinator: h, num_processes: 2, process_id: 0}", "coordinator=h must be HOST:PORT"),
        ("{coordinator: 'h:1'}", "must be .*coordinator: HOST:PORT.*, auto or null"),
        ("no", "trainer.distributed=no must be"),
        ("auto", "trainer.distributed is set too late"),
    ],
)
def test_malformed_or_late_members_are_refused(tiny, tmp_path, members, message):
    jax.devices()  # starts the backend
    with pytest.raises(ConfigError, match=message):
        lra.train([*tiny, f"trainer.distributed={members}"])
    assert not list(tmp_path.iterdir())


# ---- agreement


def test_one_process_agrees_with_itself(tmp_path):
    assert distributed.is_first()
    assert distributed.all_gather({"a": 1}) == [{"a": 1}]
    value = object()  # not sent, so no JSON
    assert distributed.broadcast(lambda: value) is value
    assert distributed.run_on_all(lambda: value) is value
    with pytest.raises(RunFolderError, match="taken"):
        distributed.broadcast(lambda: (_ for _ in ()).throw(RunFolderError("taken")))
    with distributed.open_run_folder(tmp_path / "run") as folder:
        assert type(folder) is RunFolder


def test_errors_of_process_0_keep_their_class(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    for name, kind in (("RunFolderError", RunFolderError), ("OSError", LraError)):
        monkeypatch.setattr(
            distributed, "all_gather", lambda value, name=name: [[[name, "taken"], None], value]
        )
        with pytest.raises(kind, match="on process 0: taken"):
            distributed.broadcast(lambda: pytest.fail("only process 0 works"))


def test_other_data_on_one_process_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather", lambda key: [key, "other"])
    with pytest.raises(DataError, match="process 1 has other data under its data.root"):
        distributed.check_same_data("own")


def test_read_only_folder_writes_nothing(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.append_metrics({"step": 1})
        before = {path: path.read_bytes() for path in folder.path.iterdir()}
        with distributed.ReadOnlyRunFolder(folder.path) as other:  # takes no lock
            other.write_record({"status": "running"})
            other.append_metrics({"step": 2})
            other.truncate_metrics(0)
            other.write_predictions(np.zeros((1, 2)), np.zeros(1), np.zeros(1))
            assert read_metrics(other.path) == [{"step": 1}]
        assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


# ---- lost processes


def test_errors_of_a_lost_process_are_told_from_others(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer\n at ...")
    assert distributed.lost_peer_error(gloo) is None  # a single process has no peers
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: NCCL: out of memory")
    for error in (memory, ValueError("a bug"), KeyError("Gloo")):
        assert distributed.lost_peer_error(error) is None
    lost = distributed.lost_peer_error(gloo)
    assert lost.exit_code == 75
    assert re.match("another process of this run is gone; .*closed by peer.$", str(lost))
