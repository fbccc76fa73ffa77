"""What a fault leaves behind: killed at any moment and resumed a run ends as if never killed; what is damaged is passed over."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_checks import as_if_killed, assert_same_run, final_state, folder_of, killed, steps_saved
from tiny import TINY

import lra
from lra.errors import (
    ConfigError,
    PreemptedError,
    RunFolderError,
)
from lra.runs.records import read_record
from lra.training import trainer
from lra.training.checkpoint import SUMS, Checkpoints
from lra.training.deadline import Deadline, seconds_of

# two epochs and a half of 16 steps, dropout on, checkpoints out of step with evaluations
LONG = [
    *TINY,
    "trainer.steps=40",
    "backbone.dropout=0.1",
    "trainer.eval_every=4",
    "trainer.checkpoint_every=10",
]


@pytest.fixture(scope="module")
def whole(data_root, tmp_path_factory):
    """A run that nothing disturbed: its overrides but for the folder, and its folder."""
    overrides = [*LONG, f"data.root={data_root}"]
    here = [*overrides, f"output.root={tmp_path_factory.mktemp('whole')}"]
    lra.train(here)
    return overrides, folder_of(here)


@pytest.fixture
def copied(whole, tmp_path):
    """The undisturbed run in a folder of the test's own: its overrides, its folder."""
    overrides, folder = whole
    here = [*overrides, f"output.root={tmp_path}"]
    shutil.copytree(folder, folder_of(here))
    return here, folder_of(here)


# ---- killed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again_ends_as_if_never_killed(whole, tmp_path, seed):
    """Each life goes back to the last checkpoint; `resumed_from` proves that it did."""
    overrides, undisturbed = whole
    chance = random.Random(seed)
    here = [*overrides, f"output.root={tmp_path}"]
    folder, expected = folder_of(here), []
    lives = {
        0: [
            ("step", chance.randint(12, 19)),
            ("save begun", 20),
            ("save named, not yet summed", 20),
        ],
        1: [
            ("save written, not yet named", 10),
            ("before the record", 20),
            ("step", chance.randint(31, 39)),
        ],
    }[seed]
    for moment, at in [*lives, ("predictions written", 40)]:
        saved = killed(here, folder, moment, at)
        assert read_record(folder)["resumed_from"] == expected
        assert run_folder.load_records([folder])[0]["status"] == "dead"
        last = {"step": (at - 1) // 10 * 10, "save written, not yet named": at - 10}.get(moment, at)
        if (
            moment == "save begun"
        ):  # the thread may come too late to hit the middle of a save, which takes milliseconds
            last = saved[-1]
            assert last in (at - 10, at)
        assert saved[-1:] == ([last] if last else [])
        expected += [last] if last else []
    record = lra.train([*here, "resume=auto"])
    assert record["resumed_from"] == expected
    assert record["damaged_checkpoints"] == []
    assert_same_run(here, folder, undisturbed)
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_dead_run_is_named_in_the_table(copied, lra_command):
    _, folder = copied
    as_if_killed(folder)
    done = lra_command("table", folder)
    assert done.returncode == 0, done.stderr
    assert "1 dead" in done.stdout


# ---- stopped


@pytest.mark.parametrize("where", ["prepare", "score"])
def test_sigterm_outside_of_training_asks_to_be_run_again(whole, tmp_path, monkeypatch, where):
    overrides, undisturbed = whole
    here = [*overrides, f"output.root={tmp_path}"]
    original = getattr(trainer, where)

    def stopped(*args, **kwargs):
        result = original(*args, **kwargs)
        if where == "prepare" or (len(result) and read_record(folder_of(here))["step"] == 40):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(trainer, where, stopped)
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


def test_sigterm_while_the_first_call_compiles_saves_its_step(whole, tmp_path, monkeypatch):
    overrides, undisturbed = whole
    here = [*overrides, f"output.root={tmp_path}"]
    compiled = trainer.compile_program

    def stopped_in_the_call(*args):
        program = compiled(*args)

        def run(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return program.run(*arguments)

        return program._replace(run=run)

    monkeypatch.setattr(trainer, "compile_program", stopped_in_the_call)
    with pytest.raises(PreemptedError, match="SIGTERM at step 1 of 40"):
        lra.train(here)
    monkeypatch.undo()
    assert lra.train([*here, "resume=auto"])["resumed_from"] == [1]
    assert_same_run(here, folder_of(here), undisturbed)


def test_time_limit_saves_and_the_same_command_goes_on(whole, tmp_path, lra_command):
    overrides, undisturbed = whole
    here = [*overrides, f"output.root={tmp_path}"]
    done = lra_command("train", *here, "trainer.time_limit=0.01", "resume=auto")
    assert done.returncode == 75
    (line,) = done.stderr.splitlines()
    assert re.search(
        r"stopped by trainer.time_limit=0.01 at step 1 of 40.*resume=auto continues", line
    )
    assert read_record(folder_of(here))["status"] == "preempted"
    record = lra.train(
        [*here, "trainer.time_limit=2h", "resume=auto"]
    )  # the limit is no part of what a run is
    assert record["resumed_from"] == [1]
    assert_same_run(here, folder_of(here), undisturbed)


def test_deadline_leaves_room_for_a_lap_a_save_and_the_end():
    now = 100.0
    deadline = Deadline(1000.0, started=100.0, clock=lambda: now)
    for now, reached in ((300, False), (500, False), (510, False), (700, False), (950, True)):  # noqa: B007
        assert (
            deadline.reached() == reached
        )  # the first lap compiles; the longest of the others is 250 s
    deadline = Deadline(1000.0, started=0.0, clock=lambda: now)
    now = 909.0
    assert not deadline.reached()
    deadline.saved(60.0)
    deadline.saved(20.0)
    assert not deadline.reached()  # 909 + 60 for a save + 30 to end
    now = 910.0
    assert deadline.reached()
    assert not Deadline(None, started=0.0, clock=lambda: 1e9).reached()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *[
            (90, 90),
            (0.5, 0.5),
            ("90", 90),
            ("3h30m", 12600),
            ("45m", 2700),
            ("10s", 10),
            ("1d12h", 129600),
        ],
        *[("3:30:00", 12600), ("03:30:05", 12605), ("1-00:00:00", 86400), (None, None)],
    ],
)
def test_durations(value, seconds):
    assert seconds_of("key", value) == seconds


