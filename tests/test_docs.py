"""Commands, code, links and numbers of the documentation."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doc_commands import (
    PAGES,
    ROOT,
    SCRIPTS,
    SIZES,
    SMALL,
    Command,
    blocks,
    commands,
    expand_sweep,
)
from flax import nnx

import lra
from lra.bench.measurement import to_markdown
from lra.cli import parser
from lra.config.build import build_task, model_builder
from lra.config.compose import run_config, upgrade_config
from lra.config.options import options
from lra.config.schema import keys_affecting
from lra.runs.run_folder import load_records
from lra.tasks.base import SPLITS

# The walk-throughs run with the files that their pages define.
WALKS = {"docs/add_a_model.md": ("model", "ema"), "docs/add_a_task.md": ("task", "parity")}
COMMANDS = [c for page in [*PAGES, *SCRIPTS] if page not in WALKS for c in commands(page)]
FIRST = {command.verb: command for command in reversed(COMMANDS)}


def text_of(page):
    return (ROOT / page).read_text("utf-8")


def composed_words(command: Command) -> list[str]:
    """The config overrides of a command that takes those of `lra train`."""
    words = command.words
    if words[0] == "train":
        return [w for w in words[1:] if w not in ("-m", "--cfg", "job", "--resolve")]
    if words[0] in ("data", "models"):
        args, rest = parser().parse_known_args(words)
        typed = [*getattr(args, "overrides", []), *getattr(args, "set", []), *rest]
        names = [word for word in typed if "=" not in word]
        return [*(f"task={name}" for name in names[:1]), *(w for w in typed if "=" in w)]
    return []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.line[:60]}")
def test_command_parses_and_composes(command):
    if command.words[0] != "train":
        _, rest = parser().parse_known_args(command.words)
        assert all(re.match(r"[\w.]+=", word) for word in rest)
    if words := composed_words(command):
        runs = expand_sweep(words) if "," in command.line else [words]
        for overrides in runs:
            build_task(lra.compose(overrides))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, data_root):
    """A folder with one finished run in runs/ and mine/, the recorded results and a CSV file."""
    folder = tmp_path_factory.mktemp("workspace")
    words = ["task=listops_short", "model=lru", *SMALL, f"data.root={data_root}"]
    lra.train([*words, "trainer.steps=2", f"output.root={folder / 'runs'}"])
    shutil.copytree(folder / "runs", folder / "mine")
    (folder / "results").symlink_to(ROOT / "results")
    row = "model,task,accuracy,source\nMine,listops,61.5,my thesis\n"
    (folder / "my_results.csv").write_text(row)
    return folder


EXPECTED = {  # what the output of each subcommand contains
    "train": "majority",
    "train -m": "n=1",
    "eval": "accuracy",
    "check": "none failed",
    "diagnose": "interval",
    "table": "61.04",
    "compare": "P(A > B)",
    "experiments": "91.34",
    "suite": "pocket",
    "plot": "curves.png",
    "tasks": "pathfinder",
    "models": "transformer",
    "data prepare": "listops",
    "data info": "1,024",
    "data verify": "listops",
    "data show": "label",
    "reproduce": "spectrum",
}


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(verb, marks=pytest.mark.slow if verb == "train -m" else ())
        for verb in FIRST
        if not verb.startswith("bench")
    ],
)
def test_first_command_of_each_kind_runs(
    verb, workspace, data_root, tmp_path, monkeypatch, lra_main
):
    """Shortened by overrides at the end. `lra bench` takes minutes; tests/bench runs it."""
    monkeypatch.chdir(workspace)
    command = FIRST[verb]
    words = [str(*workspace.glob(w)) if w.endswith("/*") else w for w in command.words]
    small = [*(SMALL if "listops" in command.line else [SIZES]), f"data.root={data_root}"]
    if words[0] == "train":
        words += [*small, "trainer.steps=2", f"output.root={tmp_path}"]
    elif words[0] == "data":
        words += ["--set", *small]
    assert EXPECTED[verb] in lra_main(*words)


def test_every_kind_of_command_is_documented():
    inline = re.findall(r"`(lra \w+(?: [^`]+)?)`", "\n".join(map(text_of, PAGES)))
    shown = {*FIRST, *(Command("", line).verb for line in inline)}
    assert {*EXPECTED, "doctor"} <= shown


def test_quick_start_runs_an_experiment_that_exists():
    (command,) = (c for c in commands("README.md") if "experiment=listops/quick" in c.line)
    assert lra.compose(command.words[1:]).names.experiment == "listops/quick"


def test_ci_finds_the_test_line_of_the_readme():
    (pattern,) = re.findall(r'grep -E "\^(.*)" README.md', text_of(".ci/run"))
    (line,) = re.findall(rf"^{pattern}.*$", text_of("README.md"), flags=re.M)
    assert re.fullmatch(r"python3 -m venv \.venv && .*install.*\[dev\].* && .*/pytest .*", line)
    assert f"```bash\n{line}\n```" in text_of("README.md")


def test_each_task_has_a_prepare_command():
    rows = re.findall(r"^\| `(\w+)` .*`lra data prepare (\w+)", text_of("docs/data.md"), flags=re.M)
    assert sorted(name for name, _ in rows) == options("task")
    assert all(name == argument for name, argument in rows)


def test_python_example_of_the_readme(data_root, tmp_path, monkeypatch, capsys):
    (code,) = blocks("README.md", "python")
    overrides = [*SMALL, f"data.root={data_root}", "trainer.steps=2"]
    code = code.replace('"trainer.steps=100", "resume=auto"', ", ".join(map(repr, overrides)))
    code = code.replace('"strict")', f'"strict", {overrides!r})')
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["splits"]["train"].inputs.shape[0] == 64
    assert "root_operator" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TFDS's own dependencies
def test_python_example_of_the_data_page(data_root, tmp_path, monkeypatch):
    (code,) = blocks("docs/data.md", "python")
    overrides = ["task=listops_short", *SMALL, f"data.root={data_root}"]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace('["task=listops_short"]', repr(overrides)), names)
    assert len(names["train"]) == 64
    assert names["train"][0]["inputs"].shape == (32,)


def test_python_examples_of_the_python_page(workspace, data_root, monkeypatch, capsys):
    code = "".join(blocks("docs/python.md", "python"))
    overrides = [*SMALL, f"data.root={data_root}"]
    monkeypatch.chdir(workspace)
    names: dict = {}
    exec(
        code.replace(
            '"listops_short")["test"]', f'"listops_short", "strict", {overrides})["test"]'
        ),
        names,
    )
    assert "runs/listops_short/lru/" in (out := capsys.readouterr().out)
    assert "| lru" in out
    assert names["logits"].shape == (8, 10)
    assert [x.shape[:2] for x in names["hidden"]] == [(2, names["task"].seq_len)] * 3
    assert names["pooled"].shape == (2, names["hidden"][0].shape[2])


@pytest.mark.slow
def test_notebook_runs(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATA", str(data_root))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(text_of("notebooks/quickstart.ipynb"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["record"]["status"] == "finished"
    assert names["hidden"][-1].shape == (1, names["task"].seq_len, 32)


@pytest.mark.parametrize(
    ("suite", "page"), [("data", "data.md"), ("ops", "speed.md"), ("trainer", "speed.md")]
)
def test_benchmark_table_is_that_of_the_record(suite, page):
    """Rounded as `lra bench` prints it."""
    result = json.loads((ROOT / "results" / f"bench_{suite}_cpu.json").read_text())
    assert to_markdown(result).split("\n\n")[0] in text_of(f"docs/{page}")


@pytest.fixture
def walk_through(request, tmp_path, monkeypatch):
    """Makes the two files of a page importable; yields the override that finds its YAML."""
    page = request.param
    group, name = WALKS[page]
    (code,), (yaml,) = blocks(page, "python"), blocks(page, "yaml")
    module, _ = re.search(r"^_target_: (\S+)\.(\w+)$", yaml, flags=re.M).groups()
    package = importlib.import_module(module.rpartition(".")[0])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delattr(package, name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "myconf" / group).mkdir(parents=True)
    (tmp_path / "myconf" / group / f"{name}.yaml").write_text(yaml)
    yield f"hydra.searchpath=[file://{tmp_path / 'myconf'}]"
    sys.modules.pop(module, None)
    sys.modules.pop(name, None)


@pytest.mark.parametrize("walk_through", ["docs/add_a_model.md"], indirect=True)
def test_model_of_the_walk_through_meets_the_contract(walk_through):
    cfg = lra.compose(
        [walk_through, "model=ema", "task=listops_short", "task.max_length=30", "debug=tiny"]
    )
    model = model_builder(cfg, build_task(cfg))(rngs=nnx.Rngs(params=jax.random.key(0)))
    mixer = model.blocks[0].mixer
    x = jax.random.normal(jax.random.key(1), (2, model.seq_len, cfg.backbone.width))
    mask = jnp.ones(x.shape[:2], bool)
    y, changed = (mixer(inputs, mask) for inputs in (x, x.at[:, 9:].add(1.0)))
    assert y.shape == x.shape
    assert mixer.causal
    np.testing.assert_array_equal(y[:, :9], changed[:, :9])
    assert np.abs(y[:, 9:] - changed[:, 9:]).min() > 1e-3
    keep = 0.5 ** (1 / cfg.model.half_life)
    np.testing.assert_allclose(y[:, 0], (2 - keep) * x[:, 0], rtol=1e-5)
    paths = ("/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    rates = [path for path in paths if re.search(cfg.optim.groups.rates.match, path)]
    assert rates == [f"blocks/{i}/mixer/logit" for i in range(cfg.backbone.depth)]


@pytest.mark.parametrize("walk_through", ["docs/add_a_task.md"], indirect=True)
def test_task_of_the_walk_through_gives_its_examples(walk_through, tmp_path):
    words = [walk_through, "task.sizes={train: 40, val: 10, test: 10}", f"data.root={tmp_path}"]
    splits = lra.load("parity", overrides=words)
    assert {name: len(splits[name]) for name in SPLITS} == {"train": 40, "val": 10, "test": 10}
    inputs, labels = splits["train"].inputs, splits["train"].labels
    np.testing.assert_array_equal((inputs == 2).sum(1) % 2, labels.ravel())
    assert len({split.inputs.tobytes() for split in splits.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("walk_through", list(WALKS), indirect=True)
def test_walk_through_trains_outside_a_checkout(
    walk_through, request, data_root, tmp_path, lra_main
):
    """With both files in the working directory and a `_target_` without the package."""
    (page,) = request.node.callspec.params.values()
    group, name = WALKS[page]
    yaml = tmp_path / "myconf" / group / f"{name}.yaml"
    yaml.write_text(re.sub(r"_target_: \S+\.(\w+\.\w+)", r"_target_: \1", yaml.read_text()))
    words = ["train", "--config-dir", "myconf", f"{group}={name}", "debug=tiny"]
    words += [f"data.root={data_root}", SIZES, *(SMALL[1:3] if group == "model" else [])]
    assert name in lra_main(*words)
    (record,) = tmp_path.glob("debug_runs/**/record.json")
    assert shlex.split(json.loads(record.read_text())["command"]) == ["lra", *words]


@pytest.mark.parametrize("page", WALKS)
def test_commands_of_the_walk_through_name_its_files(page):
    group, name = WALKS[page]
    text = "\n".join(blocks(page, "bash"))
    (file, key) = re.search(r"-m pytest (\S+) -k (\w+)", text).groups()
    assert (ROOT / file).exists()
    assert key == name
    for command in commands(page):
        assert name in command.line or command.line == f"lra {group}s"


def test_results_are_computed_from_the_records_beside_them(monkeypatch, lra_main):
    """The table in results/ is made of results/runs, and the README quotes rows of it."""
    monkeypatch.chdir(ROOT)
    words = ["table", "results/runs", "--task", "listops_short", "--format", "markdown"]
    table = lra_main(*words)
    assert table == text_of("results/listops_short.md")
    marked = r"<!-- rows of results/listops_short.md -->\n(.*?)<!-- end -->"
    quoted = re.search(marked, text_of("README.md"), re.S)[1]
    rows = [" ".join(line.split()) for line in quoted.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 5
    assert set(rows) <= {" ".join(line.split()) for line in table.splitlines()}


def test_records_in_results_come_from_clean_commits():
    records = load_records([ROOT / "results" / "runs"])
    assert len(records) >= 9
    for record in records:
        assert record["status"] == "finished"
        assert re.fullmatch(r"[0-9a-f]{7,}", record["commit"]), record["path"]
        assert record["command"].startswith("lra train")


def test_records_in_results_have_the_settings_that_their_commands_give_today():
    """A changed default makes a row stale: run it again."""
    ignored = {*keys_affecting("speed", "start", "process"), "seed"}
    for record in load_records([ROOT / "results" / "runs"]):
        today = run_config(lra.compose(shlex.split(record["command"])[2:]))
        settings = [flatten(upgrade_config(config)) for config in (record["config"], today)]
        differing = {
            key: [values.get(key) for values in settings]
            for key in settings[0] | settings[1]
            if settings[0].get(key) != settings[1].get(key)
        }
        assert not differing.keys() - ignored, (record["path"], differing)


def flatten(config, prefix=""):
    """Values by dotted key."""
    found = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        found |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def test_readme_is_at_most_8_kb():
    assert len(text_of("README.md").encode()) <= 8192


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """(page or file relative to the repository, anchor) of each relative link of a page."""
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (folder / path).resolve() if path else ROOT / page
            yield str(file.relative_to(ROOT)), anchor


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "results/README.md"])
def test_links_and_paths_resolve(page):
    for file, anchor in links(page):
        assert (ROOT / file).exists(), file
        assert not anchor or anchor in anchors(file), f"{file}#{anchor}"
    own = {f"{name}.{kind}" for _, name in WALKS.values() for kind in ("py", "yaml")}
    folders = "lra|models|conf|tests|scripts|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text_of(page)):
        assert Path(path).name in own or (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_readme():
    found, queue = set(), ["README.md"]
    while queue:
        page = queue.pop()
        if page not in found and page.endswith(".md"):
            found.add(page)
            queue += [file for file, _ in links(page)]
    assert set(PAGES) <= found
