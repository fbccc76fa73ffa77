"""How good is each model on each task? A table computed from records, beside published numbers and the reader's own.

A cell of ours is the median test accuracy in percent over the seeds of one configuration, with a bootstrap interval of
the mean and the number of seeds. Runs of one task that differ in protocol, data source or data never share a row. Of
several configurations of one model the best by validation is shown, and the cell says so; keys that cannot change a
result do not make two. Runs that did not finish are counted below the table, never in it. `csv` is the
same table in long form with every number behind a cell.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lra.config.compose import upgrade_config
from lra.config.schema import keys_affecting
from lra.errors import ConfigError
from lra.files import write_atomically
from lra.report.formats import Table, TableRow, render
from lra.report.published import published_path, read_results
from lra.runs.records import config_hash
from lra.runs.run_folder import load_records
from lra.runs.sanity import is_at_chance

PUBLISHED = ("featured", "all", "none")
RESAMPLES = 10_000
SHORT_TIER_SUFFIX = "_short"  # `x_short` is a smaller tier of task `x`; the only thing known here of any task's name

Record = Mapping[str, Any]


def comparison_table(
    paths: Iterable[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    protocol: str | None = None,
    published: str = "featured",
    csv: Sequence[str | Path] = (),
    format: str = "terminal",
    output: str | Path | None = None,
    metric: str = "test",
    width: int | None = None,
    color: bool = False,
) -> str:
    """What `lra table` prints: the records below `paths` as text, also written to `output` when that is given.

    Raises:
        LraError: an unknown format or set of published rows, or a CSV file of the reader's that cannot be used.
    """
    table = make_table(
        load_records(paths),
        tasks=tasks,
        models=models,
        protocol=protocol,
        published=published,
        user_csv=csv,
        metric=metric,
    )
    text = render(table, format, width=width, color=color)
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
    user_csv: Sequence[str | Path] = (),
    metric: str = "test",
) -> Table:
    """The table of these records.

    Args:
        records: as `load_records` gives them; `tasks`, `models` and `protocol` choose among them.
        published: featured (one row a model), all or none of results/published.csv.
        user_csv: files with columns model, task, accuracy (percent or FAIL) and perhaps variant and source.
        metric: the split whose accuracy is shown.
    """
    if published not in PUBLISHED:
        raise ConfigError(f"published={published} is unknown; choose {', '.join(PUBLISHED)}")
    chosen = [r for r in records if _chosen(r, tasks, models, protocol)]
    scored = [r for r in chosen if _counts(r, metric)]
    known = read_results(published_path())
    others = [
        row
        for row in known
        if published == "all" or (published == "featured" and row["featured"] == "1")
    ]
    users = {str(path): read_results(path) for path in user_csv}
    customary = list(
        dict.fromkeys(row["task"] for row in known)
    )  # the file's own order; LRA's six tasks lead it
    ours = {r["task"] for r in scored} | {row["task"] for rows in users.values() for row in rows}
    shown = tasks or _ordered(ours, customary) or customary[:6]
    table = Table(_columns(shown, {row["task"] for row in others}))
    _add_ours(table, scored, metric)
    _add_reference(table, scored)
    _add_results(table, "published", "Published", others)
    for path, rows in users.items():
        _add_results(table, "user", f"From {path}", rows)
    _add_remarks(table, scored, [r for r in chosen if not _counts(r, metric)])
    return table


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """n, median, mean, ci_low, ci_high, std, min, max of one number a seed.

    The interval is the percentile bootstrap of the mean, 95 %, with a fixed seed. With 2 or 3 values it is their range,
    with one there is none.
    """
    x = np.asarray(values, np.float64)
    one = {
        "n": len(x),
        "median": float(np.median(x)),
        "mean": float(x.mean()),
        "min": float(x.min()),
        "max": float(x.max()),
    }
    if len(x) == 1:
        return {**one, "ci_low": None, "ci_high": None, "std": None}
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.quantile(x[draws].mean(axis=1), [0.025, 0.975])
    return {**one, "ci_low": float(low), "ci_high": float(high), "std": float(x.std(ddof=1))}


def learned(record: Record, metric: str = "test") -> bool | None:
    """Whether a run did better than chance: as it recorded, else by the majority class; None where nobody knows."""
    if metric == "test" and (recorded := record.get("learned")) is not None:
        return recorded
    majority, count = (
        (record.get("reference") or {}).get("majority"),
        _score(record, metric).get("count"),
    )
    accuracy = _accuracy(record, metric)
    if majority is None or not count or accuracy is None:
        return None
    return not is_at_chance(accuracy, majority, count)


# ---- our rows


def _chosen(
    record: Record, tasks: Sequence[str] | None, models: Sequence[str] | None, protocol: str | None
) -> bool:
    return (
        (tasks is None or record["task"] in tasks)
        and (models is None or record["model"] in models)
        and (protocol is None or record["protocol"] == protocol)
    )


def _counts(record: Record, metric: str) -> bool:
    return record["status"] == "finished" and _accuracy(record, metric) is not None


def _score(record: Record, metric: str) -> Mapping[str, Any]:
    return (record.get("metrics") or {}).get(metric) or {}


def _accuracy(record: Record, metric: str) -> float | None:
    return _score(record, metric).get("accuracy")


def _data(record: Record) -> tuple[str, str]:
    data = record.get("data") or {}
    return str(data.get("source", "")), str(data.get("key", ""))


def shown_runs(records: Sequence[Record]) -> dict[tuple[str, str], tuple[list[Record], list[str]]]:
    """The finished runs that stand for each (row name, task), one a seed of the best configuration, and notes on them."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record, label in zip(records, _labels(records), strict=True):
        groups[label, record["task"]].append(record)
    return {place: _best_config(group) for place, group in sorted(groups.items())}


