"""The table of `lra models`: parameters, FLOPs and recurrent state of each model on a task."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from tabulate import tabulate

from lra.config.compose import compose
from lra.config.cost import Cost, cost
from lra.config.options import options
from lra.errors import ConfigError

HEADERS = ("model", "width", "depth", "parameters", "FLOPs", "state")
FORMATS = {"terminal": "simple", "markdown": "pipe", "latex": "latex_booktabs"}


def cost_table(overrides: Sequence[str], format: str = "terminal") -> str:
    """Returns the costs of the models on a task as text, with the reason if one cannot be built.

    Args:
        overrides: as for `lra train`; `model=A,B` restricts the rows.
        format: terminal, markdown, latex or csv (plain numbers).
    Raises:
        ConfigError: an override is not KEY=VALUE, or all models fail for the same reason.
    """
    for word in overrides:
        if "=" not in word:
            raise ConfigError(
                f"{word}: expected KEY=VALUE as for `lra train`, such as task=listops"
            )
    rows: dict[str, Cost | ConfigError] = {}
    title = ""
    for name, words in _each_model(overrides):
        try:
            cfg = compose(words)
            title = f"{cfg.names.task}, protocol {cfg.names.protocol}; "
            rows[name or cfg.names.model] = cost(cfg)
        except ConfigError as error:
            rows[name] = error
    reasons = {str(row) for row in rows.values() if isinstance(row, ConfigError)}
    if len(reasons) == 1 and all(isinstance(row, ConfigError) for row in rows.values()):
        raise ConfigError(reasons.pop())
    if format == "csv":
        return _csv(rows)
    cells = [_cells(name, row, "{:,}".format) for name, row in rows.items()]
    headers = [*HEADERS, ""] if any(row[-1] for row in cells) else HEADERS
    body = tabulate(
        [row[: len(headers)] for row in cells],
        headers=headers,
        tablefmt=FORMATS[format],
        disable_numparse=True,
        colalign=("left", *["right"] * (len(HEADERS) - 1), "left")[: len(headers)],
    )
    caption = (
        f"{title}FLOPs: one example, forward, on {jax.default_backend()}; "
        "state: numbers a step keeps for one sequence"
    )
    return f"{caption}\n\n{body}\n" if format in ("terminal", "markdown") else f"{body}\n"


def _each_model(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, overrides) of each model; one item without a name for an experiment."""
    if any(word.startswith("experiment=") and word != "experiment=null" for word in overrides):
        yield "", list(overrides)
        return
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("model=")]
    names = chosen[-1].split(",") if chosen else options("model")
    others = [word for word in overrides if not word.startswith("model=")]
    yield from ((name, [*others, f"model={name}"]) for name in dict.fromkeys(names))


def _cells(name: str, row: Cost | ConfigError, format_number: Callable[[int], str]) -> list[str]:
    """The cells of one row, the note last."""
    if isinstance(row, ConfigError):
        return [name, *["-"] * (len(HEADERS) - 1), str(row)]
    return [
        name,
        *("-" if number is None else format_number(number) for number in row[:-1]),
        row.note,
    ]


def _csv(rows: Mapping[str, Cost | ConfigError]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADERS, "note"])
    for name, row in rows.items():
        writer.writerow("" if cell == "-" else cell for cell in _cells(name, row, str))
    return text.getvalue()
