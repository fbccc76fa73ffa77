"""`lra bench`: what was not measured says why, and the record carries its origin."""

import json
import time

import pytest

from lra import bench
from lra.bench import Measurement
from lra.cli import main
from models import benchmarks


@pytest.fixture
def measured(monkeypatch):
    given = [
        Measurement("opening", 0.00123456, "s", "< 0.2 s"),
        Measurement("Text", None, "s", "< 30 s", "IMDB reviews: not found"),
    ]
    monkeypatch.setattr(bench, "data", lambda data_root: iter(given))
    return given


def test_result_is_printed_and_kept(measured, tmp_path, capsys):
    file = tmp_path / "new" / "bench.json"
    assert main(["bench", "data", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:4]]
    assert rows == [
        ["opening", "0.001235 s", "< 0.2 s", ""],
        ["Text", "not measured", "< 30 s", "IMDB reviews: not found"],
    ]
    result = json.loads(file.read_text())
    assert [Measurement(**m) for m in result["measurements"]] == measured
    assert result["machine"]["cores"] >= 1
    assert result["versions"]["numpy"]


@pytest.mark.slow
def test_data_suite_measures_what_is_there(publishers, monkeypatch):
    """All but Text and Image, whose publishers' files are here too few."""
    monkeypatch.setattr(bench, "WINDOW_SECONDS", 0.01)
    found = {m["what"]: m for m in bench.run("data", publishers)["measurements"]}
    missing = {what for what, m in found.items() if m["value"] is None}
    assert missing == {what for what in found if what.startswith(("Text", "Image"))}
    assert all("examples in" in found[what]["note"] for what in missing)
    assert all(m["value"] > 0 for what, m in found.items() if what not in missing)


def test_ops_suite_measures_time_and_memory_of_both_sides(monkeypatch, tmp_path):
    small = [
        benchmarks.recurrence_case(2, 8, 3, faster=">= 2 x"),
        benchmarks.path_x_case(batch=1, length=32, width=4, depth=1),
        benchmarks.HostCase("a sleep", lambda: time.sleep(0.02), "< 1 s"),
    ]
    monkeypatch.setattr(benchmarks, "cases", lambda platform: iter(small))
    result = bench.run("ops", tmp_path)
    measured = {m["what"]: m for m in result["measurements"]}
    assert len(measured) == 5
    assert all(m["value"] > 0 for m in measured.values())
    assert measured["a sleep"]["value"] >= 0.02
    assert measured["complex recurrence, B=2 L=8 N=3: faster"]["goal"] == ">= 2 x"
    (whole,) = (m for m in measured.values() if m["unit"] == "GB")
    assert 32 * 4 * 4 < whole["value"] * 1e9 < 1e9
    assert result["machine"]["device"] in bench.render(result)
