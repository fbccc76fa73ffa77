"""The `lra` command: output, refusals and exit codes.

Most tests call `main` in this process; signals, locks, launchers and closed streams need a new one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from deadline import deadline
from tiny import TINY

from lra.cli import main
from lra.config.options import options

ROOT = Path(__file__).parents[1]
LRA = [sys.executable, "-m", "lra.cli"]
LONG = [
    "trainer.steps=100000",
    "trainer.eval_every=100000",
    "trainer.log_every=1",
    "trainer.call_seconds=0.05",
]


@pytest.fixture
def lra(capsys, monkeypatch):
    """Runs `lra ARGS` in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*args):
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def records(root):
    return [json.loads(path.read_text()) for path in root.rglob("record.json")]


def wait_for(ready, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := ready():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


# ---- help, streams


def test_help_imports_nothing_heavy():
    code = """
import sys
from lra.cli import main
for command in ("", "train", "table", "data prepare", "doctor", "models", "diagnose", "bench ops"):
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
heavy = {"jax", "numpy", "pandas", "hydra", "wandb", "rich", "tensorflow_datasets"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: lra") == 8
    # of this suite alone
    assert "STU, recurrences and attention" in done.stdout
    assert "--fresh" not in done.stdout


@pytest.mark.parametrize("words", [["train", "--help"], ["tasks"]])
def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*LRA, *words], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*LRA, "tasks"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.startswith("lra: error: output: the disk is full")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["tabel"], "'tabel' (did you mean table?)"),
        (["data", "shwo", "copy"], "'shwo' (did you mean show?)"),
        (["bench", "opps"], "'opps' (did you mean ops?)"),
        (["table", "--format", "latx"], "'latx' (did you mean latex?)"),
        (["xyzzy"], "'xyzzy' (choose from"),
    ],
)
def test_nearest_word_is_offered_for_a_mistyped_one(lra, words, hint):
    code, _, err = lra(*words)
    assert code == 2
    assert hint in err


# ---- train


def test_train_prints_progress_result_and_table(lra, tiny):
    code, out, err = lra("train", *tiny)
    assert code == 0, err
    assert "to beat: majority" in out
    assert re.search(r"step +4/4 +loss .* accuracy .* examples/s +.* left +validation loss", out)
    assert re.search(r"test accuracy \d+\.\d+ %.*root operator", " ".join(out.split()))
    assert re.search(r"^ This run\n stu, seed 0 +\d+\.\d\d$", out, flags=re.M)
    assert "63.85 ±0.45" in out  # the best published accuracy on ListOps
    assert "61.04" not in out  # other published numbers
    words = " ".join(out.split())
    assert re.search(r"All models and sources: lra table \S+ --task listops_short", words)
    assert err == ""


def test_an_error_of_the_table_does_not_change_the_exit_code(lra, tiny, monkeypatch):
    def fail(*_, **__):
        raise KeyError("accuracy")

    monkeypatch.setattr("lra.report.tables.summary_after_run", fail)
    code, _, err = lra("train", *tiny, "model=lru")
    assert (code, err) == (0, "lra: warning: no table: KeyError: 'accuracy'\n")


def test_train_creates_only_the_folder_of_its_runs(data_root, tmp_path):
    words = ["train", *TINY, "experiment=null", f"data.root={data_root}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*LRA, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["debug_runs"]


@pytest.mark.slow
def test_a_sweep_prints_one_table_after_its_last_run(lra, tiny, tmp_path):
    code, out, err = lra("train", "-m", *tiny, "model=lru", "seed=0,1")
    assert code == 0, err
    found = [(r["model"], r["seed"], r["status"]) for r in records(tmp_path / "runs")]
    assert sorted(found) == [("lru", 0, "finished"), ("lru", 1, "finished")]
    assert out.count("Ours, test accuracy") == 1
    assert len(re.findall(r"n=2", out[out.index("Ours, test accuracy") :])) == 1


BAD_SWEEP = ["optim.lr=1e30,1e-3", "optim.clip=null", "optim.warmup=0"]


def check_bad_sweep(code, out, err, runs):
    assert code == 5
    assert err.count("NaN or infinite") == 1  # logged once
    assert "a run of the sweep failed" in err
    assert "1 diverged" in out
    assert sorted(r["status"] for r in records(runs)) == ["diverged", "finished"]


@pytest.mark.slow
def test_a_failed_run_does_not_end_the_sweep(lra, tiny, tmp_path):
    check_bad_sweep(*lra("train", "-m", *tiny, "model=lru", *BAD_SWEEP), tmp_path / "runs")


@pytest.mark.slow
def test_a_sweep_through_joblib_logs_the_errors_of_its_workers_once(lra_command, tiny, tmp_path):
    words = ["train", "-m", *tiny, "model=lru", *BAD_SWEEP, "hydra/launcher=joblib"]
    done = lra_command(*words, timeout=300)
    check_bad_sweep(done.returncode, done.stdout, done.stderr, tmp_path / "runs")


def test_a_sweep_that_cannot_be_composed_is_one_line(lra, tiny):
    code, _, err = lra("train", "-m", *tiny, "model=lru", "seed=0,1", "model.num_filters=16")
    assert code == 2
    assert err.startswith("lra: error: model=lru has no num_filters; it has: ")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "length"), [("strict", 2048), ("lra2020", 2000)])
def test_full_length_task_trains(protocol, length, lra, tmp_path):
    small = ["task.sizes={train: 4, val: 2, test: 2}", "debug=tiny", "trainer.steps=1"]
    folders = [f"data.root={tmp_path / 'data'}", f"output.root={tmp_path / 'runs'}"]
    words = ["task=listops", f"protocol={protocol}", *small, "trainer.batch_size=2", *folders]
    code, _, err = lra("train", *words)
    assert code == 0, err
    (inputs,) = tmp_path.rglob("train.inputs.npy")
    assert np.load(inputs).shape == (4, length)
    assert [r["metrics"]["test"]["count"] for r in records(tmp_path / "runs")] == [2]


@pytest.mark.parametrize(
    ("bad", "expected", "words"),
    [
        ("model.num_filtrs=3", 2, "unknown key model.num_filtrs (did you mean model.num_filters"),
        ("model=lrv", 2, "unknown model=lrv (did you mean lru?); expected one of: "),
        ("task=listop", 2, "unknown task=listop (did you mean listops"),
        ("seed=[", 2, "cannot read an override"),
        ("seed", 2, "cannot read an override"),
        ("model=null", 2, "model=null: a run needs one"),
        (
            "experiment=listops/quick",
            2,
            "experiment=listops/quick owns its task and model; drop task=listops_short",
        ),
        ("trainer.steps=many", 2, "trainer.steps=many must be a whole number"),
        ("model.num_filters=33", 2, "lower model.num_filters or raise task.seq_len"),
        ("model.param_count=many", 2, "model.param_count=many: unknown model=many"),
        ("task.source=release", 3, "listops-1000"),
        ("--task=image", 2, "--task=image: config keys have no dashes; write task=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(lra, tiny, tmp_path, bad, expected, words):
    code, _, err = lra("train", *tiny, bad)
    assert code == expected, err
    assert len(err.splitlines()) == 1
    assert err.startswith("lra: error: ")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_signals_save_and_a_second_run_in_the_folder_is_refused(tiny, lra, tmp_path):
    command = [*LRA, "train", *tiny, *LONG]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = wait_for(lambda: next((tmp_path / "runs").rglob("metrics.jsonl"), None))
    wait_for(lambda: metrics.stat().st_size > 0)
    code, _, err = lra("train", *tiny, *LONG, "resume=auto")
    assert (code, len(err.splitlines())) == (4, 1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert re.search(r"lra: stopped by SIGINT at step \d+ of 100000.*resume=auto continues", stderr)
    assert "error" not in stderr
    (record,) = records(tmp_path / "runs")
    assert record["status"] == "preempted"

    again = subprocess.Popen([*command, "resume=auto"])
    wait_for(lambda: records(tmp_path / "runs")[0]["resumed_from"] == [record["step"]])
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=60) == 75


# ---- listings


def test_listings_name_every_option_with_one_sentence(lra):
    for command, group in (("tasks", "task"), ("models", "model")):
        _, out, _ = lra(command)
        names, sentences = zip(*(line.split(maxsplit=1) for line in out.splitlines()), strict=True)
        assert list(names) == options(group)
        assert all(sentence.endswith(".") for sentence in sentences)
    assert "2312.06837" in sentences[names.index("stu")]


def test_models_of_a_task_are_listed_with_their_costs(lra):
    words = ["task=listops_short", "model=stu,lru", "backbone.width=16", "--format", "markdown"]
    code, out, err = lra("models", *words)
    assert code == 0, err
    assert "listops_short, protocol strict; FLOPs: one example, forward" in out
    rows = [line.split()[1] for line in out.splitlines() if re.match(r"\| (stu|lru)", line)]
    assert rows == ["stu", "lru"]
    for word, message in (
        ("listops", "listops: expected KEY=VALUE"),
        ("task=listop", "unknown task=listop"),
    ):
        code, _, err = lra("models", word)
        assert (code, len(err.splitlines())) == (2, 1)
        assert err.startswith(f"lra: error: {message}")


def test_doctor_reports_versions_devices_data_and_tracking(lra, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, out, err = lra("doctor", "--data-root", tmp_path)
    assert code == 0, err
    for word in ("jax", "flax", "cpu", "nothing prepared", "W&B", "mirrored offline"):
        assert word in out


def test_doctor_names_published_files_and_the_protocols_of_stores(lra, publishers, tmp_path):
    from lra.report.doctor import published_files

    root = shutil.copytree(publishers, tmp_path / "data")
    shutil.rmtree(root / "cifar-10-batches-py")
    assert published_files(root) == (
        f"image, image_short, scifar: none under {root}; "
        f"retrieval: {root}/lra_release/lra_release/tsv_data; text, text_short: {root}/aclImdb"
    )
    (root / "cifar-10-python.tar.gz").touch()
    assert f"image, image_short, scifar: {root}/cifar-10-python.tar.gz; " in published_files(root)
    small = ["task.sizes={train: 3, val: 1, test: 1}", f"data.root={root}"]
    code, out, err = lra("data", "prepare", "listops_short", *small)
    assert code == 0, err
    assert out.startswith("listops_short, protocol strict: generated, train 3")
    assert lra("data", "prepare", "copy", *small)[0] == 0
    out = lra("doctor", "--data-root", root)[1]
    assert re.search(r"listops_short-s4-\w+ \(protocol s4 or strict: train 3, ", out)
    assert re.search(r"copy-tokens-\w+ \(train 3, ", out)


# ---- data


def test_data_commands_prepare_verify_show_and_export(lra, tmp_path):
    small = ["--set", "task.sizes={train: 30, val: 5, test: 5}", f"data.root={tmp_path}"]
    code, out, err = lra("data", "prepare", "listops_short", "--export", tmp_path / "out", *small)
    assert code == 0, err
    assert "train 30, val 5, test 5" in out
    lines = {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "out").iterdir()}
    assert lines == {"basic_train.tsv": 31, "basic_val.tsv": 6, "basic_test.tsv": 6}  # one header
    assert "sound" in lra("data", "verify", "listops_short", *small)[1]
    _, shown, _ = lra("data", "show", "listops_short", "-n", "2", *small)
    assert shown.count("listops_short train ") == 2
    assert "[" in shown


@pytest.mark.parametrize(
    ("words", "expected", "message"),
    [
        (
            ["prepare", "copy", "--export", "out"],
            1,
            "copy has no file format of its own to export to",
        ),
        (
            ["show", "pathfinder", "-n", "1", "--png", "packed"],
            1,
            "packed: Is a directory; correct the path or set another --png",
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
        (["info", "text=1"], 2, "no task given"),
        (["info", "pathfindre"], 2, "unknown task=pathfindre (did you mean pathfinder"),
    ],
)
def test_bad_data_command_is_one_line(words, expected, message, lra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed").mkdir()
    generated = words[1] in ("copy", "pathfinder")
    small = ["--set", "task.sizes={train: 2, val: 1, test: 1}"] if generated else []
    code, _, err = lra("data", *words, *small, "--set", "data.root=.")
    assert code == expected, err
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["task=listops_short", "-n", "2", "SMALL", "--split", "val"],
        ["--n", "2", "task=listops_short", "SMALL", "--split", "val"],
        ["-n", "2", "--split", "val", "SMALL", "listops_short"],
        ["listops_short", "--split", "val", "SMALL", "-n", "2"],
    ],
)
def test_words_of_data_show_stand_in_any_order(lra, tmp_path, words):
    small = ["task.sizes={train: 30, val: 5, test: 5}", f"data.root={tmp_path}"]
    words = [x for word in words for x in (small if word == "SMALL" else [word])]
    code, shown, err = lra("data", "show", *words)
    assert code == 0, err
    assert [line.split(" label ")[0] for line in shown.splitlines() if line[0] != " "] == [
        "listops_short val 0",
        "listops_short val 1",
    ]


@pytest.mark.parametrize("words", [["-n", "2", "listops_short", "--nn"], ["listops_short", "-q"]])
def test_unknown_option_after_words_of_data_show_is_refused(lra, words):
    code, _, err = lra("data", "show", *words)
    assert code == 2
    assert "unrecognized arguments" in err


@pytest.mark.parametrize("task", ["pathfinder", "listops_short", "copy"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_show_generates_only_what_it_shows(lra, tmp_path, task, split):
    small = [f"data.root={tmp_path}", "task.sizes.val=6", "task.sizes.test=3"]
    words = ["data", "show", task, "-n", "4", "--split", split, *small]
    code, first, err = lra(*words, "task.sizes.train=20000")
    assert code == 0, err
    assert not (tmp_path / "packed").exists()
    assert not (tmp_path / "generated").exists()
    lra("data", "prepare", task, *small, "task.sizes.train=20")
    assert lra(*words, "task.sizes.train=20")[1] == first  # the rows of the store


def test_escapes_in_a_review_do_not_reach_the_terminal(lra, publishers, tmp_path):
    root = shutil.copytree(publishers, tmp_path / "data")
    for file in (root / "aclImdb" / "train" / "neg").iterdir():
        file.write_text("\x1b]0;owned\x07 \x9b2J \u202e \r a caf\u00e9\tor two\n")
    words = ["text", "protocol=lra2020", "--allow-partial", f"data.root={root}"]
    code, shown, err = lra("data", "show", *words, "-n", "1")
    assert code == 0, err
    assert "\\x1b]0;owned\\x07" in shown
    assert "\\x9b2J \\u202e \\r a caf\u00e9\\tor two\n" in shown
    assert all(line.isprintable() for line in shown.splitlines())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("task.name=../../x", "task.name='../../x': expected letters, digits, _, - and ."),
        ("task.name=/etc/x", "task.name='/etc/x': expected"),
        ("task.name=.x", "task.name='.x': expected"),
        ("task.sizes.train=1000000000000", "the largest is 100000000"),
        ("task.sizes.train=1e12", "must be a whole number"),
    ],
)
def test_name_and_sizes_beyond_a_limit_are_refused(lra, tmp_path, bad, message):
    (tmp_path / "data").mkdir()
    with deadline(60):
        code, _, err = lra("data", "prepare", "pathfinder", bad, f"data.root={tmp_path / 'data'}")
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err
    assert os.listdir(tmp_path) == ["data"]
    assert os.listdir(tmp_path / "data") == []


def test_damaged_store_is_told_by_info(lra, tmp_path):
    small = ["task.sizes={train: 30, val: 5, test: 5}", f"data.root={tmp_path}"]
    assert lra("data", "prepare", "listops_short", *small)[0] == 0
    (file,) = tmp_path.glob("packed/*/val.labels.npy")
    file.unlink()
    code, out, _ = lra("data", "info", "listops_short", *small)
    assert code == 0
    assert "DAMAGED: " in out
    assert "delete the folder" in out


def test_data_info_verify_and_show_of_images(lra, tmp_path):
    small = ["--set", "task.sizes={train: 3, val: 1, test: 2}", f"data.root={tmp_path}"]
    assert "not prepared" in lra("data", "info", "pathfinder", *small)[1]
    assert "protocol lra2020" in lra("data", "info", "pathfinder", "protocol=lra2020", *small)[1]
    code, out, err = lra("data", "verify", "pathfinder", *small)
    assert code == 0, err
    assert "no reference is known for these settings" in out
    assert "pathfinder: sound" in out
    assert "to beat: majority" in lra("data", "info", "pathfinder", *small)[1]
    _, shown, _ = lra("data", "show", "pathfinder", "-n", "2", "--split", "test", *small)
    assert re.search(r"pathfinder test 1 label (0 \(separate\)|1 \(connected\)):", shown)
    assert (tmp_path / "shown" / "pathfinder.png").read_bytes().startswith(b"\x89PNG")


def test_killed_preparation_leaves_no_process(tmp_path):
    sizes = "task.sizes={train: 1000, val: 1, test: 1}"  # two calls, so at least two workers
    words = ["data", "prepare", "pathx", sizes, f"data.root={tmp_path}"]
    environment = {**os.environ, "LOKY_MAX_CPU_COUNT": "2"}
    process = subprocess.Popen([*LRA, *words], env=environment)

    def workers():
        children = psutil.Process(process.pid).children(recursive=True)
        return children if len(children) >= 3 else None  # and the resource tracker

    children = wait_for(workers)
    process.kill()
    process.wait(timeout=10)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_preparation_leaves_no_process_and_no_partial_store(number, tmp_path):
    words = ["data", "prepare", "pathx", "--set", f"data.root={tmp_path}"]
    process = subprocess.Popen([*LRA, *words], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: next(tmp_path.glob("packed/.*building-*"), None))
    time.sleep(1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)  # returns once the workers have closed stderr
    assert process.returncode == 130
    assert "lra: interrupted; the same command continues after its finished parts" in stderr
    assert not list(tmp_path.glob("packed/.*building-*"))
