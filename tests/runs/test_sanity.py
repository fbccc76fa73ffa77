"""Sanity checks: initial loss, chance level, early stopping."""

import math

import numpy as np
import pytest
from run_checks import folder_of

import lra
from lra.report.tables import make_table
from lra.runs import sanity
from lra.runs.records import read_metrics


@pytest.mark.parametrize(
    ("loss", "classes", "words"),
    [
        (math.log(10), 10, None),
        (1.99 * math.log(10), 10, None),
        (2.01 * math.log(10), 10, "head"),
        (0.51 * math.log(2), 2, None),
        (0.49 * math.log(2), 2, "inputs"),
    ],
)
def test_first_loss_is_held_against_log_of_classes(loss, classes, words):
    found = sanity.first_loss_problem(loss, classes, 2.0)
    assert (found is None) if words is None else words in found
    assert sanity.first_loss_problem(99.0, classes, None) is None


def test_chance_is_guessing_or_the_most_frequent_label_within_three_standard_errors():
    assert sanity.chance(np.array([0, 1, 2, 3]), 4) == 0.25
    assert sanity.chance(np.array([[0, 1], [1, 1]]), 4) == 0.75
    assert sanity.chance(np.array([[0, 1], [0, 1]]), 4) == 1.0  # each place by itself
    line = 0.25 + 3 * (0.25 * 0.75 / 1000) ** 0.5
    assert sanity.is_at_chance(line - 1e-9, 0.25, 1000)
    assert sanity.is_at_chance(0.0, 0.25, 1000)
    assert not sanity.is_at_chance(line + 1e-9, 0.25, 1000)


def test_early_stopping_counts_evaluations_wherever_a_run_was_cut():
    # evaluations each 5 steps, the best of them at 10
    assert [sanity.evaluations_without_gain(step, 10, 5) for step in (10, 14, 15, 19, 20)] == [
        0,
        0,
        1,
        1,
        2,
    ]
    assert sanity.stopped_early(4, 0, 5, 1) is None  # nothing was evaluated yet
    assert sanity.stopped_early(19, 10, 5, 2) is None
    assert sanity.stopped_early(20, 10, 5, 2)["step"] == 20
    assert sanity.stopped_early(10**6, 10, 5, None) is None


def test_run_at_chance_warns_once_and_is_marked(tiny, capfd):
    overrides = [
        *tiny,
        "backbone.depth=1",
        "optim.lr=1e-9",
        "trainer.steps=8",
        "trainer.chance_after=0.5",
        "trainer.first_loss_tolerance=1.001",
        "trainer.early_stopping=3",  # would stop at step 8, which is the last
    ]
    record = lra.train(overrides)
    out, err = capfd.readouterr()
    first, chance = err.splitlines()
    rows = read_metrics(folder_of(overrides))
    assert record["first_loss"] == pytest.approx(rows[0]["train/loss"], rel=1e-6)
    assert "loss" in first
    assert f"{record['first_loss']:.3f}" in first
    assert "log(10) = 2.303" in first
    # one warning, though two more evaluations follow
    assert "at step 4 of 8 validation accuracy" in chance
    assert "within noise of chance" in chance
    assert (record["at_chance"], record["learned"], record["stopped_early"]) == (True, False, None)
    assert "FAIL in a table" in out
    (cell,) = (cell for row in make_table([record]).sections[0][1] for cell in row.cells.values())
    assert cell == f"FAIL ({100 * record['metrics']['test']['accuracy']:.1f}) n=1"
