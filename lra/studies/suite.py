"""`lra suite`: the same tasks, budget, tuning and seeds for every model.

A suite is a file conf/suite/NAME.yaml. A cell is a model on a task: one run of the first seed for
each point of the grid, then one run of each other seed with the point that has the best validation
accuracy. The test accuracy plays no part in the choice. Each run is one of `lra train`, in
output.root/NAME, and finished runs are skipped, so that a stopped suite continues.
"""

import itertools
import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lra
from lra.config.messages import nearest
from lra.config.options import CONF, options
from lra.config.rules import format_value
from lra.config.schema import keys_affecting
from lra.errors import ConfigError, DivergedError, LraError, PreemptedError
from lra.files import write_atomically
from lra.report.compare import ranks_over_tasks
from lra.report.formats import Table, TableRow
from lra.report.selection import Record, accuracy_of, is_scored, select_runs
from lra.report.tables import make_table
from lra.runs.run_folder import load_records

log = logging.getLogger(__name__)

ROOT = Path("runs/suites")
RECORDED = Path(__file__).resolve().parents[2] / "results" / "suites"  # in a checkout
RULES = "suite.yaml"  # in the folder of a suite's runs: the rules that they follow
DRAWS = 2000  # of the bootstrap


@dataclass
class Suite:
    """The rules of a suite, as in its file.

    Attributes:
        train: words of `lra train` for every run.
        options: further words for the runs of a model.
        grid: values of each key; its points are all combinations.
        seeds: the first one is that of the grid.
    """

    tasks: list[str]
    models: list[str]
    train: list[str] = field(default_factory=list)
    options: dict[str, list[str]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])

    def points(self) -> list[list[str]]:
        """The points of the grid as words of `lra train`."""
        values = itertools.product(*self.grid.values())
        return [
            [f"{key}={format_value(value)}" for key, value in zip(self.grid, point, strict=True)]
            for point in values
        ]

    def runs_per_cell(self) -> int:
        return len(self.points()) + len(self.seeds) - 1


class Selection(NamedTuple):
    """What the words of a command select: tasks, models, further words, and the folder of runs."""

    tasks: list[str]
    models: list[str]
    words: list[str]
    folder: Path


def load_suite(name: str) -> Suite:
    """The suite of conf/suite/NAME.yaml; raises ConfigError if there is none or it is not valid."""
    if name not in (known := options("suite")):
        raise ConfigError(
            f"suite {name} is unknown{nearest(name, known)}; choose one of {', '.join(known)}"
        )
    file = CONF / "suite" / f"{name}.yaml"
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Suite), OmegaConf.load(file))
        suite = cast(Suite, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {str(error).splitlines()[0]}") from error
    for group, names in (("task", suite.tasks), ("model", [*suite.models, *suite.options])):
        check_names(group, names)
    if not suite.tasks or not suite.seeds:
        raise ConfigError(f"{file}: a suite needs at least one task and one seed")
    return suite


def select(suite: Suite, name: str, words: Sequence[str]) -> Selection:
    """Reads task=A,B, model=A,B, output.root=DIR and words that do not change a result.

    Raises:
        ConfigError: an unknown task or model, or a word that would change the rules.
    """
    tasks, models, root, others = suite.tasks, suite.models, ROOT, []
    free = {*keys_affecting("speed", "start", "process"), "hydra.searchpath"}
    free -= {"model.param_count", "tuning_runs"}  # rules, although a config does not keep them
    for word in words:
        key, _, value = word.partition("=")
        if key == "task":
            tasks = value.split(",")
            if wrong := [task for task in tasks if task not in suite.tasks]:
                raise ConfigError(
                    f"{word}: {wrong[0]} is no task of suite {name}; it has "
                    f"{', '.join(suite.tasks)}"
                )
        elif key == "model":
            models = value.split(",")
        elif key == "output.root":
            root = Path(value)
        elif key in free or key.partition(".")[0] in free:
            others.append(word)
        else:
            raise ConfigError(
                f"{word} changes the rules of suite {name}; its runs take task=, model= and keys "
                "that change no result, such as trainer.progress=false"
            )
    if not any(word.startswith("hydra.searchpath=") for word in others):
        check_names("model", models)
    return Selection(tasks, models, others, root / name)


def check_names(group: str, names: Iterable[str]) -> None:
    known = options(group)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{group}={name} is unknown{nearest(name, known)}; choose of {', '.join(known)}"
            )


