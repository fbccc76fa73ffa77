"""`lra bench`: what was not measured says why, and the record carries its origin."""

import json
import time

import numpy as np
import pytest

from lra.bench import suites, trainer
from lra.bench.suites import Measurement
from lra.bench.trainer import Start
from lra.cli import main
from lra.errors import LraError
from models import benchmarks


@pytest.fixture
def measured(monkeypatch):
    given = [
        Measurement("opening", 0.00123456, "s", "< 0.2 s"),
        Measurement("Text", None, "s", "< 30 s", "IMDB reviews: not found"),
    ]
    monkeypatch.setattr(suites, "data", lambda data_root: iter(given))
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
    monkeypatch.setattr(suites, "WINDOW_SECONDS", 0.01)
    found = {m["what"]: m for m in suites.run("data", publishers)["measurements"]}
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
    result = suites.run("ops", tmp_path)
    measured = {m["what"]: m for m in result["measurements"]}
    assert len(measured) == 5
    assert all(m["value"] > 0 for m in measured.values())
    assert measured["a sleep"]["value"] >= 0.02
    assert measured["complex recurrence, B=2 L=8 N=3: faster"]["goal"] == ">= 2 x"
    (whole,) = (m for m in measured.values() if m["unit"] == "GB")
    assert 32 * 4 * 4 < whole["value"] * 1e9 < 1e9
    assert result["machine"]["device"] in suites.measurements_table(result)


TINY = (
    "task=listops_short",
    "task.max_length=30",
    "model=lru",
    "backbone.width=8",
    "backbone.depth=1",
)


def test_trainer_suite_compares_equal_work(monkeypatch, tmp_path, capsys):
    """Every side trains on the same batches to the same loss, or the suite ends in an error."""
    monkeypatch.setattr(trainer, "starts", lambda overrides: (Start(9.0, 3.0), Start(6.0, 1.0)))
    monkeypatch.setattr(trainer, "ROUNDS", 1)
    monkeypatch.setattr(suites, "GIVEN_STEPS", 3)
    checked = []
    for name in ("check_batches", "check_same_work"):
        real = getattr(trainer, name)
        monkeypatch.setattr(
            trainer, name, lambda *args, name=name, real=real: [checked.append(name), real(*args)]
        )
    words = [*TINY, "trainer.batch_size=4"]
    assert main(["bench", "trainer", *words, "--output", str(tmp_path / "t.json")]) == 0
    assert checked == ["check_batches", "check_same_work"]
    found = {m["what"]: m for m in json.loads((tmp_path / "t.json").read_text())["measurements"]}
    assert found["as given: trainer / bare steps"]["goal"] == "<= 1.05 x"
    assert found["as given: host-fed / bare steps"]["goal"] == "<= 1.10 x"
    assert all(m["value"] > 0 for m in found.values())
    assert found["start to first step, compilation apart"]["value"] == 6.0
    assert found["second start / first, compilation cache on"]["value"] == pytest.approx(2 / 3)

    class Other(trainer.HostFeed):
        def rows(self, step):
            return super().rows(step + 1)

    monkeypatch.setattr("lra.trainer.HostFeed", Other)
    with pytest.raises(LraError, match=r"the batches of steps 0 to \d+ differ"):
        trainer.compare(words, 3, 1)


def test_sides_that_trained_otherwise_are_told(tmp_path):
    states = {"steps": (0, 0, 0, 0, np.float32(6.0)), "scan": (0, 0, 0, 0, np.float32(6.2))}
    with pytest.raises(LraError, match="did not train alike"):
        trainer.check_same_work(states, {}, 3)


def test_compilation_within_compilation_counts_once():
    assert trainer.covered([(5.0, 6.0), (0.0, 3.0), (1.0, 2.0), (2.5, 4.0)]) == 5.0
    assert trainer.covered([]) == 0.0


@pytest.mark.slow
def test_a_start_is_measured_to_its_first_step():
    first, second = trainer.starts([*TINY, "trainer.batch_size=4"])
    assert 0 < first.compiling < first.total
    assert 0 < second.compiling < first.compiling


@pytest.mark.parametrize("words", [["ops", "model=lru"], ["data", "--fresh"]])
def test_words_of_another_suite_are_refused(words, capsys):
    assert main(["bench", *words]) == 2
    assert capsys.readouterr().err.startswith("lra: error: ")
