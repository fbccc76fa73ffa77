"""Accuracies with 95 % intervals: over examples (Wilson) and over seeds (sign test)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
FEWEST_FOR_INTERVAL = 5  # values; four cannot bound a median with 93 % coverage
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

    From `FEWEST_FOR_INTERVAL` values on, `ci_low` and `ci_high` are `median_interval`; with fewer
    they are None, as is `std` of one value.
    """
    x = np.asarray(values, np.float64)
    low, high = median_interval(x) if len(x) >= FEWEST_FOR_INTERVAL else (None, None)
    return {
        "n": len(x),
        "median": float(np.median(x)),
        "mean": float(x.mean()),
        "ci_low": low,
        "ci_high": high,
        "std": float(x.std(ddof=1)) if len(x) > 1 else None,
        "min": float(x.min()),
        "max": float(x.max()),
    }


def median_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """95 % interval of the median of a distribution, from at least 5 draws of it.

    Two of the values, by the exact sign test (Conover 1999, section 3.2): for every distribution
    the coverage is at least 95 %. Five values give at most 93.75 %, their range.
    """
    ordered, n = np.sort(values), len(values)
    # tail k: probability that at most k of n draws are below the median, or above it
    tails = itertools.accumulate(math.comb(n, k) / 2**n for k in range(n))
    k = max(1, sum(1 for tail in itertools.takewhile(lambda tail: tail <= 0.025, tails)))
    return float(ordered[k - 1]), float(ordered[n - k])


def binomial_error(accuracy: float, count: int) -> float:
    """Half the width of the `wilson_interval` of an accuracy measured on `count` labels."""
    low, high = wilson_interval(accuracy, count)
    return (high - low) / 2
