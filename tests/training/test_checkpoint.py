"""Checkpoints: bit-identical resume after kills, detection of damage, full disks."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deadline import deadline
from run_checks import (
    ONE_STEP_CALLS,
    assert_same_run,
    final_state,
    folder_of,
    killed,
    make_unfinished,
    steps_saved,
)

import lra
from lra.cli import main
from lra.errors import RunFolderError
from lra.runs.records import read_record
from lra.runs.run_folder import load_records
from lra.training.checkpoint import CHECKSUMS, Checkpoints, checksums, newest_progress

# ---- killed runs


@pytest.mark.slow
def test_killed_six_times_ends_as_if_never_killed(finished_run, tmp_path, capsys):
    """Each process continues from the last checkpoint; `resumed_from` proves it."""
    overrides, undisturbed = finished_run
    here = [*overrides, ONE_STEP_CALLS, f"output.root={tmp_path}"]
    folder, expected = folder_of(here), []
    rng = random.Random(0)
    for moment, at, possible in [
        ("save written, not yet renamed", 10, [0]),
        ("step", rng.randint(12, 19), [10]),
        # a save takes milliseconds: the kill may come after it
        ("save begun", 20, [10, 20]),
        ("save renamed, no checksums yet", 30, [30]),
        ("step", rng.randint(31, 39), [30]),
        ("checkpoint saved, record not yet", 40, [40]),
        ("predictions", 40, [40]),
    ]:
        saved = killed(here, folder, moment, at)
        record = load_records([folder])[0]
        assert (record["status"], record["resumed_from"]) == ("dead", expected)
        last = max(saved, default=0)
        assert last in possible
        expected += [last] if last else []
    assert main(["table", str(folder)]) == 0
    assert "1 dead" in capsys.readouterr().out
    record = lra.train([*here, "resume=auto"])
    assert record["resumed_from"] == expected
    assert record["damaged_checkpoints"] == []
    assert_same_run(here, folder, undisturbed)
    assert not list((folder / "checkpoints").glob("*tmp*"))


# ---- damaged files

PROGRESS = {"best": {"step": 0, "accuracy": -1.0}, "selection": None, "vocab": None}
DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "one bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
    "missing": None,
}


def damage(file, how):
    if DAMAGE[how] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGE[how](file.read_bytes()))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with checkpoints of steps 10 and 20, and the state they were made from."""
    rng = np.random.default_rng(0)
    state = [jnp.asarray(rng.normal(size=(40, 40 + i)), jnp.float32) for i in range(4)]
    state.append(jnp.int32(3))
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder)
    for step in (10, 20):
        checkpoints.save(step, [leaf + step for leaf in state], PROGRESS | {"step": step})
    checkpoints.close()
    return folder, state


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_file_is_detected(two_checkpoints, tmp_path, caplog, capfd, how):
    """The restored state is that of one of the two steps, and the only output is one warning."""
    original, state = two_checkpoints
    names = [file.relative_to(original) for file in (original / "20").rglob("*") if file.is_file()]
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        damage(folder / name, how)
        caplog.clear()
        checkpoints = Checkpoints(folder)
        restored = checkpoints.restore(state)
        # a checkpoint without checksums is accepted as Orbax left it
        intact = name.name == CHECKSUMS and how == "missing"
        assert restored.step == restored.progress["step"] == (20 if intact else 10)
        assert list(restored.damaged) == ([] if intact else [20])
        for leaf, found in zip(state, restored.state, strict=True):
            np.testing.assert_array_equal(found, leaf + restored.step)
        assert len(caplog.messages) == len(restored.damaged)
        if not intact:
            assert re.search(
                r"the checkpoint of step 20 .* is damaged \(.*\); step 10 is restored instead",
                caplog.messages[0],
            )
            assert sorted(path.name for path in folder.iterdir()) == ["10", "20.damaged"]
            checkpoints.save(20, state, PROGRESS | {"step": 20})
        assert checkpoints.restore(state).step == 20
        checkpoints.close()
        assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", [CHECKSUMS, "progress/metadata", "state/new"])
def test_a_checkpoint_with_a_pipe_is_damaged(two_checkpoints, tmp_path, caplog, name):
    """A read of a pipe would wait for a writer."""
    original, state = two_checkpoints
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    (folder / "20" / CHECKSUMS).unlink()  # as if the process was killed before it was written
    (folder / "20" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "20" / name)
    with deadline(20), closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.restore(state).step == 10
    assert f"step 20 in {folder} is damaged ({name} is not a regular file)" in caplog.text


@pytest.mark.parametrize(
    ("progress", "problem"),
    [
        ({"x": 1}, "lacks best"),
        ([1], "has =[1]: input should be a valid dictionary"),
        (PROGRESS | {"best": 5}, "has best=5: input should be a valid dictionary"),
        (PROGRESS | {"vocab": 7}, "has vocab=7: input should be a valid list"),
        (PROGRESS | {"selection": {"step": -1}}, "has selection.step=-1: input should be"),
        (PROGRESS | {"random": {"seed": 0}}, "lacks random.kind"),
        (PROGRESS | {"record": {"status": "finished"}}, "lacks task"),
    ],
)
def test_a_checkpoint_with_wrong_progress_is_damaged(
    two_checkpoints, tmp_path, caplog, progress, problem
):
    """Also if the checksums were computed again."""
    original, state = two_checkpoints
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    (folder / "20/progress/metadata").write_text(json.dumps(progress))
    (folder / "20" / CHECKSUMS).write_bytes(checksums(folder / "20"))
    assert newest_progress(folder) == (10, PROGRESS | {"step": 10})
    with closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.restore(state).step == 10
    assert problem in caplog.text


