"""The panels of a study's figure and the form of its learning curves."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STU, LRU, OTHER = "C0", "C1", "0.6"  # colours with one meaning in all figures


def paper_style() -> AbstractContextManager[Any]:
    """The style file, both for drawing and for saving."""
    return style.context(Path(__file__).with_name("paper.mplstyle"))


def panels(titles: Sequence[str], width: float = 4.8, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with one panel for each title, side by side. It needs no display."""
    figure = Figure(figsize=(width * len(titles), 3.8))
    axes = figure.subplots(1, len(titles), squeeze=False, **options)[0]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
    return figure, list(axes)


def blocks(curves: Float[np.ndarray, "*S steps"], size: int) -> Float[np.ndarray, "*S blocks"]:
    """Means of `size` successive losses; the steps after the last whole block are left out."""
    whole = curves.shape[-1] // size * size
    return curves[..., :whole].reshape(*curves.shape[:-1], -1, size).mean(-1)


def draw_band(
    axis: Axes, x: np.ndarray, seeds: Float[np.ndarray, "seeds X"], **options: Any
) -> None:
    """The median of the seeds, between the lowest and the highest seed."""
    (line,) = axis.plot(x, np.median(seeds, 0), **options)
    axis.fill_between(x, seeds.min(0), seeds.max(0), color=line.get_color(), alpha=0.2, lw=0)
