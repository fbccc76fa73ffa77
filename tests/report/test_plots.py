"""Learning curves from records on disk."""

import numpy as np
import pytest

import lra
from lra.errors import LraError
from lra.report.plots import curves, median_curve
from lra.report.tables import shown_runs
from lra.runs.run_folder import load_records


def test_median_is_taken_where_all_runs_were_evaluated():
    runs = [
        np.asarray([[1, 10.0], [2, 20.0], [3, 30.0]]),
        np.asarray([[1, 30.0], [3, 50.0]]),
        np.asarray([[1, 20.0], [3, 90.0]]),
    ]
    steps, median = median_curve(runs)
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(median, [20.0, 50.0])


def test_finished_runs_are_drawn_and_nothing_is_an_error(tiny, tmp_path):
    with pytest.raises(LraError, match="no finished run below"):
        curves([tmp_path], tmp_path / "curves.png")
    lra.train(tiny)
    lra.train([*tiny, "optim.lr=0.1"])  # another configuration is not another seed
    finished = load_records([tmp_path])
    assert [len(runs) for runs, _ in shown_runs(finished).values()] == [1]
    assert curves([tmp_path], tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LraError, match="cannot draw"):
        curves([tmp_path], tmp_path / "curves.doc")
