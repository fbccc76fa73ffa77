"""The table of `lra models`: parameters, FLOPs and recurrent state of each model on a task."""

import csv
import io
from collections.abc import Sequence

import jax
from tabulate import tabulate

from lra.config.compose import compose
from lra.config.cost import Cost, cost
from lra.config.options import options
from lra.errors import ConfigError
from lra.report.formats import TABULATE_FORMATS

HEADERS = ("model", "width", "depth", "parameters", "FLOPs", "state")


def cost_table(overrides: Sequence[str], format: str = "terminal") -> str:
    """The costs of the models on a task as text, with the reason if one cannot be built.

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
    rows: dict[str, tuple] = {}
    title = ""
    for name, words in _overrides_by_model(overrides).items():
        try:
            cfg = compose(words)
            title = f"{cfg.names.task}, protocol {cfg.names.protocol}; "
            rows[name or cfg.names.model] = cost(cfg)
        except ConfigError as error:
            rows[name] = (*[None] * (len(HEADERS) - 1), str(error))
    if not any(isinstance(row, Cost) for row in rows.values()) and len(set(rows.values())) == 1:
        raise ConfigError(next(iter(rows.values()))[-1])
    missing, format_number = ("", str) if format == "csv" else ("-", "{:,}".format)
    cells = []
    for name, (*numbers, note) in rows.items():
        texts = (missing if number is None else format_number(number) for number in numbers)
        cells.append([name, *texts, note])
    if format == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[*HEADERS, "note"], *cells])
        return text.getvalue()
    headers = [*HEADERS, ""] if any(row[-1] for row in cells) else HEADERS
    body = tabulate(
        [row[: len(headers)] for row in cells],
        headers=headers,
        tablefmt=TABULATE_FORMATS[format],
        disable_numparse=True,
        colalign=("left", *["right"] * (len(HEADERS) - 1), "left")[: len(headers)],
    )
    caption = (
        f"{title}FLOPs: one example, forward, on {jax.default_backend()}; "
        "state: numbers a step keeps for one sequence"
    )
    return f"{caption}\n\n{body}\n" if format in ("terminal", "markdown") else f"{body}\n"


def _overrides_by_model(overrides: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of each model; one item without a name for an experiment."""
    if any(word.startswith("experiment=") and word != "experiment=null" for word in overrides):
        return {"": list(overrides)}
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("model=")]
    names = chosen[-1].split(",") if chosen else options("model")
    others = [word for word in overrides if not word.startswith("model=")]
    return {name: [*others, f"model={name}"] for name in names}
