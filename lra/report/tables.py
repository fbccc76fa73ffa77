"""Builds the comparison table: our runs, reference lines, published numbers and user results.

A cell of our runs is the median test accuracy in percent over the seeds of one configuration, the
range of the seeds or, from five on, an interval of the median, and the number of seeds. Runs that
did not finish are counted below the table.
"""

import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lra.files import write_atomically
from lra.report.formats import Table, TableRow, render
from lra.report.intervals import FEWEST_FOR_INTERVAL, binomial_error, summary_statistics
from lra.report.published import TASKS, add_results, choose_rows, published_path, read_results
from lra.report.selection import (
    Record,
    Selected,
    accuracy_of,
    command_words,
    configurations,
    contradicts_predictions,
    data_source_and_key,
    distinguishing_settings,
    grouped,
    has_learned,
    is_scored,
    mean_val_accuracy,
    restricted,
    scores_of,
    select_runs,
)
from lra.runs.run_folder import load_records

NO_RUNS = "There are no finished runs yet. Make one: lra train task=listops_short model=stu"
RECORDED = Path(__file__).resolve().parents[2] / "results" / "runs"  # in a checkout
SHORT_TIER_SUFFIX = "_short"  # task `x_short` is a smaller tier of task `x`


def comparison_table(
    paths: Iterable[str | Path],
    *,
    configs: bool = False,
    format: str = "terminal",
    output: str | Path | None = None,
    color: bool = False,
    **selection: Any,
) -> str:
    """The table of the records below `paths` as text; also written to `output` if given.

    Args:
        configs: list all configurations (`configuration_table`) instead of the best of each model.
        format, color: see `lra.report.formats.render`.
        selection: arguments of `make_table`, or `tasks`, `models` and `protocol` with `configs`.
    """
    make = configuration_table if configs else make_table
    text = render(make(load_records(paths), **selection), format, color=color)
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
        published: the rows of results/published.csv: featured, best, all, unverified or none; see
            `lra.report.published.choose_rows`.
        csv: files with the columns model, task, accuracy and optionally variant and source.
        metric: the split whose accuracy is shown, test or val.
    Raises:
        LraError: an unknown set of published rows, or a CSV file that is not valid.
    """
    known = read_results(published_path())
    shown = choose_rows(known, published)
    records = restricted(records, tasks, models, protocol)
    scored = [record for record in records if is_scored(record, metric)]
    user_results = {str(path): read_results(path) for path in csv}
    found = {record["task"] for record in scored}
    found |= {row["task"] for rows in user_results.values() for row in rows}
    columns = tasks or _ordered_tasks(found) or TASKS
    table = Table(_headings(columns, {row["task"] for row in shown}))
    _add_our_runs(table, scored, metric)
    _add_reference_lines(table, scored)
    title = "Published, best of each task" if published == "best" else "Published"
    add_results(table, "published", title, shown)
    for path, rows in user_results.items():
        add_results(table, "user", f"From {path}", rows)
    _add_remarks(table, scored, [record for record in records if not is_scored(record, metric)])
    return table


def configuration_table(
    records: Iterable[Record],
    *,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    protocol: str | None = None,
) -> Table:
    """Lists every configuration: what differs, seeds, validation and test accuracy.

    A row is named by the settings in which the configurations of a model on a task differ, or by
    the words of its command if there is only one. The best by validation comes first.
    """
    headings = {"seeds": "seeds", "val": "validation, mean %", "test": "test, median %"}
    table = Table(headings, row_heading="configuration")
    scored = [
        record
        for record in restricted(records, tasks, models, protocol)
        if is_scored(record, "test") and not contradicts_predictions(record)
    ]
    for (name, task), group in grouped(scored).items():
        configs = configurations(group)
        settings, rows = distinguishing_settings(configs), []
        for key in sorted(configs, key=lambda key: -mean_val_accuracy(configs[key])):
            runs = configs[key]
            own = Selected(runs, [], settings[key] or typed_settings(runs[0]), len(runs))
            numbers = _long_form(own, "test")
            val = numbers["val_accuracy"]
            cells = {
                "seeds": f"{numbers['n']} ({' '.join(str(run['seed']) for run in runs)})",
                "val": "" if val is None else f"{val:.1f}",
                "test": _cell(numbers),
            }
            rows.append(TableRow(own.settings, cells))
            table.long.append(numbers | {"kind": "configuration"})
        table.add_section(f"{name} on {task}", rows)
    table.remarks += _spread_remarks(table)
    if not scored:
        table.remarks.append(NO_RUNS)
    return table


def typed_settings(record: Record) -> str:
    """The words of a run's command without those that name, place or resume it."""
    others = ("task=", "model=", "protocol=", "seed=", "resume=", "output.", "data.", "tracker")
    words = (word for word in command_words(record) if not word.startswith(others))
    return " ".join(words) or "defaults"


