"""Accuracies with 95 % intervals: over examples (Wilson) and over seeds (bootstrap)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 10_000
MAX_VALUES = 20  # a numeric factor with more distinct values is binned
MAX_BINS, MIN_PER_BIN = 8, 50  # quantile bins, and examples in each if there are more than two bins


class AccuracyRow(NamedTuple):
    """Accuracy of the examples that share a value; `accuracy`, `low` and `high` are fractions."""

    value: str
    accuracy: float
    low: float  # ends of the 95 % interval
    high: float
    examples: int


def accuracy_row(value: Any, correct: Float[np.ndarray, " n"]) -> AccuracyRow:
    """Accuracy and Wilson interval of examples, from the fraction of correct labels in each."""
    accuracy = float(correct.mean())
    return AccuracyRow(str(value), accuracy, *wilson_interval(accuracy, len(correct)), len(correct))


def wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """95 % interval of a fraction observed in `count` independent examples (Wilson 1927)."""
    scale = 1 + Z**2 / count
    center = (accuracy + Z**2 / (2 * count)) / scale
    half = Z * (accuracy * (1 - accuracy) / count + Z**2 / (4 * count**2)) ** 0.5 / scale
    return max(0.0, center - half), min(1.0, center + half)


def accuracy_by_factors(
    factors: Mapping[str, np.ndarray], correct: Float[np.ndarray, " n"]
) -> dict[str, list[AccuracyRow]]:
    """One table for each factor that takes more than one value."""
    tables = {name: accuracy_by_factor(values, correct) for name, values in factors.items()}
    return {name: rows for name, rows in tables.items() if len(rows) > 1}


def accuracy_by_factor(
    values: Integer[np.ndarray, " n"] | np.ndarray, correct: Float[np.ndarray, " n"]
) -> list[AccuracyRow]:
    """One row for each value in ascending order, or for each quantile bin of many numbers."""
    distinct = np.unique(values)
    if values.dtype.kind in "US" or len(distinct) <= MAX_VALUES:
        return [accuracy_row(value, correct[values == value]) for value in distinct.tolist()]
    num_bins = min(MAX_BINS, max(2, len(values) // MIN_PER_BIN))
    quantiles = np.arange(1, num_bins) / num_bins
    edges = np.unique(np.quantile(values, quantiles, method="inverted_cdf"))
    bins = np.searchsorted(edges, values)  # equal values share a bin
    rows = []
    for index in np.unique(bins):
        inside = values[bins == index]
        low, high = inside.min(), inside.max()
        name = low if low == high else f"{low} to {high}"
        rows.append(accuracy_row(name, correct[bins == index]))
    return rows


def summary_statistics(values: Sequence[float]) -> dict[str, Any]:
    """n, median, mean, ci_low, ci_high, std, min and max of one number per seed.

    The interval is the 95 % percentile bootstrap of the mean with a fixed seed. For 2 or 3 values
    it is their range. For one value the interval and `std` are None.
    """
    x = np.asarray(values, np.float64)
    summary = {
        "n": len(x),
        "median": float(np.median(x)),
        "mean": float(x.mean()),
        "min": float(x.min()),
        "max": float(x.max()),
    }
    if len(x) == 1:
        return summary | {"ci_low": None, "ci_high": None, "std": None}
    rows = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.quantile(x[rows].mean(axis=1), [0.025, 0.975])
    return summary | {"ci_low": float(low), "ci_high": float(high), "std": float(x.std(ddof=1))}