@pytest.mark.parametrize(
    "value", [0, -1, "", "x", "3h 30m", "30:00", "1:99:00", True, "30m3h", float("inf"), "nan"]
)
def test_what_is_no_duration_is_refused_before_a_folder_is_made(tiny, tmp_path, value):
    with pytest.raises(ConfigError, match="must be a duration above 0: seconds, 3h30m"):
        seconds_of("trainer.time_limit", value)
    if value == "x":
        with pytest.raises(ConfigError, match="trainer.time_limit=x must be"):
            lra.train([*tiny, "trainer.time_limit=x"])
        assert not list(tmp_path.iterdir())


def test_reader_that_leaves_does_not_end_the_run(whole, tmp_path):
    overrides, undisturbed = whole
    here = [*overrides, f"output.root={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lra.cli", "train", *here],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()  # as `| head -1`
    assert process.wait(timeout=120) == 0, process.stderr.read()
    process.stderr.close()
    assert_same_run(here, folder_of(here), undisturbed)


# ---- damaged

DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "one bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
    "missing": None,
}


def do_damage(file, how):
    if DAMAGES[how] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGES[how](file.read_bytes()))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    rng = np.random.default_rng(0)
    state = [jnp.asarray(rng.normal(size=(40, 40 + i)), jnp.float32) for i in range(4)] + [
        jnp.int32(3)
    ]
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder)
    for step in (10, 20):
        checkpoints.save(step, [leaf + step for leaf in state], {"step": step})
    checkpoints.close()
    return folder, state


