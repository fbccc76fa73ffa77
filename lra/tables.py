"""How good is each model on each task? A table computed from records, beside published numbers and the reader's own.

A cell of ours is the median test accuracy in percent over the seeds of one configuration, with a bootstrap interval of
the mean and the number of seeds. Runs of one task that differ in protocol, data source or data never share a row. Of
several configurations of one model the best by validation is shown, and the cell says so; keys that cannot change a
result (`NO_EFFECT`) do not make two. Runs that did not finish are counted below the table, never in it. `csv` is the
same table in long form with every number behind a cell.
"""

import csv
import io
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lra.config import with_defaults
from lra.errors import ConfigError, LraError
from lra.files import write_atomically
from lra.records import config_hash, load_records
from lra.verdicts import is_at_chance

FORMATS = ("terminal", "markdown", "latex", "csv")
PUBLISHED = ("featured", "all", "none")
LONG = (
    *("kind", "task", "model", "variant", "protocol", "data_source", "data_key", "accuracy", "n", "median", "mean"),
    *("ci_low", "ci_high", "std", "min", "max", "learned", "val_accuracy", "params", "steps", "tuning_runs"),
    *("source", "note"),
)
RESAMPLES = 10_000

# of the keys in `config_hash`, those that cannot change a result: runs that differ in them are one configuration
NO_EFFECT = (
    *("trainer.progress", "trainer.compilation_cache", "trainer.call_seconds"),
    *("trainer.checkpoint_every", "trainer.eval_batch_size", "trainer.log_every"),
    *("trainer.remat", "trainer.deterministic", "backbone.remat"),
    *("trainer.first_loss_tolerance", "trainer.chance_after"),
)
SHORT = "_short"  # `x_short` is a smaller tier of task `x`; the only thing known here of any task's name

Record = Mapping[str, Any]


