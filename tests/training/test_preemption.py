"""Signals, time limits and durations; a run that they stop resumes bit for bit."""

import math
import os
import signal
import subprocess
import sys

import pytest
from run_checks import assert_same_run, folder_of

import lra
from lra.errors import ConfigError, PreemptedError
from lra.runs.records import read_record
from lra.training import setup, trainer
from lra.training.preemption import Deadline, Signals
from lra.training.prefetch import DeviceData

# ---- signals


def test_signals_interrupt_unless_deferred(capfd):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGINT"
    with Signals() as signals:
        with signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert signals.received == "SIGTERM"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(PreemptedError, match="SIGTERM"), signals.sigterm_preempts():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), signals.sigterm_preempts():
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "lra: SIGTERM: saving after the current steps" in capfd.readouterr().err


def test_signal_during_a_write_to_stderr_is_deferred(monkeypatch):
    """Python refuses a write to a stream in the middle of another one."""

    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys, "stderr", Busy())
    with Signals() as signals, signals.deferred():
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == "SIGTERM"


@pytest.mark.slow
@pytest.mark.parametrize(("module", "where"), [(setup, "prepare"), (trainer, "score")])
def test_sigterm_outside_of_training_stops_and_resumes(
    finished_run, tmp_path, monkeypatch, module, where
):
    overrides, undisturbed = finished_run
    here = [*overrides, f"output.root={tmp_path}"]
    original = getattr(module, where)

    def stopped(*args, **kwargs):
        result = original(*args, **kwargs)
        if where == "prepare" or read_record(folder_of(here))["step"] == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(module, where, stopped)
    with pytest.raises(
        PreemptedError, match="stopped by SIGTERM; the same command with resume=auto"
    ) as caught:
        lra.train(here)
    assert caught.value.exit_code == 75
    assert read_record(folder_of(here))["status"] == "preempted"
    monkeypatch.undo()
    record = lra.train([*here, "resume=auto"])
    assert record["resumed_from"] == ([] if where == "prepare" else [40])
    assert_same_run(here, folder_of(here), undisturbed)


def test_sigterm_in_the_first_call_saves_its_step(finished_run, tmp_path, monkeypatch):
    overrides, undisturbed = finished_run
    here = [*overrides, f"output.root={tmp_path}"]
    call = DeviceData.call

    def stopped_call(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(*args)

    monkeypatch.setattr(DeviceData, "call", stopped_call)
    with pytest.raises(PreemptedError, match="SIGTERM at step 1 of 40"):
        lra.train(here)
    monkeypatch.undo()
    assert lra.train([*here, "resume=auto"])["resumed_from"] == [1]
    assert_same_run(here, folder_of(here), undisturbed)


@pytest.mark.slow
def test_closed_stdout_does_not_end_the_run(finished_run, tmp_path):
    overrides, undisturbed = finished_run
    here = [*overrides, f"output.root={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lra.cli", "train", *here],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()  # like `| head -1`
    assert process.wait(timeout=120) == 0, process.stderr.read()
    process.stderr.close()
    assert_same_run(here, folder_of(here), undisturbed)


# ---- time limit


def test_time_limit_saves_and_the_same_command_continues(finished_run, tmp_path):
    overrides, undisturbed = finished_run
    here = [*overrides, f"output.root={tmp_path}", "resume=auto"]
    with pytest.raises(
        PreemptedError,
        match=r"stopped by trainer.time_limit=0.01 at step 1 of 40.*resume=auto continues",
    ):
        lra.train([*here, "trainer.time_limit=0.01"])
    assert read_record(folder_of(here))["status"] == "preempted"
    # the limit is not part of a run's identity
    record = lra.train([*here, "trainer.time_limit=2h"])
    assert record["resumed_from"] == [1]
    assert_same_run(here, folder_of(here), undisturbed)


def test_deadline_reserves_time_for_an_iteration_a_save_and_the_exit():
    now = 100.0
    deadline = Deadline(1000.0, started=100.0, clock=lambda: now)
    # the first interval compiles and is ignored; the longest of the others is 250 s
    for seconds, reached in ((300, False), (500, False), (510, False), (700, False), (950, True)):
        now = seconds
        assert deadline.reached() == reached
    deadline = Deadline(1000.0, started=0.0, clock=lambda: now)
    now = 909.0
    assert not deadline.reached()
    deadline.record_save(60.0)
    deadline.record_save(20.0)
    assert not deadline.reached()  # 909 + 60 for a save + 30 for the exit
    now = 910.0
    assert deadline.reached()
    assert not Deadline(None, started=0.0, clock=lambda: 1e9).reached()


@pytest.mark.parametrize(
    ("limit", "now", "seconds"),
    [
        (None, 1e9, math.inf),
        (60.0, 57, 2),  # a third of what is left is for the exit of the process
        (60.0, 100, 1),  # after the final scoring, which is not cut short
    ],
)
def test_tracker_ends_within_the_limit(limit, now, seconds):
    deadline = Deadline(limit, started=0.0, clock=lambda: now)
    assert deadline.tracker_seconds() == pytest.approx(seconds)


def test_bad_time_limit_is_refused_before_a_folder_is_made(tiny, tmp_path):
    with pytest.raises(ConfigError, match="trainer.time_limit=x must be"):
        lra.train([*tiny, "trainer.time_limit=x"])
    assert not list(tmp_path.iterdir())
