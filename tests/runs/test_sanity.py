"""Sanity checks beside hand-computed values."""

import math

import numpy as np
import pytest

from lra.runs import sanity


@pytest.mark.parametrize(
    ("loss", "classes", "words"),
    [
        (math.log(10), 10, None),
        (1.99 * math.log(10), 10, None),
        (2.01 * math.log(10), 10, "check the initialization scale"),
        (0.51 * math.log(2), 2, None),
        (0.49 * math.log(2), 2, "check whether the inputs contain the labels"),
    ],
)
def test_first_loss_is_compared_with_log_of_classes(loss, classes, words):
    found = sanity.first_loss_problem(loss, classes, 2.0)
    assert (found is None) if words is None else words in found
    assert sanity.first_loss_problem(99.0, classes, None) is None


def test_chance_is_uniform_or_the_most_frequent_label_of_each_position():
    assert sanity.chance(np.array([0, 1, 2, 3]), 4) == 0.25
    assert sanity.chance(np.array([[0, 1], [1, 1]]), 4) == 0.75
    assert sanity.chance(np.array([[0, 1], [0, 1]]), 4) == 1.0


def test_accuracy_within_three_standard_errors_is_at_chance():
    limit = 0.25 + 3 * (0.25 * 0.75 / 1000) ** 0.5
    assert sanity.is_at_chance(limit - 1e-9, 0.25, 1000)
    assert sanity.is_at_chance(0.0, 0.25, 1000)
    assert not sanity.is_at_chance(limit + 1e-9, 0.25, 1000)


def test_early_stopping_depends_on_steps_alone():
    # evaluations every 5 steps, the best at step 10
    assert sanity.stopped_early(4, 0, 5, 1) is None  # before the first evaluation
    assert all(sanity.stopped_early(step, 10, 5, 1) is None for step in (10, 14))
    assert sanity.stopped_early(15, 10, 5, 1)["step"] == 15
    assert sanity.stopped_early(19, 10, 5, 2) is None
    assert sanity.stopped_early(20, 10, 5, 2)["step"] == 20
    assert sanity.stopped_early(10**6, 10, 5, None) is None
