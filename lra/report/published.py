"""Reads CSV files of published or user-supplied results and adds them to a table."""

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lra.errors import ConfigError, LraError
from lra.report.formats import Table, TableRow

TASKS = ("listops", "text", "retrieval", "image", "scifar", "pathfinder", "pathx")  # as in tables


def published_path() -> Path:
    """The file of published numbers: under results/ in a checkout, under lra/ in a wheel."""
    root = Path(__file__).resolve().parents[2]
    for path in (root / "results" / "published.csv", root / "lra" / "published.csv"):
        if path.exists():
            return path
    raise LraError(f"published.csv is neither in {root}/results nor in {root}/lra; reinstall")


def read_results(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV file with the columns model, task and accuracy (percent or FAIL).

    The columns variant, std, source and note are optional; the file of published numbers also has
    trust (primary: printed by the authors or those who made the run; quoted; low), via (where a
    quoted number was read) and featured.

    Raises:
        LraError: a value that is not valid, with file, line and column.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LraError(f"cannot read {path}: {error}; expected a CSV file in UTF-8") from error
    reader = csv.DictReader(io.StringIO(text))
    for column in ("model", "task", "accuracy"):
        if column not in (reader.fieldnames or ()):
            raise LraError(
                f"{path}, line 1: no column {column}; expected model,task,accuracy[,variant,source]"
            )
    rows: list[dict[str, str]] = []
    lines: dict[tuple[str, ...], int] = {}
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        rows.append(_checked(place, row))
        key = tuple(rows[-1].get(name, "") for name in ("model", "variant", "source", "task"))
        if key in lines:
            raise LraError(
                f"{place}: {key[0]} has a result on {key[3]} in line {lines[key]} already; "
                "remove one, or give them another variant or source"
            )
        lines[key] = reader.line_num
    return rows


def choose_rows(results: Sequence[Mapping[str, str]], which: str) -> list[Mapping[str, str]]:
    """Rows of results/published.csv.

    Args:
        which: featured (one row for each known model), best (the highest accuracy of each task),
            all (without rows of low trust), unverified (all, with those of low trust) or none.
    Raises:
        ConfigError: another word.
    """
    credible = [row for row in results if row["trust"] != "low"]
    best: dict[str, Mapping[str, str]] = {}
    for row in credible:
        if row["accuracy"] != "FAIL":
            other = best.setdefault(row["task"], row)
            if float(row["accuracy"]) > float(other["accuracy"]):
                best[row["task"]] = row
    chosen = {
        "featured": [row for row in credible if row["featured"] == "1"],
        "best": list(best.values()),
        "all": credible,
        "unverified": list(results),
        "none": [],
    }
    if which not in chosen:
        raise ConfigError(f"published={which} is unknown; choose {', '.join(chosen)}")
    return chosen[which]


def add_results(table: Table, kind: str, title: str, results: Iterable[Mapping[str, str]]) -> None:
    """Adds a section of results with their digits as printed; sources and notes are footnotes."""
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = defaultdict(dict)
    for result in results:
        if result["task"] in table.columns:
            key = result["model"], result.get("variant", ""), result.get("source", "")
            groups[key][result["task"]] = result
    rows = []
    for (model, variant, source), by_task in groups.items():
        footnote = "; ".join(filter(None, [source, _notes(by_task)]))
        name = ", ".join(filter(None, [model, variant]))
        name += table.add_footnote(footnote) if footnote else ""
        rows.append(TableRow(name, {task: _cell(row) for task, row in by_task.items()}))
        keys = ("task", "model", "variant", "accuracy", "std", "source", "note")
        table.long += [
            {"kind": kind, **{key: result.get(key, "") for key in keys}}
            for result in by_task.values()
        ]
    table.add_section(title, rows)


def _cell(row: Mapping[str, str]) -> str:
    return row["accuracy"] + (f" ±{row['std']}" if row.get("std") else "")


def _notes(by_task: Mapping[str, Mapping[str, str]]) -> str:
    """Each distinct note once, with its tasks unless it holds for all of them."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for task, result in by_task.items():
        for note in filter(None, result.get("note", "").split("; ")):
            tasks[note].append(task)
    return "; ".join(
        note if len(names) == len(by_task) else f"{', '.join(names)}: {note}"
        for note, names in tasks.items()
    )


def _checked(place: str, row: Mapping[str | None, Any]) -> dict[str, str]:
    if None in row:
        raise LraError(
            f"{place}: more values than columns; put values with commas in double quotes"
        )
    clean = {str(key): (value or "").strip() for key, value in row.items()}
    for column in ("model", "task"):
        if not clean[column]:
            raise LraError(f"{place}, column {column}: empty; expected a name")
    accuracy = clean["accuracy"]
    try:
        percent = 0.0 if accuracy == "FAIL" else float(accuracy)
    except ValueError:
        percent = math.nan
    if not (percent == 0 or 1 < percent <= 100):  # 0.61 is a fraction
        raise LraError(
            f"{place}, column accuracy: found {accuracy!r}; expected percent (61.04) or FAIL"
        )
    if (std := clean.get("std")) and not re.fullmatch(r"\d+(\.\d+)?", std):
        raise LraError(f"{place}, column std: found {std!r}; expected points (0.25) or nothing")
    return clean