def summary_after_run(record: Record, root: str | Path, *, color: bool = False) -> str:
    """The table that ends `lra train`: the run, other records of its task, and what to beat.

    The other records are those below `root`, and of those in results/ of a checkout the ones with
    the same protocol and data. The last line is the command for the whole table.
    """
    task = record["task"]
    table = make_table(load_records([root]), tasks=[task], published="best")
    cell = f"{100 * (accuracy_of(record, 'test') or 0.0):.2f}"
    this_run = TableRow(f"{record['model']}, seed {record['seed']}", {task: cell})
    table.sections.insert(0, ("This run", [this_run]))
    if RECORDED.is_dir() and RECORDED.resolve() != Path(root).resolve():
        same = [
            other
            for other in restricted(load_records([RECORDED]), [task], None, record["protocol"])
            if is_scored(other, "test")
            and data_source_and_key(other) == data_source_and_key(record)
        ]
        rows = [
            TableRow(name, {task: _cell(_long_form(selected, "test"))})
            for (name, _), selected in select_runs(same).items()
        ]
        table.sections[2:2] = [("Recorded by this project, results/runs", rows)] if rows else []
    paths = "" if str(root) == "runs" else f" {shlex.quote(str(root))}"
    table.remarks.append(
        f"All models and sources: lra table{paths} --task {task} (--published all, --configs)"
    )
    return render(table, color=color)


# --- Our runs ------------------------------------------------------------------------------------


def _add_our_runs(table: Table, records: Sequence[Record], metric: str) -> None:
    rows: dict[str, TableRow] = {}
    for (name, task), selected in select_runs(records).items():
        if task in table.columns:
            numbers = _long_form(selected, metric)
            table.long.append(numbers)
            marks = "".join(table.add_footnote(note) for note in selected.notes)
            rows.setdefault(name, TableRow(name)).cells[task] = _cell(numbers) + marks
    protocols = " and ".join(sorted({record["protocol"] for record in records}))
    table.add_section(f"Ours, {metric} accuracy in %, protocol {protocols}", rows.values())


def _long_form(selected: Selected, metric: str) -> dict[str, Any]:
    """The numbers behind a cell, with the keys of `LONG_FORM_COLUMNS`."""
    runs, first = selected.runs, selected.runs[0]
    summary = summary_statistics([100 * run["metrics"][metric]["accuracy"] for run in runs])
    examples = scores_of(first, metric).get("count")
    error = 100 * binomial_error(summary["median"] / 100, examples) if examples else None
    learned = [has_learned(run, metric) for run in runs]
    val = [round(100 * value, 4) for run in runs if (value := accuracy_of(run, "val")) is not None]
    source, key = data_source_and_key(first)
    numbers = {
        "kind": "ours",
        "task": first["task"],
        "model": first["model"],
        "variant": first.get("experiment") or "",
        "settings": selected.settings,
        "protocol": first["protocol"],
        "data_source": source,
        "data_key": key,
        "accuracy": summary["median"] if None in learned or any(learned) else "FAIL",
        **summary,
        "examples": examples,
        "test_error": error,
        "learned": None if None in learned else sum(map(bool, learned)) / len(runs),
        "val_accuracy": statistics.mean(val) if val else None,
        "params": (first.get("params") or {}).get("total"),
        "steps": first.get("step"),
        "tuning_runs": selected.tuning_runs,
        "source": " ".join(sorted({str(run.get("commit") or "") for run in runs} - {""})),
        "note": "; ".join(selected.notes),
    }
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in numbers.items()
    }


def _cell(numbers: Mapping[str, Any]) -> str:
    n, learned = numbers["n"], numbers["learned"]
    if learned == 0:
        return f"FAIL ({numbers['median']:.1f}) n={n}"
    interval = f" ({numbers['min']:.1f} to {numbers['max']:.1f})" if n > 1 else ""
    if numbers["ci_low"] is not None:
        interval = f" [{numbers['ci_low']:.1f}, {numbers['ci_high']:.1f}]"
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


def _ordered_tasks(tasks: Iterable[str]) -> list[str]:
    """Published tasks in their customary order, a short tier before its task; then the others."""
    ranks = {task: rank for rank, task in enumerate(TASKS)}

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
        remarks += _spread_remarks(table)
        remarks.append(f"Data: {', '.join(used)}.")
    else:
        remarks.append(NO_RUNS)
    if unscored:
        remarks.append(f"Not counted: {_unscored_remark(unscored)}.")
    if any(title.startswith("Published") for title, _ in table.sections):
        remarks.append(
            "Published: measured with the protocols and data of their authors; not directly "
            "comparable with ours."
        )
    if "FAIL" in cells:
        remarks.append("FAIL: reported as not learned, at chance or out of memory.")
    if any(cell.startswith("FAIL (") for cell in cells):
        remarks.append("FAIL (median): no seed exceeds chance by three standard errors.")


def _spread_remarks(table: Table) -> list[str]:
    """What the numbers in the cells of our runs are."""
    ours = [row for row in table.long if row["kind"] in ("ours", "configuration")]
    if not ours:
        return []
    counts = [row["n"] for row in ours]
    forms = ["(lowest to highest seed)"] if any(1 < n < FEWEST_FOR_INTERVAL for n in counts) else []
    if max(counts) >= FEWEST_FOR_INTERVAL:
        forms.append("[95 % interval of the median by the sign test; 93.75 % for n=5]")
    found = [f"Ours: median over n seeds {' or '.join(forms)}".strip() + "."]
    errors: dict[str, tuple[float, int]] = {}
    for row in ours:
        if row["examples"]:
            error = row["test_error"], row["examples"]
            errors[row["task"]] = max(error, errors.get(row["task"], error))
    if errors:
        parts = [f"{task} ±{e:.1f} points ({n:,} examples)" for task, (e, n) in errors.items()]
        found.append(f"Sampling error of the scored examples, 95 %, binomial: {', '.join(parts)}.")
    return found


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
