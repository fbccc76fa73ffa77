"""`lra bench`: what was not measured says why, and the record carries its origin."""

import json

import pytest

from lra import bench
from lra.bench import Measurement
from lra.cli import main


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
