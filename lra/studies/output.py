"""What a study returns."""

from typing import Any, NamedTuple

from matplotlib.figure import Figure


class Output(NamedTuple):
    """The data behind a figure (one CSV file each), the numbers of its claims, and the figure."""

    tables: dict[str, list[dict[str, Any]]]
    numbers: dict[str, Any]
    figure: Figure