def _add_ours(table: Table, records: Sequence[Record], metric: str) -> None:
    rows: dict[str, TableRow] = {}
    for (label, task), (runs, notes) in shown_runs(records).items():
        if task in table.columns:
            numbers = _numbers(runs, metric, notes)
            table.long.append(numbers)
            row = rows.setdefault(label, TableRow(label))
            row.cells[task] = _cell(numbers) + "".join(table.mark(note) for note in notes)
    protocols = {r["protocol"] for r in records}
    table.add(
        f"Ours, {metric} accuracy in %, protocol {' and '.join(sorted(protocols))}", rows.values()
    )


def _labels(records: Sequence[Record]) -> list[str]:
    """A row's name for each record: its model, and in brackets whatever else differs between rows of one task."""
    protocols = {r["protocol"] for r in records}
    sources, keys = defaultdict(set), defaultdict(set)
    for r in records:
        source, key = _data(r)
        sources[r["task"], r["protocol"]].add(source)
        keys[r["task"], r["protocol"], source].add(key)
    labels = []
    for r in records:
        source, key = _data(r)
        parts = [r["protocol"]] if len(protocols) > 1 else []
        parts += [source] if len(sources[r["task"], r["protocol"]]) > 1 else []
        parts += ["partial data"] if (r.get("data") or {}).get("partial") else []
        parts += [f"data {key[:8]}"] if len(keys[r["task"], r["protocol"], source]) > 1 else []
        labels.append(r["model"] + (f" [{', '.join(parts)}]" if parts else ""))
    return labels


