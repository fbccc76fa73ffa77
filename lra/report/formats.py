"""Renders a table for the terminal or as Markdown, LaTeX or CSV.

Names in a table may come from the records of others. Control characters are escaped in every
format, HTML and links in Markdown, and formulas in CSV.
"""

import io
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lra.errors import ConfigError
from lra.runs.console import printable

# names of our formats in tabulate
TABULATE_FORMATS = {"terminal": "simple", "markdown": "pipe", "latex": "latex_booktabs"}
# fmt: off
LONG_FORM_COLUMNS = (
    "kind", "task", "model", "variant", "settings", "protocol", "data_source", "data_key",
    "accuracy", "n", "median", "mean", "ci_low", "ci_high", "std", "min", "max", "examples",
    "test_error", "learned", "val_accuracy", "params", "steps", "tuning_runs", "source", "note",
)
# fmt: on
LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclass
class TableRow:
    """One line of a table: its name and the text of each cell by column."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """A table that does not depend on its format."""

    columns: dict[str, str]  # headings by column, which is a task in a comparison of models
    sections: list[tuple[str, list[TableRow]]] = field(default_factory=list)  # titles and rows
    footnotes: list[str] = field(default_factory=list)  # `[1]`, `[2]`, ... in cells and row names
    remarks: list[str] = field(default_factory=list)  # lines below the table
    long: list[dict[str, Any]] = field(default_factory=list)  # numbers, by `LONG_FORM_COLUMNS`
    row_heading: str = "model"

    def add_footnote(self, text: str) -> str:
        """Adds a footnote unless it exists and returns its mark, ` [1]`."""
        if text not in self.footnotes:
            self.footnotes.append(text)
        return f" [{self.footnotes.index(text) + 1}]"

    def add_section(self, title: str, rows: Iterable[TableRow]) -> None:
        """Adds the rows that have cells as a section, if there are any."""
        if filled := [row for row in rows if row.cells]:
            self.sections.append((title, filled))


def render(
    table: Table, format: str = "terminal", *, width: int | None = None, color: bool = False
) -> str:
    """Returns the table as text that ends in a newline.

    Args:
        format: terminal, markdown, latex (booktabs) or csv (long form, every number).
        width: of the terminal format; None for the width of the terminal.
        color: whether the terminal format has escape sequences.
    """
    if format == "terminal":
        return _terminal(table, width, color)
    renderers = {"markdown": _markdown, "latex": _latex, "csv": _csv}
    if format not in renderers:
        raise ConfigError(f"format={format} is unknown; choose terminal, {', '.join(renderers)}")
    return renderers[format](table)


def _cells(table: Table, row: TableRow) -> list[str]:
    return [printable(row.name), *(printable(row.cells.get(key, "")) for key in table.columns)]


def _headings(table: Table) -> list[str]:
    return [table.row_heading, *map(printable, table.columns.values())]


def _lines_below(table: Table) -> list[str]:
    footnotes = (f"[{number}] {text}" for number, text in enumerate(table.footnotes, 1))
    return [*map(printable, table.remarks), *map(printable, footnotes)]


def _terminal(table: Table, width: int | None, color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _headings(table):
        rich.add_column(Text(heading), overflow="fold")
    for title, rows in table.sections:
        rich.add_section()
        rich.add_row(Text(printable(title), style="bold"))
        for row in rows:
            rich.add_row(*map(Text, _cells(table, row)))
    text = io.StringIO()
    width = width or shutil.get_terminal_size((160, 24)).columns
    console = Console(file=text, width=width, force_terminal=color, highlight=False)
    console.print(rich)
    for line in _lines_below(table):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _data_frame(table: Table, title_format: str) -> Any:
    import pandas as pd

    empty = [""] * len(table.columns)
    lines = []
    for title, rows in table.sections:
        heading = title_format.format(printable(title))
        lines += [[heading, *empty], *(_cells(table, row) for row in rows)]
    return pd.DataFrame(lines, columns=_headings(table), dtype=str)


def _markdown(table: Table) -> str:
    frame = _data_frame(table, "**{}**").map(_markdown_cell)
    frame.columns = [_markdown_cell(heading) for heading in frame.columns]
    body = frame.to_markdown(index=False, disable_numparse=True)
    lines = (f"- {_without_markup(line)}" for line in _lines_below(table))
    return "\n".join([body, "", *lines]) + "\n"


def _markdown_cell(text: str) -> str:
    # backslashes before a bar are doubled, or they would undo its escape
    return re.sub(r"(\\*)\|", r"\1\1\\|", _without_markup(text))


def _without_markup(text: str) -> str:
    """Markdown without HTML tags, links and pictures."""
    return text.replace("<", "&lt;").replace("](", r"]\(")


def _latex(table: Table) -> str:
    columns = "l" * (1 + len(table.columns))
    body = _data_frame(table, "{}").to_latex(index=False, escape=True, column_format=columns)
    # paragraphs, because LaTeX reads `[1]` after a line break `\\` as a length
    notes = "\n\n".join(
        rf"\noindent {line.translate(LATEX_ESCAPES)}" for line in _lines_below(table)
    )
    return f"{body}\n{{\\footnotesize\n{notes}\n\n}}\n"


def _csv(table: Table) -> str:
    import pandas as pd

    counts = ("n", "examples", "params", "steps", "tuning_runs")
    integers = dict.fromkeys(counts, "Int64")  # may be missing
    rows = [{key: _csv_value(value) for key, value in row.items()} for row in table.long]
    frame = pd.DataFrame(rows, columns=list(LONG_FORM_COLUMNS)).astype(integers)
    return frame.to_csv(index=False, lineterminator="\n")


def _csv_value(value: Any) -> Any:
    """`value` with an apostrophe before a text that a spreadsheet would read as a formula."""
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if value[:1] in ("=", "+", "-", "@") else printable(value)