def test_checksums_are_those_of_sha256sum(two_checkpoints):
    folder, _ = two_checkpoints
    command = ["sha256sum", "--check", "--quiet", CHECKSUMS]
    done = subprocess.run(command, cwd=folder / "20", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_damage_without_checksums_is_detected_by_orbax(two_checkpoints, tmp_path, caplog, capfd):
    original, state = two_checkpoints
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    (folder / "20" / CHECKSUMS).unlink()
    damage(folder / "20" / "state" / "manifest.ocdbt", "truncated")
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(state).step == 10
    checkpoints.close()
    assert len(caplog.messages) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_run_with_a_damaged_checkpoint_continues_from_the_one_before(
    copied_run, finished_run, caplog
):
    here, folder = copied_run
    make_unfinished(folder)
    damage(folder / "checkpoints" / "40" / "progress" / "metadata", "truncated")
    record = lra.train([*here, "resume=auto"])
    assert record["resumed_from"] == [30]
    assert record["damaged_checkpoints"] == read_record(folder)["damaged_checkpoints"] == [40]
    (line,) = caplog.messages
    assert re.search("step 40 .*progress/metadata has changed.*step 30 is restored", line)
    assert_same_run(here, folder, finished_run[1])
    assert steps_saved(folder) == [30, 40]


def test_run_without_an_intact_checkpoint_ends_in_one_line_and_deletes_nothing(copied_run):
    here, folder = copied_run
    make_unfinished(folder)
    for step in (30, 40):
        damage(folder / "checkpoints" / str(step) / "state" / "manifest.ocdbt", "empty")
    with pytest.raises(
        RunFolderError,
        match=r"no checkpoint in .* can be read \(step 40: .*; step 30: .*\); remove that folder",
    ) as caught:
        lra.train([*here, "resume=auto"])
    assert "\n" not in str(caught.value)
    assert steps_saved(folder) == [30, 40]
    assert read_record(folder)["status"] == "failed"


def test_read_only_changes_nothing(two_checkpoints, tmp_path):
    original, state = two_checkpoints
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    damage(folder / "20" / "state" / "manifest.ocdbt", "truncated")
    (folder / "30.orbax-checkpoint-tmp").mkdir()  # a save that is under way
    before = sorted(folder.rglob("*"))
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.restore(state).step == 10
    checkpoints.close()
    assert sorted(folder.rglob("*")) == before


# ---- full disk

FULL = """
import resource, sys
from lra.training.checkpoint import Checkpoints
from lra.cli import main

size, save = int(sys.argv[1]), Checkpoints.save

def limited(self, step, *rest):
    if step == 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    save(self, step, *rest)

Checkpoints.save = limited
sys.exit(main(["train", *sys.argv[2:]]))
"""


@pytest.mark.slow
# 1,000 bytes also stop the record; 8,000 only the larger arrays
@pytest.mark.parametrize("size", [1_000, 8_000])
def test_full_disk_is_reported_and_the_checkpoint_before_resumes(finished_run, tmp_path, size):
    """The kernel refuses Orbax's writes. The limit cannot be raised again in a process."""
    overrides, undisturbed = finished_run
    here = [*overrides, f"output.root={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(size), *here], capture_output=True, timeout=120, text=True
    )
    assert done.returncode == 1
    *warnings, error = done.stderr.splitlines()
    assert re.search(
        r"cannot write the checkpoint of step 20 .*: File too large; earlier .* are intact",
        error,
    )
    assert all("record.json: File too large" in line for line in warnings)
    assert len(warnings) == (size < 5_000)
    folder = folder_of(here)
    assert load_records([folder])[0]["status"] == ("dead" if warnings else "failed")
    assert steps_saved(folder) == [10]
    assert lra.train([*here, "resume=auto"])["resumed_from"] == [10]
    assert_same_run(here, folder, undisturbed)


# ---- metadata


def test_checkpoint_describes_its_weights(finished_run):
    overrides, folder = finished_run
    progress = final_state(overrides, folder).progress
    record = read_record(folder)
    assert progress["config"] == record["config"]
    assert progress["protocol"] == record["config"]["protocol"]
    assert progress["vocab"][-1] == "]"
    assert progress["random"] == {"seed": 0, "kind": "threefry2x32", "partitionable": True}


def test_other_generator_settings_are_refused(copied_run):
    here, folder = copied_run
    make_unfinished(folder)
    with (
        jax.threefry_partitionable(False),
        pytest.raises(RunFolderError, match="generator threefry2x32, partitionable"),
    ):
        lra.train([*here, "resume=auto"])
