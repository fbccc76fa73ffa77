"""Renders a table for the terminal, as Markdown, LaTeX or CSV."""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lra.errors import ConfigError

FORMATS = ("terminal", "markdown", "latex", "csv")
LONG_FORM_COLUMNS = (
    *(
        "kind",
        "task",
        "model",
        "variant",
        "protocol",
        "data_source",
        "data_key",
        "accuracy",
        "n",
        "median",
        "mean",
    ),
    *(
        "ci_low",
        "ci_high",
        "std",
        "min",
        "max",
        "learned",
        "val_accuracy",
        "params",
        "steps",
        "tuning_runs",
    ),
    *("source", "note"),
)


@dataclass
class TableRow:
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
        long: one dictionary a number, with the keys of `LONG_FORM_COLUMNS`.
    """

    columns: dict[str, str]
    sections: list[tuple[str, list[TableRow]]] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    long: list[dict[str, Any]] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """` [k]`, the mark of this footnote, the same for the same text."""
        if text not in self.footnotes:
            self.footnotes.append(text)
        return f" [{self.footnotes.index(text) + 1}]"

    def add(self, title: str, rows: Iterable[TableRow]) -> None:
        filled = [row for row in rows if row.cells]
        if filled:
            self.sections.append((title, filled))


def render(
    table: Table, format: str = "terminal", *, width: int | None = None, color: bool = False
) -> str:
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


# ---- formats


def _grid(table: Table) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """Header, and each section as lists of cells."""
    sections = [
        (title, [[row.name, *(row.cells.get(task, "") for task in table.columns)] for row in rows])
        for title, rows in table.sections
    ]
    return ["model", *table.columns.values()], sections


def _below(table: Table) -> list[str]:
    return [
        *table.remarks,
        *(f"[{number}] {text}" for number, text in enumerate(table.footnotes, 1)),
    ]


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
    console = Console(
        file=text, width=width or _terminal_width(), force_terminal=color, highlight=False
    )
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
    body = _frame(table, "{}").to_latex(
        index=False, escape=True, column_format="l" + "l" * len(table.columns)
    )
    # paragraphs, since a line break would read the next line's [1] as its length
    notes = "\n\n".join(rf"\noindent {_escaped(line)}" for line in _below(table))
    return f"{body}\n{{\\footnotesize\n{notes}\n\n}}\n"


def _escaped(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(character, character) for character in text)


def _csv(table: Table) -> str:
    import pandas as pd

    whole = dict.fromkeys(
        ("n", "params", "steps", "tuning_runs"), "Int64"
    )  # which, unlike int, may be missing
    return (
        pd.DataFrame(table.long, columns=list(LONG_FORM_COLUMNS))
        .astype(whole)
        .to_csv(index=False, lineterminator="\n")
    )
