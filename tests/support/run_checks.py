"""Helpers for tests of interrupted runs: equality of two runs, and runs that are killed."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np

import lra
from lra.config.compose import run_config
from lra.runs.records import read_predictions, read_record, run_path
from lra.training.checkpoint import Checkpoints
from lra.training.setup import Setup
from lra.training.state import initial_state

ONE_STEP_CALLS = "trainer.call_seconds=1e-9"  # each jitted call trains one step
KILLED = """
import glob, json, os, signal, sys, threading, time
import lra
from lra.runs.run_folder import RunFolder
from lra.training import checkpoint
from lra.training.checkpoint import Checkpoints
from lra.training.prefetch import DeviceData

overrides, folder, moment, at = json.loads(sys.argv[1])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after(owner, name, matches):
    original = getattr(owner, name)
    def wrapped(*args):
        result = original(*args)
        return die() if matches(*args) else result
    setattr(owner, name, wrapped)

def die_when_a_save_has_begun():
    while not glob.glob(f"{folder}/checkpoints/{at}.orbax-checkpoint-tmp*"):
        time.sleep(0.0005)
    die()

rename, checksums = os.rename, checkpoint.checksums
if moment == "step":
    die_after(DeviceData, "call", lambda self, step_fns, state, constants, until: until == at)
elif moment == "save begun":
    threading.Thread(target=die_when_a_save_has_begun, daemon=True).start()
elif moment == "save written, not yet renamed":
    unfinished = f"/{at}.orbax-checkpoint-tmp"
    os.rename = lambda a, b, **k: die() if unfinished in str(a) else rename(a, b, **k)
elif moment == "save renamed, no checksums yet":
    checkpoint.checksums = lambda path: die() if path.name == str(at) else checksums(path)
elif moment == "checkpoint saved, record not yet":
    die_after(Checkpoints, "save", lambda self, step, *_: step == at)
elif moment == "predictions":
    RunFolder.write_predictions = die
lra.train(overrides)
"""


def folder_of(overrides):
    """The folder of a run."""
    cfg = lra.compose(overrides)
    return run_path(cfg.output.root, run_config(cfg), dict(cfg.names))


def steps_saved(folder):
    """The steps of a run's checkpoints."""
    return sorted(
        int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()
    )


def make_unfinished(folder):
    """Changes a finished run to one that was killed after its last checkpoint."""
    record = read_record(folder) | {"status": "running", "metrics": None}
    (folder / "predictions.npz").unlink()
    (folder / "record.json").write_text(json.dumps(record))


def final_state(overrides, folder):
    """The newest checkpoint of a run."""
    state, best = initial_state(Setup(lra.compose(overrides)))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    saved = checkpoints.restore((state, best[:2]))
    checkpoints.close()
    return saved


def assert_same_run(overrides, folder, other, steps=40):
    """Asserts that states, best weights, metrics and test logits of two runs are the same bits."""
    ours, theirs = (final_state(overrides, path) for path in (folder, other))
    assert ours.step == theirs.step == steps
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    a, b = read_record(folder), read_record(other)
    for key in ("status", "metrics", "selection"):
        assert a[key] == b[key]
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name, values in read_predictions(other).items():
        assert read_predictions(folder)[name].tobytes() == values.tobytes()


def killed(overrides, folder, moment, at):
    """Runs a new process that is killed at `moment` of step `at`; returns the steps saved by then.

    The moment "step" needs `ONE_STEP_CALLS`, which is part of a run's identity.
    """
    words = [*overrides, "resume=auto"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps([words, str(folder), moment, at])],
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return steps_saved(folder) if (folder / "checkpoints").exists() else []
