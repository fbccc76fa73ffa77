"""Checks on run folders: the same final state, killed runs."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np

import lra
from lra.runs.records import read_predictions, read_record, run_path
from lra.training import trainer
from lra.training.checkpoint import Checkpoints
from lra.training.setup import Setup
from lra.training.state import initial_state

KILLED = """
import glob, json, os, signal, sys, threading, time
import lra
from lra import checkpoint, records, trainer
from lra.runs.progress import Reporter

overrides, folder, moment, at = json.loads(sys.argv[1])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_when_a_save_has_begun():
    while not glob.glob(f"{folder}/checkpoints/{at}.orbax-checkpoint-tmp*"):
        time.sleep(0.0005)
    die()

trainer.Rate.steps_per_call = lambda self, done, seconds: 1
rename, save_record = os.rename, trainer.Run.save_record
if moment == "step":
    Reporter.advance = lambda self, step, *_: step == at and die()
elif moment == "save begun":
    threading.Thread(target=die_when_a_save_has_begun, daemon=True).start()
elif moment == "save written, not yet named":
    os.rename = lambda a, b, **k: die() if f"/{at}.orbax-checkpoint-tmp" in str(a) else rename(a, b, **k)
elif moment == "save named, not yet summed":
    checkpoint.checksums = lambda path: die() if path.name == str(at) else b"\\n"
elif moment == "before the record":
    trainer.Run.save_record = lambda self, **c: die() if c.get("step") == at else save_record(self, **c)
elif moment == "predictions written":
    run_folder.RunFolder.write_predictions = die
lra.train(overrides)
"""


def folder_of(overrides):
    cfg = lra.compose(overrides)
    return run_path(cfg.output.root, trainer.run_config(cfg), dict(cfg.names))


def steps_saved(folder):
    return sorted(
        int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()
    )


def as_if_killed(folder):
    """The run as it was after its last checkpoint, before it scored anything."""
    record = read_record(folder) | {"status": "running", "metrics": None}
    (folder / "predictions.npz").unlink()
    (folder / "record.json").write_text(json.dumps(record))


def final_state(overrides, folder):
    state, best = initial_state(Setup(lra.compose(overrides)))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    saved = checkpoints.restore((state, best[:2]))
    checkpoints.close()
    return saved


def assert_same_run(overrides, folder, other, steps=40):
    """Parameters, optimizer, tally, best weights, metrics, their lines and the test logits, bit for bit."""
    ours, theirs = (final_state(overrides, path) for path in (folder, other))
    assert ours.step == theirs.step == steps
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    a, b = read_record(folder), read_record(other)
    assert (a["status"], a["metrics"], a["selection"]) == (
        b["status"],
        b["metrics"],
        b["selection"],
    )
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name, values in read_predictions(other).items():
        assert read_predictions(folder)[name].tobytes() == values.tobytes()


def killed(overrides, folder, moment, at):
    """Run in a new process until it is killed at `moment` of step `at`; returns the steps that are saved then."""
    arguments = json.dumps([[*overrides, "resume=auto"], str(folder), moment, at])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, arguments], capture_output=True, timeout=120, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return steps_saved(folder) if (folder / "checkpoints").exists() else []
