"""Draws learning curves, diagnostics and efficiency into PNG, PDF or SVG files."""

import io
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import LraError, RunFolderError
from lra.files import write_atomically
from lra.report.compare import Ranks
from lra.report.intervals import AccuracyRow
from lra.report.selection import Record, select_runs
from lra.runs.console import printable
from lra.runs.records import read_metrics
from lra.runs.run_folder import load_records

log = logging.getLogger(__name__)

Curves = list[tuple[np.ndarray, Record]]  # validation curves and their runs


def plot_learning_curves(
    paths: Iterable[str | Path], output: str | Path, tasks: Sequence[str] | None = None
) -> Path:
    """Plots validation accuracy over steps, one panel for each task.

    The runs are those in the table: a thin line for each, and a thick line for the median of a
    model. Dashed lines are the reference lines of the test split.

    Raises:
        LraError: there is no finished run below `paths`, or the file type is not supported.
    """
    finished = [
        record
        for record in load_records(paths)
        if record["status"] == "finished" and (tasks is None or record["task"] in tasks)
    ]
    panels: dict[str, dict[str, Curves]] = defaultdict(dict)
    for (name, task), selected in select_runs(finished).items():
        found = [(validation_curve(run), run) for run in selected.runs]
        if curves := [(curve, run) for curve, run in found if curve is not None]:
            panels[task][name] = curves
    if not panels:
        places = ", ".join(map(str, paths))
        raise LraError(f"no finished run with metrics below {places}; `lra train` makes one")
    figure, axes = _figure(len(panels), (6.0 * len(panels), 4.0))
    for axis, (task, rows) in zip(axes, sorted(panels.items()), strict=True):
        _learning_curves(axis, task, rows)
    return _save(figure, output)


def plot_diagnostics(tables: Mapping[str, Sequence[AccuracyRow]], output: str | Path) -> Path:
    """Plots accuracies with their 95 % intervals, one panel for each table."""
    # inches; room for the names of the values
    width = sum(4 + 0.07 * max(len(row.value) for row in rows) for rows in tables.values())
    height = 1.5 + 0.25 * max(map(len, tables.values()))
    figure, axes = _figure(len(tables), (width, height), sharex=True)
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        accuracy = 100 * np.asarray([row.accuracy for row in rows])
        ends = 100 * np.asarray([(row.low, row.high) for row in rows]).T
        places = range(len(rows))
        axis.errorbar(accuracy, places, xerr=np.abs(ends - accuracy), fmt="o", capsize=3)
        axis.set_yticks(places, [_plain(row.value) for row in rows], fontsize=8)
        axis.invert_yaxis()  # the first row on top, as in the table
        axis.set(title=_plain(name), xlabel="accuracy, %")
    return _save(figure, output)


def plot_ranks(ranks: Ranks, output: str | Path) -> Path:
    """Draws a critical-difference diagram (Demsar 2006): bars join models that do not differ."""
    means, count = ranks.means, len(ranks.means)
    figure, (axis,) = _figure(1, (7.0, 1.2 + 0.22 * (count + len(ranks.groups))))
    below = -0.6 * len(ranks.groups) - 1
    axis.set(xlim=(1, count), ylim=(below - count / 2, 1))
    axis.xaxis.tick_top()
    axis.set_yticks([])
    axis.spines[["left", "right", "bottom"]].set_visible(False)
    for number, group in enumerate(ranks.groups, 1):
        ends = means[group[0]], means[group[-1]]
        axis.plot(ends, (-0.6 * number,) * 2, color="black", linewidth=3)
    for place, (name, mean) in enumerate(means.items()):
        left = place < (count + 1) // 2  # the better half, listed downwards
        height = below - (place if left else count - 1 - place)
        side = -0.03 if left else 1.03
        axis.plot((mean, mean), (1, height), color="grey", linewidth=0.8)
        label = _plain(f"{name} ({mean:.2f})")
        align = "right" if left else "left"
        axis.annotate(
            label,
            (mean, height),
            (side, height),
            xycoords="data",
            textcoords=("axes fraction", "data"),
            ha=align,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.8},
        )
    axis.set_title(
        f"mean rank (1 is best), critical difference {ranks.critical_difference:.2f}", fontsize=9
    )
    return _save(figure, output)


