"""The table of `lra models`."""

import csv
import io

import pytest

import lra
from lra.config import cost as cost_module
from lra.config.cost import cost
from lra.config.flops import UncountedError
from lra.errors import ConfigError
from lra.report.models import cost_table


def test_table_has_a_row_per_model_with_a_reason_if_it_cannot_be_built():
    words = ["task=listops_short", "model=lru,transformer", "backbone.width=9", "backbone.depth=1"]
    rows = list(csv.DictReader(io.StringIO(cost_table(words, "csv"))))
    assert [row["model"] for row in rows] == ["lru", "transformer"]
    expected = cost(lra.compose([*words[:1], "model=lru", *words[2:]]))
    assert (rows[0]["parameters"], rows[0]["FLOPs"]) == (str(expected.params), str(expected.flops))
    assert (rows[0]["width"], rows[0]["depth"], rows[0]["note"]) == ("9", "1", "")
    assert rows[1]["parameters"] == ""
    assert "must be at least 1 and divide backbone.width=9" in rows[1]["note"]
    shown = cost_table(words)
    assert f"{expected.params:,}" in shown
    assert "listops_short, protocol strict" in shown
    assert cost_table(words, "markdown").splitlines()[2].startswith("| model ")
    assert r"\toprule" in cost_table(words, "latex")


def test_model_without_a_count_of_flops_keeps_its_parameters(monkeypatch):
    def refuse(*_):
        raise UncountedError("a while loop")

    monkeypatch.setattr(cost_module, "flops", refuse)
    (row,) = csv.DictReader(io.StringIO(cost_table(["task=listops_short", "model=lru"], "csv")))
    assert row["FLOPs"] == ""
    assert int(row["parameters"]) > 0
    assert row["note"] == "operations not counted: a while loop"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["listops"], "listops: expected KEY=VALUE as for `lra train`, such as task=listops"),
        (["task=listop", "model=lru,gru"], "unknown task=listop (did you mean listops"),
        (["model=lrv"], "unknown model=lrv (did you mean lru"),
        (
            ["backbone.depth=0", "model=lru,gru"],
            "backbone.depth=0 must be a whole number in [1, 1000]",
        ),
    ],
)
def test_error_of_every_model_is_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        cost_table(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_table_of_an_experiment_has_its_model():
    (row,) = csv.DictReader(io.StringIO(cost_table(["experiment=listops/quick"], "csv")))
    assert row["model"] == lra.compose(["experiment=listops/quick"]).names.model