@dataclass
class Row:
    """One line of the table: what it is called and, by task, what it says."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """What to print, before it is known where.

    Attributes:
        columns: heading of each task.
        sections: title and rows of each part that has rows.
        footnotes: numbered from 1, as `[1]` in the cells.
        remarks: lines below the table.
        long: one dictionary a number, with the keys of `LONG`.
    """

    columns: dict[str, str]
    sections: list[tuple[str, list[Row]]] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    long: list[dict[str, Any]] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """` [k]`, the mark of this footnote, the same for the same text."""
        if text not in self.footnotes:
            self.footnotes.append(text)
        return f" [{self.footnotes.index(text) + 1}]"

    def add(self, title: str, rows: Iterable[Row]) -> None:
        filled = [row for row in rows if row.cells]
        if filled:
            self.sections.append((title, filled))


def table_command(
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
    others = [row for row in known if published == "all" or (published == "featured" and row["featured"] == "1")]
    users = {str(path): read_results(path) for path in user_csv}
    customary = list(dict.fromkeys(row["task"] for row in known))  # the file's own order; LRA's six tasks lead it
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
    majority, count = (record.get("reference") or {}).get("majority"), _score(record, metric).get("count")
    accuracy = _accuracy(record, metric)
    if majority is None or not count or accuracy is None:
        return None
    return not is_at_chance(accuracy, majority, count)


def published_path() -> Path:
    """The file of published numbers: in a wheel beside this module, in a checkout under results/."""
    here = Path(__file__).resolve().parent
    for path in (here.parent / "results" / "published.csv", here / "published.csv"):
        if path.exists():
            return path
    raise LraError(f"published.csv is neither in {here} nor in {here.parent / 'results'}; reinstall")


def read_results(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV of results, checked: model, task, accuracy, and variant, source, note, featured where present.

    Raises:
        LraError: what is wrong, with file, line and column.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LraError(f"cannot read {path}: {error}; expected a CSV file in UTF-8") from error
    reader = csv.DictReader(io.StringIO(text))
    for column in ("model", "task", "accuracy"):
        if column not in (reader.fieldnames or ()):
            raise LraError(f"{path}, line 1: no column {column}; expected model,task,accuracy[,variant,source]")
    return [_result(path, reader.line_num, row) for row in reader]


def render(table: Table, format: str = "terminal", *, width: int | None = None, color: bool = False) -> str:
    """The table as text, ending in a newline.

    Args:
        format: terminal, markdown, latex (booktabs) or csv.
        width: of the terminal; by default the terminal's own. `color`: with escape sequences.
    """
    if format == "terminal":
        return _terminal(table, width, color)
    if format == "markdown":
        return _markdown(table)
    if format == "latex":
        return _latex(table)
    if format == "csv":
        return _csv(table)
    raise ConfigError(f"format={format} is unknown; choose {', '.join(FORMATS)}")


# ---- our rows


def _chosen(record: Record, tasks: Sequence[str] | None, models: Sequence[str] | None, protocol: str | None) -> bool:
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
    rows: dict[str, Row] = {}
    for (label, task), (runs, notes) in shown_runs(records).items():
        if task in table.columns:
            numbers = _numbers(runs, metric, notes)
            table.long.append(numbers)
            row = rows.setdefault(label, Row(label))
            row.cells[task] = _cell(numbers) + "".join(table.mark(note) for note in notes)
    protocols = {r["protocol"] for r in records}
    table.add(f"Ours, {metric} accuracy in %, protocol {' and '.join(sorted(protocols))}", rows.values())


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
        config = with_defaults(record["config"])  # so that a key which is new since is no other configuration
        configs[config_hash(config, without=["seed", *NO_EFFECT])][record["seed"]] = record
    best = max(configs.values(), key=lambda runs: statistics.mean(_accuracy(r, "val") or 0.0 for r in runs.values()))
    notes = [f"best of {len(configs)} configurations by validation"] if len(configs) > 1 else []
    if any(_selected_on_test(r) for r in best.values()):
        notes.append("weights chosen on the test split, which is all the validation this protocol has")
    if (tried := _tuning_runs(best.values())) > 1:
        notes.append(f"settings chosen by {tried} runs")
    if repeated := len(group) - sum(len(runs) for runs in configs.values()):
        notes.append(f"{repeated} repeated {'run' if repeated == 1 else 'runs'} of the same seed left out")
    return list(best.values()), notes


def _selected_on_test(record: Record) -> bool:
    splits = (record.get("data") or {}).get("splits") or {}
    rule = (record.get("selection") or {}).get("rule")
    return rule == "best" and "val" in splits and splits["val"]["sha256"] == splits["test"]["sha256"]


def _tuning_runs(runs: Iterable[Record]) -> int:
    return max(r.get("tuning_runs") or 1 for r in runs)


def _numbers(runs: Sequence[Record], metric: str, notes: Sequence[str]) -> dict[str, Any]:
    first, summary = runs[0], summarise([100 * r["metrics"][metric]["accuracy"] for r in runs])
    did_learn = [learned(r, metric) for r in runs]
    val = [round(100 * value, 4) for r in runs if (value := _accuracy(r, "val")) is not None]
    source, key = _data(first)
    numbers = {
        **{"kind": "ours", "task": first["task"], "model": first["model"], "variant": first.get("experiment") or ""},
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
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}


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
        cells = {task: " / ".join(dict.fromkeys(f"{x:.1f}" for x in sorted(found))) for task, found in values.items()}
        rows.append(Row(name, cells))
        table.long += [
            {"kind": "reference", "task": task, "model": name, "accuracy": x}
            for task in values
            for x in sorted(values[task])
        ]
    table.add("Reference lines", rows)


# ---- the numbers of others


def _result(path: str | Path, line: int, row: Mapping[str | None, Any]) -> dict[str, str]:
    if None in row:
        raise LraError(f"{path}, line {line}: more values than columns; put values with commas in double quotes")
    clean = {str(key): (value or "").strip() for key, value in row.items()}
    for column in ("model", "task"):
        if not clean[column]:
            raise LraError(f"{path}, line {line}, column {column}: empty; expected a name")
    found = clean["accuracy"]
    if found != "FAIL" and not _is_percent(found):
        raise LraError(f"{path}, line {line}, column accuracy: found {found!r}; expected percent (61.04) or FAIL")
    return clean


def _is_percent(text: str) -> bool:
    """A number in (1, 100] or 0: a fraction such as 0.61 is taken for the mistake it is."""
    try:
        value = float(text)
    except ValueError:
        return False
    return value == 0 or 1 < value <= 100


def _add_results(table: Table, kind: str, title: str, results: Iterable[Mapping[str, str]]) -> None:
    """Rows with their numbers as printed; the source is a footnote of the row."""
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = defaultdict(dict)
    for result in results:
        if result["task"] in table.columns:
            groups[result["model"], result.get("variant", ""), result.get("source", "")][result["task"]] = result
    rows = []
    for (model, variant, source), cells in groups.items():
        about = "; ".join(filter(None, [source, _notes(cells)]))
        name = ", ".join(filter(None, [model, variant]))
        rows.append(Row(name + (table.mark(about) if about else ""), {t: r["accuracy"] for t, r in cells.items()}))
        table.long += [_long(kind, result) for result in cells.values()]
    table.add(title, rows)


def _notes(cells: Mapping[str, Mapping[str, str]]) -> str:
    """The remarks of the cells' notes, each once: with its tasks, unless it holds for all."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for task, result in cells.items():
        for remark in filter(None, result.get("note", "").split("; ")):
            tasks[remark].append(task)
    return "; ".join(text if len(of) == len(cells) else f"{', '.join(of)}: {text}" for text, of in tasks.items())