def plot_efficiency(cells: Sequence[dict[str, Any]], output: str | Path) -> Path:
    """Plots training and inference steps/s and peak training memory over the length.

    There is one line for each model, and all axes are logarithmic. Cells without a number, such as
    those that ran out of memory, are left out.
    """
    import matplotlib

    panels = (
        ("training steps/s", lambda cell: cell["train"]["steps_per_s"]),
        ("inference steps/s", lambda cell: cell["infer"]["steps_per_s"]),
        ("peak memory in training, GB", lambda cell: cell["memory"]["train_bytes"] / 1e9),
    )
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        if cell["status"] == "ok":
            rows[cell["row"]].append(cell)
    lengths = sorted({cell["seq_len"] for found in rows.values() for cell in found})
    figure, axes = _figure(len(panels), (15.0, 4.5))
    colors = matplotlib.colormaps["tab20"]
    for axis, (title, value) in zip(axes, panels, strict=True):
        for index, (name, found) in enumerate(rows.items()):
            points = sorted((cell["seq_len"], value(cell)) for cell in found)
            style = {"color": colors(index % 20), "marker": "os^Dv"[index % 5], "markersize": 4}
            axis.plot(*zip(*points, strict=True), **style, label=name)
        axis.set(title=title, xlabel="length L", xscale="log", yscale="log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    if rows:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return _save(figure, output, dpi=100)


def median_curve(runs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Median accuracy at the steps that all runs evaluated; a run has rows of (step, accuracy)."""
    values = [dict(run) for run in runs]
    steps = sorted(set.intersection(*map(set, values)))
    return np.asarray(steps), np.median([[run[step] for step in steps] for run in values], axis=0)


def validation_curve(record: Record) -> np.ndarray | None:
    """Rows of (step, accuracy in %) of a run; None, with a warning, if it has none."""
    path = record["path"]
    try:
        lines = read_metrics(path)
    except RunFolderError as error:
        log.warning("not plotted: %s", error)
        return None
    points = [
        (line["step"], 100 * accuracy)
        for line in lines
        if (accuracy := line.get("val/accuracy")) is not None
    ]
    if not points:
        log.warning("not plotted: %s has no validation accuracy in metrics.jsonl", path)
        return None
    return np.asarray(points, np.float64)


def _learning_curves(axis: Any, task: str, rows: Mapping[str, Curves]) -> None:
    for index, (name, curves) in enumerate(rows.items()):
        color = f"C{index}"
        for curve, _ in curves:
            axis.plot(*curve.T, color=color, linewidth=0.7, alpha=0.5)
        label = _plain(f"{name}, n={len(curves)}")
        median = median_curve([curve for curve, _ in curves])
        axis.plot(*median, color=color, linewidth=2, label=label)
    style = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 7}
    _, first = next(iter(rows.values()))[0]
    for name, accuracy in (first.get("reference") or {}).items():
        if accuracy is not None:
            axis.axhline(100 * accuracy, color="grey", linewidth=1, linestyle="--")
            axis.text(1, 100 * accuracy, _plain(name.replace("_", " ")), **style)
    axis.set(title=_plain(task), xlabel="step", ylabel="validation accuracy, %")
    axis.legend(fontsize=8)


def _plain(text: str) -> str:
    """Text that Matplotlib draws as it is: no mathematics between dollars, no control characters.

    A legend leaves out a label that starts with an underscore.
    """
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _figure(panels: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure and its axes side by side."""
    import matplotlib

    matplotlib.use("agg")  # needs no display
    import matplotlib.pyplot as plt

    options |= {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(1, panels, **options)
    return figure, axes[0]


def _save(figure: Any, output: str | Path, dpi: int = 130) -> Path:
    import matplotlib.pyplot as plt

    output, buffer = Path(output), io.BytesIO()
    try:
        figure.savefig(buffer, dpi=dpi, format=output.suffix[1:] or "png")
    except ValueError as error:
        raise LraError(f"cannot draw {output}: {error}") from error
    finally:
        plt.close(figure)
    write_atomically(output, buffer.getvalue())
    return output
