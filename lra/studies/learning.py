"""Figures 3, 5 and 6: one STU layer against one LRU layer on a marginally stable system.

The tuned setting of a layer has the lowest mean logarithm of the loss over all samples. The last
tenth of a run gives its end loss.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from lra.studies.figures import LRU, OTHER, STU, blocks, draw_band, panels
from lra.studies.lds import PRINTED, least_squares_taps
from lra.studies.lds_training import (
    FEEDBACKS,
    GRID,
    LRU_RATES,
    LRU_STATES,
    RATES,
    Runs,
    random_rows,
    train_lru,
    train_stu,
)
from lra.studies.output import Output
from models.lds_layers import stu_taps, with_feedback

Row = dict[str, Any]
Curves = Float[np.ndarray, "seeds steps"]

LOW = 1e3  # "reaches a low loss": 1/200 of the zero predictor's loss at L = 1,000
RATE_COLORS = dict(zip(LRU_RATES, ("0.35", "0.65", *(f"C{i}" for i in range(6))), strict=True))
TITLES = {
    "none": r"STU without $y_{t-2}$",
    "own": r"STU, eq. (4), own $y_{t-2}$",
    "true": r"STU, eq. (4), observed $y_{t-2}$",
}


def fig3(
    length: int, steps: int, seeds: int, filters: tuple[int, ...], most: int, settings: int
) -> Output:
    """(a) Learning curves of the tuned layers; (b) end loss of the STU against K."""
    stu = train_stu(length, steps, seeds, filters, most)
    lru = tuned_lru(length, steps, seeds, settings)
    block = max(1, steps // 100)
    figure, axes = panels(["(a) loss of each new sample", "(b) error against K"])
    numbers: Row = {}
    rows = []
    best = {
        "STU": best_run(stu, {"feedback": "none", "filters": most}),
        "LRU": best_run(lru, {}),
    }
    for (name, (row, curves)), color in zip(best.items(), (STU, LRU), strict=True):
        label = f"{name}, rate {row['rate']:g}, {seeds} seeds"
        rows += draw_curve(axes[0], curves, block, {"layer": name}, color=color, label=label)
        numbers[f"tuned {name}"] = row
        numbers |= {f"{name}: {key}": value for key, value in summary(curves, block).items()}
    finish(axes[0])
    reached = [summary(curves, block)["samples to low loss"] for _, curves in best.values()]
    numbers["LRU samples / STU samples to low loss"] = ratio(reached[1], reached[0], steps)

    h, taps = PRINTED.impulse_response(length), stu_taps(length, max(filters))
    against_k: list[Row] = []
    for k in filters:
        columns = taps[:, : 3 + 2 * k]
        row, curves = best_run(stu, {"feedback": "none", "filters": k})
        against_k.append(
            {
                "K": k,
                "rate": row["rate"],
                "lowest block": float(np.median(blocks(curves, block).min(1))),
                "end": float(np.median(end_losses(curves))),
                "least squares": least_squares_taps(columns, h)[1],
                "least squares, eq. (4)": least_squares_taps(with_feedback(columns), h)[1],
            }
        )
    styles = {
        "lowest block": "o-",
        "end": "s-",
        "least squares": "^--",
        "least squares, eq. (4)": "v--",
    }
    for key, style in styles.items():
        axes[1].semilogy(filters, [row[key] for row in against_k], style, label=key)
    axes[1].set(xlabel="number of filters K", ylabel="squared error, summed")
    axes[1].legend()
    low = [row for row in against_k if row["least squares"] > 1e-10]
    slope = np.polyfit([r["K"] for r in low], np.log10([r["least squares"] for r in low]), 1)[0]
    numbers |= {
        "least squares: decades of error for each filter": float(-slope),
        "trained: lowest block at most K / at fewest K": against_k[-1]["lowest block"]
        / against_k[0]["lowest block"],
        "expected loss of the zero predictor at L": zero_loss(length),
        "L at which the zero predictor's loss is 3e5, the first loss of figure 5": int(
            np.argmax([zero_loss(n) > 3e5 for n in range(0, 2000, 10)]) * 10
        ),
    }
    return Output({"fig3a": rows, "fig3b": against_k}, numbers, figure)


def fig5(
    length: int, steps: int, seeds: int, filters: tuple[int, ...], most: int, settings: int
) -> Output:
    """Every learning rate of the STU with and without feedback, and of the LRU tuned in fig6."""
    stu = train_stu(length, steps, seeds, filters, most)
    lru = tuned_lru(length, steps, seeds, settings)
    block = max(1, steps // 100)
    figure, axes = panels([*TITLES.values(), "LRU, tuned setting"], width=3.6, sharey=True)
    rows: list[Row] = []
    ends: list[Row] = []
    shown: list[tuple[str, Runs, Row]] = [
        (f"STU {name}", stu, {"feedback": name, "filters": most}) for name in FEEDBACKS
    ]
    for axis, (name, runs, wanted) in zip(axes, [*shown, ("LRU", lru, {})], strict=True):
        for rate in LRU_RATES if name == "LRU" else RATES:
            _, curves = best_run(runs, wanted | {"rate": rate})
            key = {"layer": name, "rate": rate}
            options = {"color": RATE_COLORS[rate], "label": f"rate {rate:g}"}
            rows += draw_curve(axis, curves, block, key, **options)
            ends.append(key | summary(curves, block))
        finish(axis, legend=False)
    for axis in axes[1:]:
        axis.set_ylabel("")
    handles = axes[-1].get_legend_handles_labels()  # of all rates
    figure.legend(*handles, loc="outside lower center", ncols=len(LRU_RATES))
    names = [name for name, *_ in shown] + ["LRU"]
    reaching = {
        name: [e["rate"] for e in ends if e["layer"] == name and e["samples to low loss"]]
        for name in names
    }
    kept = {
        name: [e["rate"] for e in ends if e["layer"] == name and e["end loss"] < LOW]
        for name in names
    }
    numbers = {f"rates at which most seeds reach a loss of {LOW:g}": reaching}
    numbers[f"rates with an end loss below {LOW:g}"] = kept
    return Output({"fig5": rows, "ends": ends}, numbers, figure)


def fig6(
    length: int, steps: int, seeds: int, filters: tuple[int, ...], most: int, settings: int
) -> Output:
    """Random settings of the LRU, the best of them with more seeds, and the tuned STU."""
    search = lru_search(length, steps, settings)
    block = max(1, steps // 100)
    figure, (axis,) = panels([f"{settings} random LRU settings, one seed each"], width=6.4)
    x = (np.arange(steps // block) + 0.5) * block
    smooth = blocks(search.curves[0], block)
    axis.plot(x, smooth.T, color=OTHER, lw=0.5, alpha=0.5)
    rows = [
        {"layer": f"LRU {i}", "samples": at, "median": loss, "lowest": loss, "highest": loss}
        for i, curve in enumerate(smooth)
        for at, loss in zip(x.round(1), curve, strict=True)
    ]
    stu = train_stu(length, steps, seeds, filters, most)
    tuned = {
        "STU": best_run(stu, {"feedback": "none", "filters": most}),
        "LRU": best_run(tuned_lru(length, steps, seeds, settings), {}),
    }
    for (name, (row, curves)), color in zip(tuned.items(), (STU, LRU), strict=True):
        label = f"tuned {name}, rate {row['rate']:g}, {seeds} seeds"
        rows += draw_curve(axis, curves, block, {"layer": name}, color=color, label=label)
    finish(axis)
    trials = [row | summary(search.curves[:, i], block) for i, row in enumerate(search.rows)]
    reached = [trial for trial in trials if trial["samples to low loss"]]
    first = min((trial["samples to low loss"] for trial in reached), default=None)
    of_stu = summary(tuned["STU"][1], block)["samples to low loss"]
    numbers = {
        "settings": settings,
        f"settings that reach a loss of {LOW:g}": len(reached),
        "settings that diverge": int(np.sum(~np.isfinite(search.curves[0]).all(1))),
        "samples of the fastest LRU setting": first,
        "samples of the tuned STU": of_stu,
        "LRU / STU": ratio(first, of_stu, steps),
        "share with each option among the settings that reach it": {
            key: {str(v): sum(t[key] == v for t in reached) for v in GRID[key]} for key in GRID
        },
        "parameters": {"LRU": 15 * LRU_STATES + 3, "STU": 9 * (3 + 2 * most)},
    }
    return Output({"fig6": rows, "settings": trials}, numbers, figure)


@lru_cache
def lru_search(length: int, steps: int, settings: int) -> Runs:
    return train_lru(length, steps, 1, random_rows(settings))


@lru_cache
def tuned_lru(length: int, steps: int, seeds: int, settings: int) -> Runs:
    """The best setting of the search at every rate, with more seeds."""
    row, _ = best_run(lru_search(length, steps, settings), {})
    return train_lru(length, steps, seeds, [row | {"rate": rate} for rate in LRU_RATES])


def best_run(runs: Runs, wanted: Row) -> tuple[Row, Curves]:
    """The setting that has the values of `wanted` and is the tuned one of these, and its curves."""
    found = [i for i, row in enumerate(runs.rows) if wanted.items() <= row.items()]
    with np.errstate(divide="ignore"):
        score = np.log(runs.curves[:, found]).mean(2)  # a loss that is no number stays one
    best = found[int(np.argmin(np.median(np.nan_to_num(score, nan=np.inf, posinf=np.inf), 0)))]
    return runs.rows[best], runs.curves[:, best]


def summary(curves: Curves, block: int) -> Row:
    """Medians over the seeds; the samples are None if a seed in the middle never gets there."""
    return {
        "end loss": float(np.median(np.nan_to_num(end_losses(curves), nan=np.inf))),
        "lowest block": float(np.median(np.nan_to_num(blocks(curves, block), nan=np.inf).min(1))),
        "samples to low loss": samples_to(curves, LOW, block),
    }


def end_losses(curves: Curves) -> Float[np.ndarray, " seeds"]:
    return curves[:, -max(1, curves.shape[1] // 10) :].mean(1)


def samples_to(curves: Curves, loss: float, block: int) -> int | None:
    """Samples until a block of the median seed is below `loss`."""
    below = blocks(curves, block) < loss
    first = np.where(below.any(1), (below.argmax(1) + 1.0) * block, np.inf)
    middle = np.sort(first)[len(first) // 2]
    return int(middle) if np.isfinite(middle) else None


def ratio(slow: int | None, fast: int | None, steps: int) -> float | str:
    """A layer that never gets there counts as more than all steps."""
    if fast is None:
        return "not reached"
    return f"> {steps / fast:.1f}" if slow is None else slow / fast


def zero_loss(length: int) -> float:
    """Expected loss of the prediction 0 for standard normal inputs."""
    h = PRINTED.impulse_response(max(length, 1))
    return float(np.sum((length - np.arange(len(h))) * np.sum(h**2, axis=(1, 2))))


def draw_curve(axis: Axes, curves: Curves, block: int, key: Row, **options: Any) -> list[Row]:
    """Draws the band of the seeds and returns its rows."""
    smooth = blocks(curves, block)
    x = (np.arange(smooth.shape[1]) + 0.5) * block
    draw_band(axis, x, smooth, **options)
    values = zip(x, np.median(smooth, 0), smooth.min(0), smooth.max(0), strict=True)
    names = ("samples", "median", "lowest", "highest")
    return [key | dict(zip(names, row, strict=True)) for row in values]


def finish(axis: Axes, legend: bool = True) -> None:
    axis.set(yscale="log", ylim=(1, 1e7), xlabel="samples", ylabel="squared error, summed")
    axis.axhline(LOW, color="0.5", lw=0.8, ls=":")
    if legend:
        axis.legend()
