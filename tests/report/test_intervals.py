"""Wilson and bootstrap intervals against SciPy and against loops."""

import numpy as np
import pytest
from scipy.stats import binomtest

from lra.report import intervals
from lra.report.intervals import summary_statistics, wilson_interval


def test_interval_over_seeds_is_the_bootstrap_of_the_mean():
    values = [60.0, 61.0, 62.0, 64.0, 68.0]
    found = summary_statistics(values)
    rng = np.random.default_rng(1)
    means = sorted(np.mean([values[i] for i in rng.integers(5, size=5)]) for _ in range(20_000))
    low, high = means[500], means[-500]
    assert found["ci_low"] == pytest.approx(low, abs=0.15)
    assert found["ci_high"] == pytest.approx(high, abs=0.15)
    assert (found["n"], found["median"], found["mean"], found["min"], found["max"]) == (
        5,
        62,
        63,
        60,
        68,
    )
    assert found["std"] == pytest.approx(3.1622777)
    assert summary_statistics(values) == found


def test_interval_of_two_or_three_seeds_is_their_range():
    for values in ([1.0, 2.0], [1.0, 2.0, 5.0]):
        found = summary_statistics(values)
        assert (found["ci_low"], found["ci_high"]) == (min(values), max(values))
    assert summary_statistics([1.0, 2.0, 4.0, 5.0])["ci_low"] > 1.0
    assert summary_statistics([1.0])["ci_low"] is None


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
