"""Scores: means over all examples and labels, not over batches."""

import numpy as np
import pytest

from lra.training.evaluation import score


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
