"""What the documents tell people to type works: every command of the README, and the two-file walks through."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from doc_commands import ROOT, SMALL, blocks, commands, run, shortened

from lra.bench.measurement import to_markdown
from lra.cli import data_prepare, parser
from lra.config.options import options
from lra.runs.run_folder import load_records


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_block(block, data_root, cwd):
    """Runs the lines of a block as a shell would: variables in front, patterns, `&`; returns what each line did."""
    block = re.sub(
        r"(127\.0\.0\.1):\d+", rf"\1:{free_port()}", block
    )  # the page's own may be taken
    beside, done = [], []
    with ThreadPoolExecutor() as pool:
        for line in block.splitlines():
            variables, command = re.match(r"((?:[A-Z_]+=\S+ )*)(lra .*?)(?: &)?$", line).groups()
            for pattern in re.findall(r"\S+/\*", command):
                (found,) = Path(cwd).glob(pattern)
                command = command.replace(pattern, str(found))
            words = shortened(command, data_root)
            settings = dict(part.split("=", 1) for part in variables.split())
            if line.endswith("&"):
                beside.append((line, pool.submit(run, words, cwd, **settings)))
            else:
                done.append((line, run(words, cwd, **settings)))
    return [*done, *((line, future.result()) for line, future in beside)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("docs/training.md", "bash"))))
def test_commands_of_the_training_page_work_one_after_the_other(number, data_root, tmp_path):
    for line, done in run_block(blocks("docs/training.md", "bash")[number], data_root, tmp_path):
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() or line.endswith("&")
        if "device_count=4" in line:
            assert ", 4 x cpu" in done.stdout
        if "eval" in line and "--weights last" not in line:
            assert "identical, bit for bit" in done.stdout


def test_readme_shows_the_commands_the_project_is_about():
    shown = "\n".join(commands("README.md"))
    for wanted in (
        "lra train task=listops model=stu",
        "lra train -m task=listops_short model=stu,lru,transformer seed=0,1,2",
        "lra train experiment=listops/stu",
        "resume=auto",
        "lra data prepare listops",
        "lra tasks",
        "lra models",
        "lra table",
    ):
        assert wanted in shown


def test_readme_has_one_command_a_task():
    rows = re.findall(
        r"^\| `(\w+)` .*\| `lra ([^`]*)` \|$", (ROOT / "README.md").read_text(), flags=re.M
    )
    assert sorted(name for name, _ in rows) == options("task")
    for name, command in rows:
        args = parser().parse_args(shlex.split(command))
        assert (args.run, args.tasks) == (data_prepare, [name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for page in ("README.md", "docs/synthetic_tasks.md") for c in commands(page)]
)
def test_documented_command_works(command, data_root, tmp_path):
    if "my_results.csv" in command:
        (tmp_path / "my_results.csv").write_text(
            "model,task,accuracy,source\nMine,listops,61.5,my thesis\n"
        )
    if "results/runs" in command:
        (tmp_path / "results").symlink_to(ROOT / "results")
    done = run(shortened(command, data_root), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_first_line_of_the_readme_names_an_experiment_that_exists():
    (line,) = [line for line in blocks("README.md", "bash")[0].splitlines() if "lra train" in line]
    assert (
        ROOT / "conf" / "experiment" / (re.search(r"experiment=(\S+)", line)[1] + ".yaml")
    ).exists()


def test_python_example_of_the_readme_works(data_root, tmp_path):
    (code,) = blocks("README.md", "python")
    overrides = [*SMALL, f"data.root={data_root}", "trainer.steps=2"]
    code = code.replace('"trainer.steps=100", "resume=auto"', ", ".join(map(repr, overrides)))
    code = code.replace('"strict")', f'"strict", {overrides!r})')
    done = subprocess.run(
        [sys.executable, "-c", code + "\nassert splits['train'].inputs.shape[0] == 64"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "root_operator" in done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TFDS's own dependencies
def test_python_example_of_the_data_page_works(data_root, tmp_path, monkeypatch):
    (code,) = blocks("docs/data.md", "python")
    overrides = ["task=listops_short", *SMALL, f"data.root={data_root}"]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace('["task=listops_short"]', repr(overrides)), names)
    assert len(names["train"]) == 64
    assert names["train"][0]["inputs"].shape == (32,)


@pytest.mark.parametrize(
    ("suite", "page"), [("data", "data.md"), ("ops", "speed.md"), ("trainer", "speed.md")]
)
def test_benchmark_table_is_that_of_the_record(suite, page):
    """Rounded as `lra bench` prints it."""
    result = json.loads((ROOT / "results" / f"bench_{suite}_cpu.json").read_text())
    assert to_markdown(result).split("\n\n")[0] in (ROOT / "docs" / page).read_text()


@pytest.mark.slow
def test_model_of_the_walk_through_meets_the_contract(tmp_path):
    """In a copy of the checkout, with the page's own command."""
    for folder in ("conf", "lra", "models", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (code,), (yaml,) = (
        blocks("docs/add_a_model.md", "python"),
        blocks("docs/add_a_model.md", "yaml"),
    )
    (tmp_path / "models" / "ema.py").write_text(code)
    (tmp_path / "conf" / "model" / "ema.yaml").write_text(yaml)
    (command,) = (
        line
        for line in "\n".join(blocks("docs/add_a_model.md", "bash")).splitlines()
        if "pytest" in line
    )
    words = [sys.executable, *command.split()[1:], "-q", "-n", "0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15


@pytest.mark.parametrize(
    ("page", "group", "name"),
    [("add_a_model.md", "model", "ema"), ("add_a_task.md", "task", "parity")],
)
def test_walk_through_works_outside_a_checkout(page, group, name, data_root, tmp_path):
    """The two files of the page, put beside the user's shell, train as the page says."""
    (code,), (yaml,) = blocks(f"docs/{page}", "python"), blocks(f"docs/{page}", "yaml")
    (tmp_path / f"{name}.py").write_text(code)
    conf = tmp_path / "myconf" / group
    conf.mkdir(parents=True)
    (conf / f"{name}.yaml").write_text(re.sub(r"_target_: \S+\.(\w+\.\w+)", r"_target_: \1", yaml))
    words = [
        "train",
        "--config-dir",
        "myconf",
        f"{group}={name}",
        "debug=tiny",
        f"data.root={data_root}",
    ]
    if group == "model":
        words += SMALL[:3]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    (record,) = tmp_path.glob("debug_runs/**/record.json")
    assert shlex.split(json.loads(record.read_text())["command"]) == ["lra", *words]


def test_results_are_computed_from_the_records_beside_them(tmp_path):
    """The table in results/ is what the records give, and the README quotes rows of it."""
    done = run(["table", "results/runs", "--task", "listops_short", "--format", "markdown"], ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "results" / "listops_short.md").read_text()
    quoted = re.search(
        r"<!-- rows of results/listops_short.md -->\n(.*?)<!-- end -->",
        (ROOT / "README.md").read_text(),
        re.S,
    )[1]
    rows = [" ".join(line.split()) for line in quoted.splitlines() if line.startswith("|")][2:]
    table = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert len(rows) >= 5
    assert set(rows) <= table


def test_records_in_results_come_from_clean_commits():
    records = load_records([ROOT / "results" / "runs"])
    assert len(records) >= 9
    for record in records:
        assert record["status"] == "finished"
        assert re.fullmatch(r"[0-9a-f]{7,}", record["commit"]), record["path"]
        assert record["command"].startswith("lra train")
