"""How did validation accuracy grow? Learning curves of finished runs, a line a model, beside the lines they have to beat."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import LraError
from lra.records import load_records, read_metrics


def curves(paths: Iterable[str | Path], output: str | Path, tasks: Sequence[str] | None = None) -> Path:
    """Draw validation accuracy over steps into `output` (png, pdf or svg), a panel a task.

    A thin line is a run, a thick one the median of its model's runs; dashed lines are the test split's reference lines.

    Raises:
        LraError: no finished run below `paths`, or a file type that cannot be drawn.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in load_records(paths):
        if record["status"] == "finished" and (tasks is None or record["task"] in tasks):
            panels[record["task"]].append(record)
    if not panels:
        raise LraError(f"no finished run below {', '.join(map(str, paths))}; `lra train` makes one")
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (task, records) in zip(axes[0], sorted(panels.items()), strict=True):
        _panel(axis, task, records)
    try:
        figure.savefig(output, dpi=130)
    except ValueError as error:
        raise LraError(f"cannot draw {output}: {error}") from error
    finally:
        plt.close(figure)
    return Path(output)


def _panel(axis: Any, task: str, records: list[dict[str, Any]]) -> None:
    by_model: dict[str, list[np.ndarray]] = defaultdict(list)
    for record in records:
        label = record["model"] if record["protocol"] == "strict" else f"{record['model']} [{record['protocol']}]"
        rows = [(m["step"], 100 * m["val/accuracy"]) for m in read_metrics(record["path"]) if "val/accuracy" in m]
        by_model[label].append(np.asarray(rows))
    for number, (label, runs) in enumerate(sorted(by_model.items())):
        for run in runs:
            axis.plot(*run.T, color=f"C{number}", linewidth=0.7, alpha=0.5)
        steps, median = median_curve(runs)
        axis.plot(steps, median, color=f"C{number}", linewidth=2, label=f"{label}, n={len(runs)}")
    for name, value in (records[0]["reference"] or {}).items():
        axis.axhline(100 * value, color="grey", linewidth=1, linestyle="--")
        axis.annotate(
            name.replace("_", " "),
            (1, 100 * value),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            ha="right",
            va="bottom",
        )
    axis.set(title=task, xlabel="step", ylabel="validation accuracy, %")
    axis.legend(fontsize=8)


def median_curve(runs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all runs have evaluated, and the median of their accuracies there; runs are rows of (step, accuracy)."""
    common = sorted(set.intersection(*(set(run[:, 0]) for run in runs)))
    values = [[dict(run)[step] for step in common] for run in runs]
    return np.asarray(common), np.median(values, axis=0)
