"""The command as a user meets it: what it prints, what it refuses, and with which exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

ROOT = Path(__file__).parents[1]


def options(tmp_path, data_root):
    return [*TINY, f"data.root={data_root}", f"output.root={tmp_path / 'runs'}"]


@pytest.fixture
def args(tmp_path, data_root):
    return options(tmp_path, data_root)


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "train --help",
        "table --help",
        "data prepare --help",
        "doctor --help",
        "models --help",
        "diagnose --help",
    ],
)
def test_help_answers_without_heavy_imports(command):
    code = (
        "import sys; from lra.cli import main\n"
        f"try: main({command.split()!r})\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'jax', 'numpy', 'pandas', 'hydra', 'wandb', 'rich', 'tensorflow_datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: lra" in done.stdout


def test_train_prints_progress_result_and_table(lra_command, args):
    done = lra_command("train", *args)
    assert done.returncode == 0, done.stderr
    assert "to beat: majority" in done.stdout
    assert re.search(
        r"step +4/4 +loss .* accuracy .* examples/s +.* left +validation loss", done.stdout
    )
    assert re.search(r"test accuracy \d+\.\d+ %.*root operator", " ".join(done.stdout.split()))
    assert "61.04" in done.stdout  # STU's published ListOps number stands beside ours
    assert "Traceback" not in done.stderr


def test_multirun_fills_the_table(lra_command, args, tmp_path):
    done = lra_command("train", "-m", *args, "model=stu,lru", "seed=0,1", timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("record.json")]
    assert sorted((r["model"], r["seed"], r["status"]) for r in records) == [
        (model, seed, "finished") for model in ("lru", "stu") for seed in (0, 1)
    ]
    table = done.stdout[
        done.stdout.index("Ours, test accuracy") :
    ]  # printed once, after the last run
    assert len(re.findall(r"n=2", table)) == 2


@pytest.mark.slow
def test_multirun_through_joblib(lra_command, args, tmp_path):
    done = lra_command("train", "-m", *args, "seed=0,1", "hydra/launcher=joblib", timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").rglob("record.json"))) == 2


def test_one_bad_run_does_not_take_the_sweep_along(lra_command, args, tmp_path):
    done = lra_command(
        "train", "-m", *args, "optim.lr=1e30,1e-3", "optim.clip=null", "optim.warmup=0", timeout=300
    )
    assert done.returncode == 5
    assert done.stderr.count("NaN or infinite") == 1
    assert "a run of the sweep failed" in done.stderr
    assert "1 diverged" in done.stdout  # beside the score of the one that finished
    statuses = [
        json.loads(p.read_text())["status"] for p in (tmp_path / "runs").rglob("record.json")
    ]
    assert sorted(statuses) == ["diverged", "finished"]


def test_train_leaves_nothing_but_its_runs(lra_command, data_root, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = lra_command(
        "train", *TINY, "experiment=null", f"data.root={data_root}", cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["debug_runs"]
    assert not done.stderr


def test_sweep_that_cannot_be_composed_says_why(lra_command, args):
    done = lra_command("train", "-m", *args, "model=lru", "seed=0,1", "model.num_filters=16")
    assert done.returncode == 2
    assert done.stderr.startswith("lra: error: model=lru has no num_filters; it has: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "length"), [("strict", 2048), ("lra2020", 2000)])
def test_full_length_task_trains(protocol, length, lra_command, tmp_path):
    small = [
        "task.sizes={train: 4, val: 2, test: 2}",
        "debug=tiny",
        "trainer.steps=1",
        "trainer.batch_size=2",
    ]
    folders = [f"data.root={tmp_path / 'data'}", f"output.root={tmp_path / 'runs'}"]
    done = lra_command(
        "train", "task=listops", f"protocol={protocol}", *small, *folders, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (inputs,) = tmp_path.rglob("train.inputs.npy")
    assert np.load(inputs).shape == (4, length)
    (record,) = (tmp_path / "runs").rglob("record.json")
    assert json.loads(record.read_text())["metrics"]["test"]["count"] == 2


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        ("model.num_filtrs=3", 2, "unknown key model.num_filtrs (did you mean model.num_filters"),
        ("model=lrv", 2, "unknown model=lrv (did you mean lru?); expected one of: "),
        ("task=listop", 2, "unknown task=listop (did you mean listops"),
        ("seed=[", 2, "cannot read an override"),
        ("seed", 2, "cannot read an override"),
        ("model=null", 2, "model=null: a run needs one"),
        ("optim.b1=foo", 2, "optim.b1=foo must be a number in [0, 1)"),
        (
            "experiment=listops/quick",
            2,
            "experiment=listops/quick owns its task and model; drop task=listops_short",
        ),
        ("trainer.steps=many", 2, "trainer.steps=many must be a whole number"),
        ("model.num_filters=many", 2, "model.num_filters=many must be a whole number"),
        ("model.negative_filters=3", 2, "model.negative_filters=3 must be true or false"),
        ("backbone.dropout=much", 2, "backbone.dropout=much must be a number"),
        ("model.num_filters=33", 2, "lower model.num_filters or raise task.seq_len"),
        ("backbone={width: 9, positions: sinusoidal}", 2, "needs an even backbone.width, found 9"),
        ("model.param_count=many", 2, "model.param_count=many: unknown model=many"),
        ("task.source=release", 3, "listops-1000"),
        ("--task=image", 2, "--task=image: config keys have no dashes; write task=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(lra_command, args, tmp_path, bad, code, words):
    done = lra_command("train", *args, bad)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("lra: error: ")
    assert words in done.stderr
    assert not list(tmp_path.rglob("record.json")) or code == 3


def test_ctrl_c_saves_and_the_same_command_continues(args, lra_command, tmp_path):
    long = [
        *args,
        "trainer.steps=100000",
        "trainer.eval_every=100000",
        "trainer.log_every=1",
        "trainer.call_seconds=0.05",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lra.cli", "train", *long], stderr=subprocess.PIPE, text=True
    )
    metrics = wait_for(lambda: next((tmp_path / "runs").rglob("metrics.jsonl"), None))
    wait_for(lambda: metrics.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert re.search(r"stopped by SIGINT at step \d+ of 100000.*resume=auto continues", stderr)
    record = json.loads(metrics.with_name("record.json").read_text())
    assert record["status"] == "preempted"

    again = subprocess.Popen([sys.executable, "-m", "lra.cli", "train", *long, "resume=auto"])
    wait_for(
        lambda: (
            json.loads(metrics.with_name("record.json").read_text())["resumed_from"]
            == [record["step"]]
        )
    )
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=60) != 0


def test_second_run_in_a_folder_in_use_is_refused(args, lra_command, tmp_path):
    long = [*args, "trainer.steps=100000", "trainer.eval_every=100000", "trainer.log_every=1"]
    first = subprocess.Popen([sys.executable, "-m", "lra.cli", "train", *long])
    try:
        wait_for(lambda: next((tmp_path / "runs").rglob("metrics.jsonl"), None))
        done = lra_command("train", *long, "resume=auto")
        assert done.returncode == 4
        assert len(done.stderr.strip().splitlines()) == 1
    finally:
        first.kill()
        first.wait()


def wait_for(ready, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := ready():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line(lra_command, args):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lra.cli", "tasks"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_listings_name_what_conf_holds(lra_command):
    for command, group in (("tasks", "task"), ("models", "model")):
        lines = lra_command(command).stdout.splitlines()
        names, sentences = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
        assert list(names) == options.options(group)
        assert all(
            sentence.endswith(".") for sentence in sentences
        )  # whole, not cut at the end of a line
    assert "2312.06837" in sentences[names.index("stu")]


def test_models_of_a_task_are_listed_with_their_costs(lra_command):
    done = lra_command(
        "models", "task=listops_short", "model=stu,lru", "backbone.width=16", "--format", "markdown"
    )
    assert done.returncode == 0, done.stderr
    assert "listops_short, protocol strict; FLOPs: one example, forward" in done.stdout
    assert [
        line.split()[1] for line in done.stdout.splitlines() if re.match(r"\| (stu|lru)", line)
    ] == ["stu", "lru"]
    for words, message in (
        (["listops"], "listops: expected KEY=VALUE"),
        (["task=listop"], "unknown task=listop"),
    ):
        done = lra_command("models", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"lra: error: {message}")


def test_doctor_reports_versions_devices_data_and_tracking(lra_command, tmp_path):
    done = lra_command(
        "doctor", "--data-root", tmp_path, env=os.environ | {"WANDB_MODE": "offline"}
    )
    assert done.returncode == 0, done.stderr
    for word in ("jax", "flax", "cpu", "nothing prepared", "W&B"):
        assert word in done.stdout


def test_data_commands_prepare_verify_show_and_export(lra_command, tmp_path):
    small = ["--set", "task.sizes={train: 30, val: 5, test: 5}", f"data.root={tmp_path}"]
    done = lra_command("data", "prepare", "listops_short", "--export", tmp_path / "out", *small)
    assert done.returncode == 0, done.stderr
    assert "train 30, val 5, test 5" in done.stdout
    lines = {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "out").iterdir()}
    assert lines == {
        "basic_train.tsv": 31,
        "basic_val.tsv": 6,
        "basic_test.tsv": 6,
    }  # a header and the rows
    assert "sound" in lra_command("data", "verify", "listops_short", *small).stdout
    shown = lra_command("data", "show", "listops_short", "-n", "2", *small).stdout
    assert len(shown.splitlines()) == 2
    assert "[" in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["prepare", "copy", "--export", "out"],
            1,
            "copy has no file format of its own to export to",
        ),
        (
            ["show", "pathfinder", "-n", "1", "--png", "packed"],
            1,
            "packed: Is a directory; mend that or set another --png",
        ),
        (["show", "pathfinder", "-n", "0"], 2, "-n 0: expected 1 or more"),
        (["prepare", "text"], 3, "aclImdb_v1.tar.gz (84 MB)"),
        (["prepare", "retrieval"], 3, "lra_release.gz (8.2 GB"),
        (
            ["prepare", "pathfinder", "--set", "task.source=release"],
            3,
            "pathfinder32/curv_contour_length_14",
        ),
        (
            ["prepare", "pathfinder", "--set", "task.level=heavy"],
            2,
            "level=heavy; expected one of easy, intermediate",
        ),
        (["info", "text=1"], 2, "no task named"),
        (["info", "pathfindre"], 2, "unknown task=pathfindre (did you mean pathfinder"),
    ],
)
def test_bad_data_command_is_one_line(words, code, message, lra_command, tmp_path):
    (tmp_path / "packed").mkdir()
    small = (
        ["--set", "task.sizes={train: 2, val: 1, test: 1}"]
        if words[1] in ("copy", "pathfinder")
        else []
    )
    done = lra_command("data", *words, *small, "--set", "data.root=.", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_data_info_verify_and_show_of_pictures(lra_command, tmp_path):
    small = ["--set", "task.sizes={train: 3, val: 1, test: 2}", f"data.root={tmp_path}"]
    assert "not prepared" in lra_command("data", "info", "pathfinder", *small).stdout
    assert (
        "protocol lra2020"
        in lra_command("data", "info", "pathfinder", "protocol=lra2020", *small).stdout
    )
    done = lra_command("data", "verify", "pathfinder", *small)
    assert done.returncode == 0, done.stderr
    assert "no reference is known for these settings" in done.stdout
    assert "pathfinder: sound" in done.stdout
    assert "to beat: majority" in lra_command("data", "info", "pathfinder", *small).stdout
    shown = lra_command("data", "show", "pathfinder", "-n", "2", "--split", "test", *small).stdout
    assert "pathfinder test 1 label" in shown
    assert (tmp_path / "shown" / "pathfinder.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_preparation_leaves_no_process_and_no_half_store(number, tmp_path):
    words = ["data", "prepare", "pathx", "--set", f"data.root={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lra.cli", *words], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: next(tmp_path.glob("packed/.*building-*"), None))
    time.sleep(1)
    process.send_signal(number)
    _, stderr = process.communicate(
        timeout=60
    )  # the workers have closed stderr too, so they are gone
    assert process.returncode == 130
    assert "interrupted; the same command goes on with what is finished" in stderr
    assert not list(tmp_path.glob("packed/.*building-*"))