def _long(kind: str, result: Mapping[str, str]) -> dict[str, Any]:
    keys = ("task", "model", "variant", "accuracy", "source", "note")
    return {"kind": kind, **{key: result.get(key, "") for key in keys}}


# ---- columns and remarks


def _ordered(tasks: Iterable[str], customary: Sequence[str]) -> list[str]:
    """The customary order; a tier stands before its full-size task, what is unknown at the end."""
    places = {task: place for place, task in enumerate(customary)}
    return sorted(tasks, key=lambda task: (places.get(task.removesuffix(SHORT), len(places)), task in places, task))


def _columns(tasks: Sequence[str], published: set[str]) -> dict[str, str]:
    """Headings; a tier whose full-size task has no column of its own gets one for the published numbers."""
    columns: dict[str, str] = {}
    for task in tasks:
        columns[task] = task
        full = task.removesuffix(SHORT)
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
        table.remarks.append("No finished runs here yet. Make one: lra train task=listops_short model=stu")
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
        table.remarks.append("FAIL (median): no seed did better than chance by three standard errors.")


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


# ---- formats


def _grid(table: Table) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """Header, and each section as lists of cells."""
    sections = [
        (title, [[row.name, *(row.cells.get(task, "") for task in table.columns)] for row in rows])
        for title, rows in table.sections
    ]
    return ["model", *table.columns.values()], sections


def _below(table: Table) -> list[str]:
    return [*table.remarks, *(f"[{number}] {text}" for number, text in enumerate(table.footnotes, 1))]


def _terminal(table: Table, width: int | None, color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    header, sections = _grid(table)
    rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in header:
        rich.add_column(Text(heading), overflow="fold")
    for number, (title, rows) in enumerate(sections):
        if number:
            rich.add_section()
        rich.add_row(Text(title, style="bold"))
        for row in rows:
            rich.add_row(*map(Text, row))
    text = io.StringIO()
    console = Console(file=text, width=width or _terminal_width(), force_terminal=color, highlight=False)
    console.print(rich)
    for line in _below(table):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:  # a file or a pipe, which has no edge to wrap at
        return 160


def _frame(table: Table, heading: str) -> Any:
    import pandas as pd

    header, sections = _grid(table)
    blank = [""] * len(table.columns)
    lines = [line for title, rows in sections for line in ([heading.format(title), *blank], *rows)]
    return pd.DataFrame(lines, columns=header, dtype=str)


def _markdown(table: Table) -> str:
    frame = _frame(table, "**{}**").map(lambda text: text.replace("|", r"\|"))
    body = frame.to_markdown(index=False, disable_numparse=True)
    return "\n".join([body, "", *(f"- {line}" for line in _below(table))]) + "\n"


def _latex(table: Table) -> str:
    body = _frame(table, "{}").to_latex(index=False, escape=True, column_format="l" + "l" * len(table.columns))
    # paragraphs, since a line break would read the next line's [1] as its length
    notes = "\n\n".join(rf"\noindent {_escaped(line)}" for line in _below(table))
    return f"{body}\n{{\\footnotesize\n{notes}\n\n}}\n"


def _escaped(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(character, character) for character in text)


def _csv(table: Table) -> str:
    import pandas as pd

    whole = dict.fromkeys(("n", "params", "steps", "tuning_runs"), "Int64")  # which, unlike int, may be missing
    return pd.DataFrame(table.long, columns=list(LONG)).astype(whole).to_csv(index=False, lineterminator="\n")
