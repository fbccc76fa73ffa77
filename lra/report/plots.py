"""How did validation accuracy grow? Learning curves of finished runs, a line a model, beside the lines they have to beat."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import LraError
from lra.report.perturbations import AccuracyRow
from lra.report.tables import shown_runs
from lra.runs.records import read_metrics
from lra.runs.run_folder import load_records


def curves(
    paths: Iterable[str | Path], output: str | Path, tasks: Sequence[str] | None = None
) -> Path:
    """Draw validation accuracy over steps into `output` (png, pdf or svg), a panel a task.

    The runs are those that the table counts: a thin line each, a thick one for the median of a model's. Dashed lines are the
    test split's reference lines.

    Raises:
        LraError: no finished run below `paths`, or a file type that cannot be drawn.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    wanted = [
        r
        for r in load_records(paths)
        if r["status"] == "finished" and (tasks is None or r["task"] in tasks)
    ]
    panels: dict[str, dict[str, list[Any]]] = defaultdict(dict)
    for (label, task), (runs, _) in shown_runs(wanted).items():
        panels[task][label] = runs
    if not panels:
        raise LraError(f"no finished run below {', '.join(map(str, paths))}; `lra train` makes one")
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (task, rows) in zip(axes[0], sorted(panels.items()), strict=True):
        _panel(axis, task, rows)
    return _saved(figure, output)


def draw_tables(tables: Mapping[str, Sequence[AccuracyRow]], output: str | Path) -> Path:
    """Draw the tables of diagnostics into `output` (png, pdf or svg), a panel a table, with their 95 % intervals.

    Raises:
        LraError: a file type that cannot be drawn.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tall = max(map(len, tables.values()))
    wide = sum(
        4 + 0.07 * max(len(row.value) for row in rows) for rows in tables.values()
    )  # inches; room for the values
    figure, axes = plt.subplots(
        1,
        len(tables),
        figsize=(wide, 1.5 + 0.25 * tall),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, (name, rows) in zip(axes[0], tables.items(), strict=True):
        middle = 100 * np.asarray([row.accuracy for row in rows])
        ends = 100 * np.asarray([(row.low, row.high) for row in rows]).T
        places = range(len(rows))
        axis.errorbar(middle, places, xerr=np.abs(ends - middle), fmt="o", capsize=3)
        axis.set_yticks(places, [row.value for row in rows], fontsize=8)
        axis.invert_yaxis()  # the first row on top, as in the table
        axis.set(title=name, xlabel="accuracy, %")
    return _saved(figure, output)


def _saved(figure: Any, output: str | Path) -> Path:
    import matplotlib.pyplot as plt

    try:
        figure.savefig(output, dpi=130)
    except ValueError as error:
        raise LraError(f"cannot draw {output}: {error}") from error
    finally:
        plt.close(figure)
    return Path(output)


def _panel(axis: Any, task: str, rows: dict[str, list[Any]]) -> None:
    for number, (label, records) in enumerate(rows.items()):
        logs = [read_metrics(record["path"]) for record in records]
        runs = [
            np.asarray([(m["step"], 100 * m["val/accuracy"]) for m in log if "val/accuracy" in m])
            for log in logs
        ]
        for run in runs:
            axis.plot(*run.T, color=f"C{number}", linewidth=0.7, alpha=0.5)
        axis.plot(
            *median_curve(runs), color=f"C{number}", linewidth=2, label=f"{label}, n={len(runs)}"
        )
    reference = next(iter(rows.values()))[0]["reference"]
    for name, value in reference.items():
        axis.axhline(100 * value, color="grey", linewidth=1, linestyle="--")
        place = {
            "xy": (1, 100 * value),
            "xycoords": ("axes fraction", "data"),
            "ha": "right",
            "va": "bottom",
        }
        axis.annotate(name.replace("_", " "), fontsize=7, **place)
    axis.set(title=task, xlabel="step", ylabel="validation accuracy, %")
    axis.legend(fontsize=8)


def median_curve(runs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all runs have evaluated, and the median of their accuracies there; runs are rows of (step, accuracy)."""
    common = sorted(set.intersection(*(set(run[:, 0]) for run in runs)))
    values = [[dict(run)[step] for step in common] for run in runs]
    return np.asarray(common), np.median(values, axis=0)


def efficiency(cells: Sequence[dict[str, Any]], output: str | Path) -> Path:
    """Draw training and inference steps/s and peak training memory over the length into `output`, a line a model.

    All axes are logarithmic. Cells without a number, out of memory say, are left out of their line.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = (
        ("training steps/s", lambda cell: cell["train"]["steps_per_s"]),
        ("inference steps/s", lambda cell: cell["infer"]["steps_per_s"]),
        ("peak memory in training, GB", lambda cell: cell["memory"]["train_bytes"] / 1e9),
    )
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        if cell["status"] == "ok":
            rows[cell["row"]].append(cell)
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for axis, (title, number) in zip(axes, panels, strict=True):
        for place, (name, found) in enumerate(rows.items()):
            points = sorted((cell["seq_len"], number(cell)) for cell in found)
            axis.plot(
                *zip(*points, strict=True),
                color=colours(place % 20),
                marker="os^Dv"[place % 5],
                markersize=4,
                label=name,
            )
        axis.set(title=title, xlabel="length L", xscale="log", yscale="log")
        lengths = sorted({cell["seq_len"] for found in rows.values() for cell in found})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    if rows:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(output, dpi=100)
    plt.close(figure)
    return Path(output)
