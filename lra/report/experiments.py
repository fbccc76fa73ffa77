"""The tables of `lra experiments`: published scores, our runs and costs of conf/experiment/.

The head of a file states what it reproduces; these lines are read:

    # Published: 61.04 (STU; arXiv 2312.06837v4, Table 2; median of 5).
    # Cost: 3.4e17 FLOPs, 3 forward passes of every example; 5,216,778 parameters.

The first names the accuracy (or FAIL, or only "none."), the model in results/published.csv and the
source. FLOPs of training count an update as three forward passes, as `lra models` counts those.
"""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from lra.config.compose import compose, run_config, upgrade_config
from lra.config.messages import chosen_options
from lra.config.options import CONF, options
from lra.config.schema import keys_affecting
from lra.errors import ConfigError
from lra.report.formats import TABULATE_FORMATS
from lra.report.published import published_path
from lra.report.selection import Record, is_scored
from lra.runs.records import config_hash
from lra.runs.run_folder import load_records

PUBLISHED = re.compile(
    r"^# Published: (?:none|(?P<score>\d+\.\d+|FAIL) \((?P<row>[^;\n]+); (?P<source>.+)\))\.$", re.M
)
COST = re.compile(
    r"^# Cost: (?P<flops>\d\.\de\d+) FLOPs, 3 forward passes of every example; "
    r"(?P<params>[\d,]+) parameters\.$",
    re.M,
)
CAPTION = "Test accuracy in %: published / ours, the median of finished runs (their number)."
TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "scifar")


class Experiment(NamedTuple):
    """What the file of an experiment states; None for a number that it lacks.

    Attributes:
        score: published accuracy in percent as printed, or FAIL.
        row: the model of this score in results/published.csv.
        flops: of a whole training.
    """

    name: str
    task: str
    model: str
    score: str | None
    row: str | None
    source: str | None
    flops: float | None
    params: int | None

    @property
    def variant(self) -> str:
        """The file's name, or that of the model if the file is not named after it."""
        stem = self.name.rpartition("/")[2]
        return stem if stem.startswith(self.model) else self.model


def experiments() -> list[Experiment]:
    """All experiments in conf/experiment, in the order of their names."""
    return [read_experiment(name) for name in options("experiment")]


def read_experiment(name: str) -> Experiment:
    """The experiment `name` as its file states it."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text("utf-8")
    task, model = (
        next(iter(chosen_options(group, [f"experiment={name}"])), "") for group in ("task", "model")
    )
    published, cost = PUBLISHED.search(text), COST.search(text)
    score, row, source = published.group("score", "row", "source") if published else (None,) * 3
    flops = float(cost["flops"]) if cost else None
    params = int(cost["params"].replace(",", "")) if cost else None
    return Experiment(name, task, model, score, row, source, flops, params)


def experiments_table(
    tasks: Sequence[str] = (), runs: Iterable[str | Path] = (), format: str = "terminal"
) -> str:
    """A table of models and tasks, or with `tasks` a list of their experiments, as text.

    Args:
        runs: folders of records, in addition to results/runs.
        format: terminal, markdown, latex or csv.
    Raises:
        ConfigError: no experiment has one of the tasks.
    """
    found = experiments()
    known = sorted({experiment.task for experiment in found})
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(f"no experiment has task {unknown[0]}; expected: {', '.join(known)}")
    records = load_records([published_path().parent / "runs", *runs])
    if tasks:
        found = [experiment for experiment in found if experiment.task in tasks]
        headers: tuple[str, ...] = ("experiment", "published", "ours", "FLOPs", "parameters")
        lines = [_line(experiment, own_score(experiment.name, records)) for experiment in found]
    else:
        headers = ("model", *TASKS)
        lines = _matrix(found, records)
    if format == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([headers, *lines])
        return text.getvalue()
    body = tabulate(lines, headers, tablefmt=TABULATE_FORMATS[format], disable_numparse=True)
    if format == "latex":
        return f"{body}\n"
    note = "`lra experiments TASK` lists the files; a dash: no published run, no experiment."
    if tasks:
        note = "FLOPs of one training. Run: lra train -m experiment=NAME seed=0,1,2"
    return f"{body}\n\n{CAPTION}\n{note}\n"


def own_score(name: str, records: Iterable[Record]) -> str:
    """The median test accuracy of the finished runs of an experiment, "60.20 (3)"; empty if none.

    A run with another value of a key that changes the result does not count, except `task.source`:
    generated and released data have a median each, "60.20 (3, generated), 60.40 (3, release)".
    """
    mine = [record for record in records if record.get("experiment") == name]
    mine = [record for record in mine if is_scored(record, "test")]
    if not mine:
        return ""
    ignored = ["seed", "task.source", *keys_affecting("speed")]

    def identity(config: Mapping[str, Any]) -> str:
        return config_hash(upgrade_config(config), without=ignored)

    today = identity(run_config(compose([f"experiment={name}"])))
    by_source: dict[str, dict[Any, float]] = {}
    for record in mine:
        if identity(record["config"]) == today:
            source = record["config"]["task"].get("source", "")
            by_source.setdefault(source, {})[record["seed"]] = (
                100 * record["metrics"]["test"]["accuracy"]
            )
    parts = []
    for source, scores in sorted(by_source.items()):
        count = f"{len(scores)}, {source}" if source else f"{len(scores)}"
        parts.append(f"{statistics.median(scores.values()):.2f} ({count})")
    return ", ".join(parts)


def _line(experiment: Experiment, ours: str) -> list[str]:
    flops = "-" if experiment.flops is None else f"{experiment.flops:.1e}".replace("e+", "e")
    params = "-" if experiment.params is None else f"{experiment.params:,}"
    return [experiment.name, experiment.score or "-", ours or "-", flops, params]


def _matrix(found: Iterable[Experiment], records: Sequence[Record]) -> list[list[str]]:
    rows: dict[str, dict[str, str]] = {}
    for experiment in sorted(found, key=lambda each: each.variant):
        if experiment.task in TASKS:
            ours = own_score(experiment.name, records)
            score = experiment.score or "none"
            cell = f"{score} / {ours}" if ours else score
            rows.setdefault(experiment.variant, {})[experiment.task] = cell
    return [[name, *(cells.get(task, "-") for task in TASKS)] for name, cells in rows.items()]
