"""The linear reference line: right where a line divides the classes, chance where nothing does."""

import numpy as np
import pytest

from lra.tasks.linear_baseline import grouped_linear_accuracy, linear_accuracy


def split(n, seed, shift):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    x = rng.normal(size=(n, 2)) + shift * np.stack([np.cos(2 * labels), np.sin(2 * labels)], axis=1)
    return 1000 * x + 7, labels  # far from unit scale on purpose


@pytest.mark.parametrize(
    ("shift", "low", "high"), [(10.0, 0.99, 1.0), (0.0, 0.25, 0.42), (1.0, 0.55, 0.80)]
)
def test_accuracy_is_that_of_the_best_line(shift, low, high):
    """With centres at distance 1 the Bayes rule is right about two times in three."""
    assert low <= linear_accuracy(split(3000, 0, shift), split(3000, 1, shift), 3) <= high


def test_constant_feature_is_no_trouble():
    x = np.column_stack([np.ones(40), np.arange(40.0)])
    labels = (np.arange(40) >= 20).astype(np.uint8)
    assert linear_accuracy((x, labels), (x, labels), 2) == 1.0


def test_few_rows_are_fitted_without_iterations(monkeypatch):
    monkeypatch.setattr("scipy.optimize.minimize", None)
    assert linear_accuracy(split(100, 0, 10.0), split(3000, 1, 10.0), 3) > 0.95
    with pytest.raises(TypeError):
        linear_accuracy(split(500, 0, 10.0), split(3000, 1, 10.0), 3)


def test_each_group_has_its_own_classifier():
    """The sign of the feature means the opposite in the second group; the third is not in train."""
    x = np.random.default_rng(0).normal(size=(300, 1))
    groups = np.arange(300) % 2
    labels = ((x[:, 0] > 0) ^ (groups == 1)).astype(np.uint8)
    train = groups, x, labels
    assert linear_accuracy((x, labels), (x, labels), 2) < 0.6
    assert grouped_linear_accuracy(train, train, 2) > 0.97
    unknown = np.where(np.arange(300) < 150, groups, 7), x, labels
    assert grouped_linear_accuracy(train, unknown, 2) == pytest.approx(0.5, abs=0.02)