def run(suite: Suite, chosen: Selection) -> list[str]:
    """Makes the runs that are missing and returns a line for each failed one.

    Raises:
        PreemptedError: a signal or the time limit; finished runs stay, and the same command
            continues.
        ConfigError: the folder holds runs of other rules.
    """
    rules = check_rules(suite, chosen.folder)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.folder / RULES, rules.encode())
    failures: list[str] = []
    first, *others = suite.seeds
    for task, model in itertools.product(chosen.tasks, chosen.models):
        fixed = [*chosen.words, *suite.train, f"task={task}", f"model={model}"]
        fixed += [*suite.options.get(model, []), "resume=auto", f"output.root={chosen.folder}"]
        points = suite.points()
        tuned = [attempt([*fixed, *point, f"seed={first}"], failures) for point in points]
        if None in tuned:  # another start completes the grid before it chooses
            continue
        scores = [accuracy_of(record or {}, "val") or 0.0 for record in tuned]
        _, point = max(zip(scores, points, strict=True), key=lambda pair: pair[0])
        for seed in others:
            attempt([*fixed, *point, f"seed={seed}"], failures)
    return failures


def attempt(words: Sequence[str], failures: list[str]) -> Record | None:
    """The record of a run, {} if it diverged, None if it failed; adds a line to `failures`."""
    shown = " ".join(word for word in words if not word.startswith(("resume=", "output.root=")))
    log.info("lra train %s", shown)
    try:
        return lra.train(words)
    except PreemptedError:
        raise
    except LraError as error:
        failures.append(f"lra train {shown}: {error}")
        log.error("%s", failures[-1])
        return {} if isinstance(error, DivergedError) else None


def check_rules(suite: Suite, folder: Path) -> str:
    """The rules as text; raises ConfigError if the runs of a folder follow others, or unknown ones.

    The lists of tasks and models may grow: a new one makes no run invalid.
    """
    rules = {key: getattr(suite, key) for key in ("train", "options", "grid", "seeds")}
    text, file = OmegaConf.to_yaml(OmegaConf.create(rules)), folder / RULES
    has_runs = folder.is_dir() and any(folder.iterdir())
    if has_runs and not (file.exists() and file.read_text() == text):
        raise ConfigError(
            f"{file}: the runs there follow other rules than today's; set another output.root"
        )
    return text


def records_of(suite: Suite, chosen: Selection) -> list[Record]:
    """The records of the suite in its folder and, in a checkout, in results/suites."""
    recorded = RECORDED / chosen.folder.name
    folders = {folder.resolve(): folder for folder in (chosen.folder, recorded) if folder.is_dir()}
    for folder in folders.values():
        check_rules(suite, folder)
    records = load_records([*folders.values()]) if folders else []
    return [record for record in records if record["task"] in chosen.tasks]


def status(suite: Suite, chosen: Selection) -> Table:
    """Finished runs of each cell, of those that it needs."""
    table = Table({task: task for task in chosen.tasks})
    records, needed = records_of(suite, chosen), suite.runs_per_cell()
    finished = [record for record in records if is_scored(record, "test")]
    done = 0
    rows = []
    for model in chosen.models:
        counts = {
            task: sum(r["task"] == task and r["model"] == model for r in finished)
            for task in chosen.tasks
        }
        done += sum(min(count, needed) for count in counts.values())
        rows.append(TableRow(model, {task: f"{n} of {needed}" for task, n in counts.items()}))
    table.add_section("Finished runs", rows)
    table.remarks.append(f"{done} of {needed * len(chosen.tasks) * len(chosen.models)} runs.")
    for record in records:
        if record["status"] not in ("finished", "running"):
            table.remarks.append(f"{record['status']}: {record['path']}")
    return table


