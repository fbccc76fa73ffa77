"""Intervals: coverage over seeds, Wilson's against SciPy, rows of factors against loops."""

import sys
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest, quantile_test

from lra.report import intervals
from lra.report.intervals import summary_statistics, wilson_interval


def draws(kind, n, rng):
    """20,000 samples of n values and the median of their distribution."""
    x = rng.normal(size=(20_000, n))
    if kind == "bimodal":  # a run learns with probability 0.6, as on Pathfinder
        x = np.where(rng.random(x.shape) < 0.6, 92 + x, 50 + 0.1 * x)
        return x, 92 + NormalDist().inv_cdf(1 / 6)  # one sixth of those that learn lies below
    return x, 0.0


@pytest.mark.parametrize("kind", ["normal", "bimodal"])
@pytest.mark.parametrize("n", range(5, 11))
def test_interval_of_the_median_covers_it(n, kind):
    """At least 93 % of the samples. A bootstrap of the mean covers 83 % at n = 5."""
    samples, median = draws(kind, n, np.random.default_rng(n))
    ranks = np.argsort(np.argsort(samples[0]))
    low, high = intervals.median_interval(samples[0])  # which order statistics they are
    places = [int(ranks[samples[0] == end][0]) for end in (low, high)]
    ordered = np.sort(samples, axis=1)
    covered = (ordered[:, places[0]] <= median) & (median <= ordered[:, places[1]])
    assert covered.mean() >= 0.93


def test_interval_of_the_median_is_scipys_without_its_import(monkeypatch):
    expected = {}
    for n in (*range(5, 40), 500):
        level = min(0.95, 1 - 0.5 ** (n - 1) - 1e-9)  # SciPy rejects the exact number by rounding
        found = quantile_test(np.arange(n), q=0.0, p=0.5).confidence_interval(level)
        expected[n] = found.low, found.high
    monkeypatch.setitem(sys.modules, "scipy.stats", None)  # takes seconds to import
    for n, ends in expected.items():
        assert intervals.median_interval(np.arange(float(n))[::-1]) == ends


def test_statistics_over_seeds():
    found = summary_statistics([92.0] * 14 + [50.0] * 6)
    assert (found["median"], found["ci_low"], found["ci_high"]) == (92.0, 50.0, 92.0)
    values = [60.0, 61.0, 62.0, 64.0, 68.0]
    assert summary_statistics(values) == {
        **{"n": 5, "median": 62.0, "mean": 63.0, "ci_low": 60.0, "ci_high": 68.0},
        **{"std": pytest.approx(3.1622777), "min": 60.0, "max": 68.0},
    }
    assert intervals.median_interval(np.arange(10.0)) == (1.0, 8.0)  # the sign test's, 97.9 %


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_seeds_have_points_and_no_interval(n):
    found = summary_statistics([1.0, 2.0, 5.0, 7.0][:n])
    assert (found["ci_low"], found["ci_high"]) == (None, None)
    assert (found["min"], found["max"]) == (1.0, [1.0, 2.0, 5.0, 7.0][n - 1])
    assert (found["std"] is None) == (n == 1)


def test_error_of_a_test_set_is_the_binomial_one():
    """2,000 examples of ListOps: 2.1 points, 1.96 standard errors of a binomial."""
    standard_error = (0.36 * 0.64 / 2000) ** 0.5
    assert 100 * intervals.binomial_error(0.36, 2000) == pytest.approx(2.1, abs=0.05)
    assert intervals.binomial_error(0.36, 2000) == pytest.approx(1.96 * standard_error, rel=0.01)
    assert intervals.binomial_error(0.0, 8) > 0.1  # no example right is no certainty


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 7), (7, 7), (480, 2000)])
def test_wilson_interval_equals_scipy(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right / count, count) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_rows_of_a_factor_equal_subsets():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 400).astype(float)
    few, names = (
        rng.integers(0, 5, 400),
        rng.choice(np.array([f"name {i}" for i in range(30)]), 400),
    )
    for values in (few, names):
        for line in intervals.accuracy_by_factor(values, right):
            subset = [r for r, value in zip(right, values, strict=True) if str(value) == line.value]
            assert (line.accuracy, line.examples) == (pytest.approx(np.mean(subset)), len(subset))
    many = np.minimum(rng.integers(0, 500, 400), 250)  # half of them are 250
    rows = intervals.accuracy_by_factor(many, right)
    assert sum(line.examples for line in rows) == 400
    assert 2 < len(rows) <= intervals.MAX_BINS
    for line in rows:
        low, _, high = line.value.partition(" to ")
        subset = right[(many >= int(low)) & (many <= int(high or low))]
        assert (line.accuracy, line.examples) == (pytest.approx(subset.mean()), len(subset))
    assert [
        line.examples for line in intervals.accuracy_by_factor(rng.permutation(400), right)
    ] == [50] * 8
    assert list(intervals.accuracy_by_factors({"few": few, "one": np.zeros(400, int)}, right)) == [
        "few"
    ]
