"""Builds the comparison table: our runs, reference lines, published numbers and user results.

A cell of our runs is the median test accuracy in percent over the seeds of one configuration, a
bootstrap interval of the mean and the number of seeds. Runs that did not finish are counted below
the table.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lra.errors import ConfigError
from lra.files import write_atomically
from lra.report.formats import Table, TableRow, render
from lra.report.intervals import summary_statistics
from lra.report.published import add_results, published_path, read_results
from lra.report.selection import (
    Record,
    accuracy_of,
    data_source_and_key,
    has_learned,
    is_scored,
    select_runs,
    tuning_runs,
)
from lra.runs.run_folder import load_records

LRA_TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")  # first columns
SHORT_TIER_SUFFIX = "_short"  # task `x_short` is a smaller tier of task `x`


def comparison_table(
    paths: Iterable[str | Path],
    *,
    format: str = "terminal",
    output: str | Path | None = None,
    color: bool = False,
    **selection: Any,
) -> str:
    """The table of the records below `paths` as text; also written to `output` if given.

    Args:
        format, color: see `lra.report.formats.render`.
        selection: arguments of `make_table`.
    """
    text = render(make_table(load_records(paths), **selection), format, color=color)
    if output is not None:
        write_atomically(Path(output), text.encode())
    return text


def make_table(
    records: Iterable[Record],
    *,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    protocol: str | None = None,
    published: str = "featured",
    csv: Sequence[str | Path] = (),
    metric: str = "test",
) -> Table:
    """Builds the table of records.

    Args:
        records: as `load_records` returns them.
        tasks, models, protocol: restrict the records; None for all.
        published: featured (one row for each model), all or none of results/published.csv.
        csv: files with the columns model, task, accuracy and optionally variant and source.
        metric: the split whose accuracy is shown, test or val.
    Raises:
        LraError: an unknown set of published rows, or a CSV file that is not valid.
    """
    known = read_results(published_path())
    shown = {"featured": [row for row in known if row["featured"] == "1"], "all": known, "none": []}
    if published not in shown:
        raise ConfigError(f"published={published} is unknown; choose {', '.join(shown)}")
    records = [
        record
        for record in records
        if (tasks is None or record["task"] in tasks)
        and (models is None or record["model"] in models)
        and (protocol is None or record["protocol"] == protocol)
    ]
    scored = [record for record in records if is_scored(record, metric)]
    user_results = {str(path): read_results(path) for path in csv}
    file_order = list(dict.fromkeys([*LRA_TASKS, *(row["task"] for row in known)]))
    found = {record["task"] for record in scored}
    found |= {row["task"] for rows in user_results.values() for row in rows}
    columns = tasks or _ordered_tasks(found, file_order) or file_order[:6]
    table = Table(_headings(columns, {row["task"] for row in shown[published]}))
    _add_our_runs(table, scored, metric)
    _add_reference_lines(table, scored)
    add_results(table, "published", "Published", shown[published])
    for path, rows in user_results.items():
        add_results(table, "user", f"From {path}", rows)
    _add_remarks(table, scored, [record for record in records if not is_scored(record, metric)])
    return table


# --- Our runs ------------------------------------------------------------------------------------


def _add_our_runs(table: Table, records: Sequence[Record], metric: str) -> None:
    rows: dict[str, TableRow] = {}
    for (name, task), (runs, notes) in select_runs(records).items():
        if task in table.columns:
            numbers = _long_form(runs, metric, notes)
            table.long.append(numbers)
            marks = "".join(table.add_footnote(note) for note in notes)
            rows.setdefault(name, TableRow(name)).cells[task] = _cell(numbers) + marks
    protocols = " and ".join(sorted({record["protocol"] for record in records}))
    table.add_section(f"Ours, {metric} accuracy in %, protocol {protocols}", rows.values())


def _long_form(runs: Sequence[Record], metric: str, notes: Sequence[str]) -> dict[str, Any]:
    """The numbers behind a cell, with the keys of `LONG_FORM_COLUMNS`."""
    first = runs[0]
    summary = summary_statistics([100 * run["metrics"][metric]["accuracy"] for run in runs])
    learned = [has_learned(run, metric) for run in runs]
    val = [round(100 * value, 4) for run in runs if (value := accuracy_of(run, "val")) is not None]
    source, key = data_source_and_key(first)
    numbers = {
        "kind": "ours",
        "task": first["task"],
        "model": first["model"],
        "variant": first.get("experiment") or "",
        "protocol": first["protocol"],
        "data_source": source,
        "data_key": key,
        "accuracy": summary["median"] if None in learned or any(learned) else "FAIL",
        **summary,
        "learned": None if None in learned else sum(map(bool, learned)) / len(runs),
        "val_accuracy": statistics.mean(val) if val else None,
        "params": (first.get("params") or {}).get("total"),
        "steps": first.get("step"),
        "tuning_runs": tuning_runs(runs),
        "source": " ".join(sorted({str(run.get("commit") or "") for run in runs} - {""})),
        "note": "; ".join(notes),
    }
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in numbers.items()
    }


def _cell(numbers: Mapping[str, Any]) -> str:
    n, learned = numbers["n"], numbers["learned"]
    if learned == 0:
        return f"FAIL ({numbers['median']:.1f}) n={n}"
    interval = f" [{numbers['ci_low']:.1f}, {numbers['ci_high']:.1f}]" if n > 1 else ""
    some = f", {round(learned * n)} learned" if learned is not None and learned < 1 else ""
    return f"{numbers['median']:.1f}{interval} n={n}{some}"


def _add_reference_lines(table: Table, records: Sequence[Record]) -> None:
    """Adds the accuracies of shortcuts; a cell has several values if the data of runs differ."""
    values: dict[str, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        for name, accuracy in (record.get("reference") or {}).items():
            if accuracy is not None and record["task"] in table.columns:
                values[name.replace("_", " ")][record["task"]].add(round(100 * accuracy, 4))
    rows = []
    for name, by_task in values.items():
        rows.append(TableRow(name))
        for task, accuracies in by_task.items():
            numbers, long = sorted(accuracies), {"kind": "reference", "task": task, "model": name}
            rows[-1].cells[task] = " / ".join(dict.fromkeys(f"{x:.1f}" for x in numbers))
            table.long += [long | {"accuracy": x} for x in numbers]
    table.add_section("Reference lines", rows)


# --- Columns and remarks -------------------------------------------------------------------------


def _ordered_tasks(tasks: Iterable[str], file_order: Sequence[str]) -> list[str]:
    """Tasks in the order of the file of published numbers, a short tier before its task."""
    ranks = {task: rank for rank, task in enumerate(file_order)}

    def rank(task: str) -> tuple[int, bool, str]:
        full_size = task.removesuffix(SHORT_TIER_SUFFIX)
        return ranks.get(full_size, len(ranks)), task in ranks, task

    return sorted(tasks, key=rank)


def _headings(tasks: Sequence[str], published: set[str]) -> dict[str, str]:
    """Headings by task; a short tier alone is followed by the published numbers of its task."""
    columns: dict[str, str] = {}
    for task in tasks:
        columns[task] = task
        full = task.removesuffix(SHORT_TIER_SUFFIX)
        if full not in tasks and full in published:
            columns[full] = f"{full} (published, full size)"
    return columns


def _add_remarks(table: Table, scored: Sequence[Record], unscored: Sequence[Record]) -> None:
    cells = [cell for _, rows in table.sections for row in rows for cell in row.cells.values()]
    remarks = table.remarks
    if scored:
        data: dict[str, set[str]] = defaultdict(set)
        for record in scored:
            source, key = data_source_and_key(record)
            data[record["task"]].add(f"{source or 'unknown'} {key[:8]}".strip())
        used = [
            f"{task} {' and '.join(sorted(data[task]))}" for task in table.columns if task in data
        ]
        remarks.append(
            "Ours: median over n seeds [95 % bootstrap interval of the mean, which for 2 or 3 "
            "seeds is their range]."
        )
        remarks.append(f"Data: {', '.join(used)}.")
    else:
        remarks.append(
            "There are no finished runs yet. Make one: lra train task=listops_short model=stu"
        )
    if unscored:
        remarks.append(f"Not counted: {_unscored_remark(unscored)}.")
    if any(title == "Published" for title, _ in table.sections):
        remarks.append(
            "Published: measured with the protocols and data of their authors; not directly "
            "comparable with ours."
        )
    if "FAIL" in cells:
        remarks.append("FAIL: reported as not learned, at chance or out of memory.")
    if any(cell.startswith("FAIL (") for cell in cells):
        remarks.append("FAIL (median): no seed exceeds chance by three standard errors.")


def _unscored_remark(records: Sequence[Record]) -> str:
    folders: dict[str, list[str]] = defaultdict(list)
    for record in records:
        finished = record["status"] == "finished"
        status = "finished without a score" if finished else record["status"]
        folders[status].append(str(record["path"]))
    parts = []
    for status, names in sorted(folders.items()):
        more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
        parts.append(f"{len(names)} {status} ({', '.join(sorted(names)[:3] + more)})")
    return "; ".join(parts)
