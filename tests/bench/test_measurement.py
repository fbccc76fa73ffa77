"""Record and table of measurements, and the command that makes them."""

import json

import pytest

from lra.bench import data
from lra.bench.measurement import Measurement
from lra.cli import main

GIVEN = [
    Measurement("opening", 0.00123456, "s", "< 0.2 s"),
    Measurement("Text", None, "s", "< 30 s", "IMDB reviews: not found"),
]


def test_result_is_printed_and_saved(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "measure", lambda data_root: iter(GIVEN))
    file = tmp_path / "new" / "bench.json"
    assert main(["bench", "data", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:4]]
    assert rows == [
        ["opening", "0.001235 s", "< 0.2 s", ""],
        ["Text", "not measured", "< 30 s", "IMDB reviews: not found"],
    ]
    result = json.loads(file.read_text())
    assert [Measurement(**m) for m in result["measurements"]] == GIVEN
    assert result["machine"]["cores"] >= 1
    assert result["versions"]["numpy"]


@pytest.mark.parametrize("words", [["ops", "model=lru"], ["data", "--fresh"]])
def test_arguments_of_another_suite_are_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *words])
    assert caught.value.code == 2
    assert f"unrecognized arguments: {words[1]}" in capsys.readouterr().err