@pytest.mark.parametrize("how", DAMAGES)
def test_any_damaged_file_of_a_checkpoint_is_noticed(two_checkpoints, tmp_path, capfd, how):
    """Whatever file it is, the state is that of one step or of the other, whole, and stderr holds at most one line."""
    original, state = two_checkpoints
    names = [file.relative_to(original) for file in (original / "20").rglob("*") if file.is_file()]
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        do_damage(folder / name, how)
        checkpoints = Checkpoints(folder)
        found = checkpoints.restore(state)
        kept = (
            name.name == SUMS and how == "missing"
        )  # without sums a checkpoint is taken as orbax left it
        assert found.step == found.progress["step"] == (20 if kept else 10)
        assert list(found.damaged) == ([] if kept else [20])
        for leaf, restored in zip(state, found.state, strict=True):
            np.testing.assert_array_equal(restored, leaf + found.step)
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == len(found.damaged)
        if found.damaged:
            assert re.search(
                r"warning: the checkpoint of step 20 .* is damaged \(.*\); step 10 is taken instead",
                lines[0],
            )
            assert sorted(path.name for path in folder.iterdir()) == ["10", "20.damaged"]
        checkpoints.save(20, state, {"step": 20}) if found.damaged else None
        assert checkpoints.restore(state).step == 20
        checkpoints.close()
        assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_sums_are_those_of_sha256sum(two_checkpoints):
    folder, _ = two_checkpoints
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", SUMS], cwd=folder / "20", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_damaged_checkpoint_without_sums_is_passed_over_without_a_trace(two_checkpoints, tmp_path):
    """As orbax alone finds it: older checkpoints, or a process killed between a save and its sums."""
    original, _state = two_checkpoints
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    (folder / "20" / SUMS).unlink()
    do_damage(folder / "20" / "state" / "manifest.ocdbt", "cut")
    code = f"""
import jax.numpy as jnp, numpy as np, pathlib
from lra.training.checkpoint import Checkpoints
like = [jnp.zeros((40, 40 + i)) for i in range(4)] + [jnp.int32(0)]
checkpoints = Checkpoints(pathlib.Path({str(folder)!r}))
print(checkpoints.restore(like).step)
checkpoints.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "10\n", done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(copied, whole, capfd):
    here, folder = copied
    as_if_killed(folder)
    do_damage(folder / "checkpoints" / "40" / "progress" / "metadata", "cut")
    record = lra.train([*here, "resume=auto"])
    assert record["resumed_from"] == [30]
    assert record["damaged_checkpoints"] == read_record(folder)["damaged_checkpoints"] == [40]
    (line,) = capfd.readouterr().err.splitlines()
    assert "step 40" in line
    assert "progress/metadata is not what was written" in line
    assert "step 30 is taken" in line
    assert_same_run(here, folder, whole[1])
    assert steps_saved(folder) == [30, 40]


def test_run_whose_checkpoints_are_all_damaged_ends_in_one_line_and_keeps_them(copied, lra_command):
    here, folder = copied
    as_if_killed(folder)
    for step in (30, 40):
        do_damage(folder / "checkpoints" / str(step) / "state" / "manifest.ocdbt", "empty")
    done = lra_command("train", *here, "resume=auto")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert re.search(
        r"no checkpoint in .* can be read \(step 40: .*; step 30: .*\); remove that folder to start",
        line,
    )
    assert steps_saved(folder) == [30, 40]
    assert read_record(folder)["status"] == "failed"


def test_reading_only_disturbs_no_save_under_way(two_checkpoints, tmp_path):
    original, state = two_checkpoints
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    do_damage(folder / "20" / "state" / "manifest.ocdbt", "cut")
    (folder / "30.orbax-checkpoint-tmp").mkdir()
    before = sorted(folder.rglob("*"))
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.restore(state).step == 10
    checkpoints.close()
    assert sorted(folder.rglob("*")) == before


# ---- a full disk

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


@pytest.mark.parametrize(
    "size", [1_000, 30_000]
)  # the record cannot be written either; the larger arrays alone
def test_full_disk_is_reported_and_the_checkpoint_before_resumes(whole, tmp_path, size):
    """Not a simulated error: the kernel refuses what orbax writes."""
    overrides, undisturbed = whole
    here = [*overrides, f"output.root={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(size), *here], capture_output=True, timeout=120, text=True
    )
    assert done.returncode == 1
    *warnings, error = done.stderr.splitlines()
    assert re.search(
        r"cannot write the checkpoint of step 20 .*: File too large; those before it are whole",
        error,
    )
    assert all("record.json: File too large" in line for line in warnings)
    assert len(warnings) == (size < 10_000)
    folder = folder_of(here)
    assert run_folder.load_records([folder])[0]["status"] == ("dead" if warnings else "failed")
    assert steps_saved(folder) == [10]
    assert lra.train([*here, "resume=auto"])["resumed_from"] == [10]
    assert_same_run(here, folder, undisturbed)


# ---- scored again


def test_checkpoint_says_what_its_weights_mean(whole):
    overrides, folder = whole
    progress = final_state(overrides, folder).progress
    record = read_record(folder)
    assert progress["config"] == record["config"]
    assert progress["protocol"] == record["config"]["protocol"]
    assert progress["vocab"][-1] == "]"
    assert progress["random"] == {"seed": 0, "kind": "threefry2x32", "partitionable": True}


def test_other_random_numbers_are_refused(copied):
    here, folder = copied
    as_if_killed(folder)
    with (
        jax.threefry_partitionable(False),
        pytest.raises(RunFolderError, match="generator threefry2x32, partitionable"),
    ):
        lra.train([*here, "resume=auto"])