def _best_config(group: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The runs of the configuration with the best mean validation accuracy, one a seed, and notes for the reader."""
    configs: dict[str, dict[Any, Record]] = defaultdict(dict)
    for record in group:
        config = upgrade_config(record["config"])
        configuration = config_hash(config, without=["seed", *keys_affecting("speed")])
        configs[configuration][record["seed"]] = record
    best = max(
        configs.values(),
        key=lambda runs: statistics.mean(_accuracy(r, "val") or 0.0 for r in runs.values()),
    )
    notes = [f"best of {len(configs)} configurations by validation"] if len(configs) > 1 else []
    if any(_selected_on_test(r) for r in best.values()):
        notes.append(
            "weights chosen on the test split, which is all the validation this protocol has"
        )
    if (tried := _tuning_runs(best.values())) > 1:
        notes.append(f"settings chosen by {tried} runs")
    if repeated := len(group) - sum(len(runs) for runs in configs.values()):
        notes.append(
            f"{repeated} repeated {'run' if repeated == 1 else 'runs'} of the same seed left out"
        )
    return list(best.values()), notes


def _selected_on_test(record: Record) -> bool:
    splits = (record.get("data") or {}).get("splits") or {}
    rule = (record.get("selection") or {}).get("rule")
    return (
        rule == "best" and "val" in splits and splits["val"]["sha256"] == splits["test"]["sha256"]
    )


def _tuning_runs(runs: Iterable[Record]) -> int:
    return max(r.get("tuning_runs") or 1 for r in runs)


def _numbers(runs: Sequence[Record], metric: str, notes: Sequence[str]) -> dict[str, Any]:
    first, summary = runs[0], summarise([100 * r["metrics"][metric]["accuracy"] for r in runs])
    did_learn = [learned(r, metric) for r in runs]
    val = [round(100 * value, 4) for r in runs if (value := _accuracy(r, "val")) is not None]
    source, key = _data(first)
    numbers = {
        **{
            "kind": "ours",
            "task": first["task"],
            "model": first["model"],
            "variant": first.get("experiment") or "",
        },
        **{"protocol": first["protocol"], "data_source": source, "data_key": key},
        "accuracy": summary["median"] if None in did_learn or any(did_learn) else "FAIL",
        **summary,
        "learned": None if None in did_learn else sum(map(bool, did_learn)) / len(runs),
        "val_accuracy": statistics.mean(val) if val else None,
        "params": (first.get("params") or {}).get("total"),
        "steps": first.get("step"),
        "tuning_runs": _tuning_runs(runs),
        "source": " ".join(sorted({str(r.get("commit") or "") for r in runs} - {""})),
        "note": "; ".join(notes),
    }
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in numbers.items()
    }


def _cell(numbers: Mapping[str, Any]) -> str:
    n, share = numbers["n"], numbers["learned"]
    interval = f" [{numbers['ci_low']:.1f}, {numbers['ci_high']:.1f}]" if n > 1 else ""
    if share == 0:
        return f"FAIL ({numbers['median']:.1f}) n={n}"
    some = f", {round(share * n)} learned" if share is not None and share < 1 else ""
    return f"{numbers['median']:.1f}{interval} n={n}{some}"


def _add_reference(table: Table, records: Sequence[Record]) -> None:
    """Shortcuts' accuracies; where runs of one task met different data, every value."""
    lines: dict[str, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        for name, value in (record.get("reference") or {}).items():
            if value is not None and record["task"] in table.columns:
                lines[name.replace("_", " ")][record["task"]].add(round(100 * value, 4))
    rows = []
    for name, values in lines.items():
        cells = {
            task: " / ".join(dict.fromkeys(f"{x:.1f}" for x in sorted(found)))
            for task, found in values.items()
        }
        rows.append(TableRow(name, cells))
        table.long += [
            {"kind": "reference", "task": task, "model": name, "accuracy": x}
            for task in values
            for x in sorted(values[task])
        ]
    table.add("Reference lines", rows)


def _add_results(table: Table, kind: str, title: str, results: Iterable[Mapping[str, str]]) -> None:
    """Rows with their numbers as printed; the source is a footnote of the row."""
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = defaultdict(dict)
    for result in results:
        if result["task"] in table.columns:
            groups[result["model"], result.get("variant", ""), result.get("source", "")][
                result["task"]
            ] = result
    rows = []
    for (model, variant, source), cells in groups.items():
        about = "; ".join(filter(None, [source, _notes(cells)]))
        name = ", ".join(filter(None, [model, variant]))
        rows.append(
            TableRow(
                name + (table.mark(about) if about else ""),
                {t: r["accuracy"] for t, r in cells.items()},
            )
        )
        table.long += [_long(kind, result) for result in cells.values()]
    table.add(title, rows)


def _notes(cells: Mapping[str, Mapping[str, str]]) -> str:
    """The remarks of the cells' notes, each once: with its tasks, unless it holds for all."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for task, result in cells.items():
        for remark in filter(None, result.get("note", "").split("; ")):
            tasks[remark].append(task)
    return "; ".join(
        text if len(of) == len(cells) else f"{', '.join(of)}: {text}" for text, of in tasks.items()
    )


def _long(kind: str, result: Mapping[str, str]) -> dict[str, Any]:
    keys = ("task", "model", "variant", "accuracy", "source", "note")
    return {"kind": kind, **{key: result.get(key, "") for key in keys}}


# ---- columns and remarks


def _ordered(tasks: Iterable[str], customary: Sequence[str]) -> list[str]:
    """The customary order; a tier stands before its full-size task, what is unknown at the end."""
    places = {task: place for place, task in enumerate(customary)}
    return sorted(
        tasks,
        key=lambda task: (
            places.get(task.removesuffix(SHORT_TIER_SUFFIX), len(places)),
            task in places,
            task,
        ),
    )


def _columns(tasks: Sequence[str], published: set[str]) -> dict[str, str]:
    """Headings; a tier whose full-size task has no column of its own gets one for the published numbers."""
    columns: dict[str, str] = {}
    for task in tasks:
        columns[task] = task
        full = task.removesuffix(SHORT_TIER_SUFFIX)
        if full not in tasks and full in published:
            columns[full] = f"{full} (published, full size)"
    return columns


def _add_remarks(table: Table, scored: Sequence[Record], rest: Sequence[Record]) -> None:
    if scored:
        table.remarks.append(
            "Ours: median over n seeds [95 % bootstrap interval of the mean, which for 2 or 3 seeds is their range]."
        )
        table.remarks.append(_provenance(scored, table.columns))
    else:
        table.remarks.append(
            "No finished runs here yet. Make one: lra train task=listops_short model=stu"
        )
    if rest:
        table.remarks.append(f"Not counted: {_left_out(rest)}.")
    if any(title == "Published" for title, _ in table.sections):
        table.remarks.append(
            "Published: under their authors' own protocols and data, so beside ours, not against them."
        )
    cells = [cell for _, rows in table.sections for row in rows for cell in row.cells.values()]
    if "FAIL" in cells:
        table.remarks.append("FAIL: reported as not learned, at chance or out of memory.")
    if any(cell.startswith("FAIL (") for cell in cells):
        table.remarks.append(
            "FAIL (median): no seed did better than chance by three standard errors."
        )


def _provenance(records: Sequence[Record], order: Iterable[str]) -> str:
    tasks: dict[str, set[str]] = defaultdict(set)
    for r in records:
        source, key = _data(r)
        tasks[r["task"]].add(f"{source or 'unknown'} {key[:8]}".strip())
    known = (f"{task} {' and '.join(sorted(tasks[task]))}" for task in order if task in tasks)
    return f"Data: {', '.join(known)}."


def _left_out(records: Sequence[Record]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for r in records:
        status = "finished without a score" if r["status"] == "finished" else r["status"]
        groups[status].append(str(r.get("path", f"{r['task']}/{r['model']}")))
    parts = []
    for status, folders in sorted(groups.items()):
        more = [f"and {len(folders) - 3} more"] if len(folders) > 3 else []
        parts.append(f"{len(folders)} {status} ({', '.join(sorted(folders)[:3] + more)})")
    return "; ".join(parts)
