"""Scores: means over all examples and labels, not over batches."""

import numpy as np
import pytest

from lra.training.evaluation import sample_rows, score


def test_score_of_several_labels_counts_labels_and_whole_rows():
    logits = np.zeros((2, 3, 4))
    labels = np.array([[0, 1, 2], [3, 3, 3]])
    logits[0, [0, 1, 2], [0, 1, 2]] = 5.0  # row 0: all correct
    logits[1, [0, 1, 2], [3, 0, 3]] = 5.0  # row 1: two of three correct
    correct, wrong = np.log(np.exp(5.0) + 3) - 5.0, np.log(np.exp(5.0) + 3)
    result = score(logits, labels)
    assert result["accuracy"] == pytest.approx(5 / 6)
    assert result["exact"] == 0.5
    assert result["loss"] == pytest.approx((5 * correct + wrong) / 6)
    assert result["count"] == 2


def test_score_of_one_label_has_no_exact():
    result = score(np.array([[2.0, 0.0], [2.0, 0.0]]), np.array([0, 1]))
    assert result == {
        "accuracy": 0.5,
        "loss": pytest.approx(np.log1p(np.exp(-2.0)) + 1.0),
        "count": 2,
    }


@pytest.mark.parametrize("limit", [1, 2, 7, 30, 99, 100])
def test_sample_has_each_label_as_often_as_its_share(limit):
    """Also of a split that is sorted by label, as those of Text are."""
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    rows = sample_rows(labels, limit)
    assert len(rows) == limit
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(labels[rows], minlength=3)
    assert (np.abs(counts - limit * np.array([0.6, 0.3, 0.1])) < 1).all()
    np.testing.assert_array_equal(rows, sample_rows(labels, limit))


def test_sample_is_spread_over_the_rows_of_a_label():
    rows = sample_rows(np.zeros(10_000, int), 1000)
    assert abs(rows.mean() - 5000) < 400
    assert len(set(np.diff(rows))) > 10


def test_sample_of_everything_of_first_rows_and_of_several_labels():
    labels = np.arange(12) % 2
    for limit in (None, 12, 13):
        np.testing.assert_array_equal(sample_rows(labels, limit), np.arange(12))
    np.testing.assert_array_equal(sample_rows(labels, 5, "first"), np.arange(5))
    assert len(set(sample_rows(np.zeros((12, 3), int), 5))) == 5