def make_suite_table(suite: Suite, chosen: Selection) -> Table:
    """One row per model: each task, mean rank, average, learned tasks, parameters, time.

    A cell shows the grid point that validation prefers. Ranks and averages are those of the models
    that have all tasks and seeds.
    """
    records = [record for record in records_of(suite, chosen) if is_scored(record, "test")]
    base = make_table(records, tasks=chosen.tasks, published="none")
    if not base.sections:
        raise LraError(f"{chosen.folder} has no finished runs; `lra suite run` makes them")
    cells = select_runs(records)
    scores = {
        name: {task: test_accuracies(runs.runs) for (n, task), runs in cells.items() if n == name}
        for name in dict.fromkeys(name for name, _ in cells)
    }
    seeds = len(suite.seeds)
    complete = {
        name: found
        for name, found in scores.items()
        if len(found) == len(chosen.tasks) and all(len(runs) == seeds for runs in found.values())
    }
    medians = {name: [*map(statistics.median, found.values())] for name, found in complete.items()}
    ranks = ranks_over_tasks(medians) if medians else {}
    columns = dict(base.columns) | {"rank": "mean rank", "average": "average"}
    table = Table(columns | {"learned": "learned", "params": "parameters", "hours": "hours"})
    for row in (row for _, rows in base.sections[:1] for row in rows):
        found = [
            record for (name, _), runs in cells.items() if name == row.name for record in runs.runs
        ]
        row.cells |= summary_cells(found)
        if row.name in complete:
            low, high = average_interval(complete[row.name].values())
            average = statistics.mean(medians[row.name])
            row.cells["average"] = f"{average:.1f} [{low:.1f}, {high:.1f}]"
            row.cells["rank"] = f"{ranks[row.name]:.2f}"
        for task in chosen.tasks:
            row.cells.setdefault(task, "missing")
    title, rows = base.sections[0]
    rows.sort(key=lambda row: ranks.get(row.name, float("inf")))
    table.sections = [(title, rows), *base.sections[1:]]
    table.footnotes, table.remarks, table.long = base.footnotes, base.remarks, base.long
    table.remarks.append(
        "Average of the medians, 95 % bootstrap over the seeds of each task (stratified; Agarwal "
        f"et al. 2021, arXiv 2108.13264). Mean rank among {len(complete)} models with all runs. "
        "Hours of training of the runs shown."
    )
    return table


def test_accuracies(runs: Iterable[Record]) -> list[float]:
    return [100 * (accuracy_of(run, "test") or 0.0) for run in runs]


def summary_cells(runs: Sequence[Record]) -> dict[str, str]:
    """Share of runs that learned, range of parameters, and hours of training."""
    sizes = [size for run in runs if (size := (run.get("params") or {}).get("total"))]
    hours = sum((run.get("time") or {}).get("train_s") or 0.0 for run in runs) / 3600
    learned = sum(bool(run.get("learned")) for run in runs)
    params = f"{min(sizes):,} to {max(sizes):,}" if sizes else ""
    return {"learned": f"{learned} of {len(runs)}", "params": params, "hours": f"{hours:.1f}"}


def average_interval(tasks: Iterable[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Interval of the average of medians: 2.5 and 97.5 % quantiles of a stratified bootstrap."""
    rng = np.random.default_rng(seed)
    medians = [
        np.median(rng.choice(np.asarray(values), (DRAWS, len(values))), axis=1) for values in tasks
    ]
    low, high = np.quantile(np.mean(medians, axis=0), [0.025, 0.975])
    return float(low), float(high)


def list_suites() -> Iterator[str]:
    """A line for each suite: its models, tasks and number of runs."""
    for name in options("suite"):
        suite = load_suite(name)
        runs = suite.runs_per_cell() * len(suite.tasks) * len(suite.models)
        yield (
            f"{name:<10} {len(suite.models)} models x {len(suite.tasks)} tasks, {runs} runs: "
            f"{', '.join(suite.tasks)}"
        )
