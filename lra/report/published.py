"""Reads CSV files of published or user-supplied results."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lra.errors import LraError


def published_path() -> Path:
    """The file of published numbers: in a wheel beside this module, in a checkout under results/."""
    root = Path(__file__).resolve().parents[2]
    for path in (root / "results" / "published.csv", root / "lra" / "published.csv"):
        if path.exists():
            return path
    raise LraError(f"published.csv is neither in {root}/results nor in {root}/lra; reinstall")


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
            raise LraError(
                f"{path}, line 1: no column {column}; expected model,task,accuracy[,variant,source]"
            )
    return [_result(path, reader.line_num, row) for row in reader]


# ---- the numbers of others


def _result(path: str | Path, line: int, row: Mapping[str | None, Any]) -> dict[str, str]:
    if None in row:
        raise LraError(
            f"{path}, line {line}: more values than columns; put values with commas in double quotes"
        )
    clean = {str(key): (value or "").strip() for key, value in row.items()}
    for column in ("model", "task"):
        if not clean[column]:
            raise LraError(f"{path}, line {line}, column {column}: empty; expected a name")
    found = clean["accuracy"]
    if found != "FAIL" and not _is_percent(found):
        raise LraError(
            f"{path}, line {line}, column accuracy: found {found!r}; expected percent (61.04) or FAIL"
        )
    return clean


def _is_percent(text: str) -> bool:
    """A number in (1, 100] or 0: a fraction such as 0.61 is taken for the mistake it is."""
    try:
        value = float(text)
    except ValueError:
        return False
    return value == 0 or 1 < value <= 100
