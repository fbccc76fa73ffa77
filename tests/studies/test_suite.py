"""Suites: tuning by validation, skipped and failed runs, rules, status and table."""

import shutil
from pathlib import Path

import pytest
from table_records import a_record

from lra.errors import ConfigError, DataError, DivergedError, PreemptedError
from lra.report.formats import render
from lra.runs.run_folder import RunFolder
from lra.studies import suite as suites
from lra.studies.suite import Suite, select

SUITE = Suite(
    tasks=["listops_short", "image_short"],
    models=["lru", "gru"],
    train=["trainer.steps=5"],
    options={"gru": ["model.state_size=8"]},
    grid={"optim.lr": [0.001, 0.004], "optim.weight_decay": [0.0, 0.1]},
    seeds=[3, 4, 5],
)
# (validation, test) of each rate: validation prefers the rate with the lower test accuracy
SCORES = {"0.001": (0.6, 0.5), "0.004": (0.5, 0.9)}


@pytest.fixture
def started(monkeypatch):
    """Replaces training by records of `SCORES`; returns the words of the runs that start."""
    words_of_runs = []

    def train(words):
        typed = dict(word.split("=", 1) for word in words)
        keys = ("task", "model", "optim.lr", "optim.weight_decay", "seed")
        path = Path(typed["output.root"], "-".join(typed[key] for key in keys))
        val, test = SCORES[typed["optim.lr"]]
        optim = {"lr": float(typed["optim.lr"]), "weight_decay": float(typed["optim.weight_decay"])}
        record = a_record(
            test - 0.01 * int(typed["seed"]),
            int(typed["seed"]),
            val=val + 0.01 * optim["weight_decay"],
            task=typed["task"],
            model=typed["model"],
            config={"optim": optim},
            learned=True,
            time={"train_s": 1800.0},
        )
        with RunFolder(path) as run:
            if not run.read_record():
                words_of_runs.append(words)
                run.write_record(record)
        return record

    monkeypatch.setattr(suites.lra, "train", train)
    monkeypatch.setattr(suites, "RECORDED", Path("nothing"))
    return words_of_runs


def chosen(tmp_path, *words):
    return select(SUITE, "mine", [*words, f"output.root={tmp_path}"])


def test_validation_alone_chooses_the_setting_of_the_other_seeds(started, tmp_path):
    assert suites.run(SUITE, chosen(tmp_path, "model=lru", "task=listops_short")) == []
    assert len(started) == SUITE.runs_per_cell() == 6
    assert [word for words in started[:4] for word in words if "seed" in word] == ["seed=3"] * 4
    for words, seed in zip(started[4:], (4, 5), strict=True):
        assert {"optim.lr=0.001", "optim.weight_decay=0.1", f"seed={seed}"} <= {*words}
    assert all("trainer.steps=5" in words for words in started)


def test_a_second_start_makes_no_run_again(started, tmp_path):
    suites.run(SUITE, chosen(tmp_path))
    assert len(started) == 24
    assert sum("model.state_size=8" in words for words in started) == 12
    suites.run(SUITE, chosen(tmp_path))
    assert len(started) == 24


def test_a_failed_run_is_one_line_and_the_suite_goes_on(started, tmp_path, monkeypatch):
    train = suites.lra.train

    def fail(words):
        if "model=lru" in words and "optim.lr=0.001" in words:
            raise DataError("no file")
        return train(words)

    monkeypatch.setattr(suites.lra, "train", fail)
    failures = suites.run(SUITE, chosen(tmp_path, "task=listops_short"))
    assert len(failures) == 2
    assert all(line.endswith(": no file") and "optim.lr=0.001" in line for line in failures)
    assert len(started) == 2 + 6  # LRU waits for its other two points


def test_a_diverged_point_does_not_win_and_does_not_stop_the_cell(started, tmp_path, monkeypatch):
    train = suites.lra.train

    def diverge(words):
        if "optim.lr=0.001" in words:
            raise DivergedError("loss is nan")
        return train(words)

    monkeypatch.setattr(suites.lra, "train", diverge)
    suites.run(SUITE, chosen(tmp_path, "task=listops_short", "model=lru"))
    assert len(started) == 2 + 2
    assert all("optim.lr=0.004" in words for words in started)


def test_a_signal_ends_the_suite(started, tmp_path, monkeypatch):
    def stop(words):
        raise PreemptedError("SIGTERM")

    monkeypatch.setattr(suites.lra, "train", stop)
    with pytest.raises(PreemptedError):
        suites.run(SUITE, chosen(tmp_path))


def test_status_counts_the_runs_of_each_cell(started, tmp_path):
    suites.run(SUITE, chosen(tmp_path, "model=lru", "task=image_short"))
    text = render(suites.status(SUITE, chosen(tmp_path)), "markdown")
    assert "6 of 24 runs." in text
    (row,) = (line for line in text.splitlines() if line.startswith("| lru"))
    assert row.split("|")[2].strip() == "0 of 6"
    assert row.split("|")[3].strip() == "6 of 6"


def test_table_has_ranks_averages_and_missing_cells(started, tmp_path):
    suites.run(SUITE, chosen(tmp_path, "model=lru"))
    suites.run(SUITE, chosen(tmp_path, "model=gru", "task=image_short"))
    table = suites.make_suite_table(SUITE, chosen(tmp_path))
    rows = {row.name: row.cells for row in table.sections[0][1]}
    assert rows["gru"]["listops_short"] == "missing"
    assert "average" not in rows["gru"]
    assert rows["lru"]["average"].startswith("46.0 [45.0, 47.0]")
    assert rows["lru"]["rank"] == "1.00"
    assert rows["lru"]["learned"] == "6 of 6"
    assert rows["lru"]["hours"] == "3.0"
    assert any("best of 4 configurations by validation" in note for note in table.footnotes)


def test_a_cell_without_all_seeds_has_no_rank(started, tmp_path):
    found = chosen(tmp_path, "model=lru")
    suites.run(SUITE, found)
    (missing,) = found.folder.glob("image_short-lru-*-5")
    shutil.rmtree(missing)
    table = suites.make_suite_table(SUITE, found)
    (row,) = table.sections[0][1]
    assert "n=2" in row.cells["image_short"]
    assert "rank" not in row.cells


def test_reading_writes_nothing_and_unknown_rules_are_refused(started, tmp_path):
    found = chosen(tmp_path)
    suites.status(SUITE, found)
    assert not found.folder.exists()
    suites.run(SUITE, chosen(tmp_path, "model=lru", "task=listops_short"))
    (found.folder / "suite.yaml").unlink()
    with pytest.raises(ConfigError, match="other rules"):
        suites.status(SUITE, found)


def test_interval_of_the_average_resamples_the_seeds_of_each_task():
    low, high = suites.average_interval([[10.0] * 3, [20.0, 30.0, 40.0]])
    assert (low, high) == (15.0, 25.0)
    assert suites.average_interval([[10.0, 10.0], [20.0, 20.0]]) == (15.0, 15.0)


def test_runs_of_other_rules_are_refused(started, tmp_path):
    suites.run(SUITE, chosen(tmp_path, "model=lru", "task=listops_short"))
    other = Suite(SUITE.tasks, SUITE.models, SUITE.train, SUITE.options, SUITE.grid, seeds=[3])
    for action in (suites.run, suites.status, suites.make_suite_table):
        with pytest.raises(ConfigError, match=r"other rules.* set another output\.root"):
            action(other, chosen(tmp_path))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task=copy", "copy is no task of suite mine"),
        ("model=lur", "did you mean lru"),
        ("optim.lr=1", "changes the rules of suite mine"),
        ("trainer.steps=1", "changes the rules"),
        ("seed=1", "changes the rules"),
        ("model.param_count=5M", "changes the rules"),
    ],
)
def test_words_that_do_not_fit_are_refused(tmp_path, word, message):
    with pytest.raises(ConfigError, match=message):
        chosen(tmp_path, word)
    assert chosen(tmp_path, "trainer.progress=false").words == ["trainer.progress=false"]


def test_unknown_suite_is_one_line(lra_main):
    assert "pocket" in lra_main("suite", "list")
    with pytest.raises(ConfigError, match="did you mean pocket"):
        suites.load_suite("pokcet")


@pytest.mark.slow
def test_a_suite_trains_and_tunes(tmp_path, tiny):
    small = [word for word in tiny if not word.startswith(("task=", "output.root="))]
    suite = Suite(["listops_short"], ["lru"], small, {}, {"optim.lr": [0.001, 0.004]}, [0, 1])
    found = select(suite, "mine", ["tracker=none", f"output.root={tmp_path}"])
    assert suites.run(suite, found) == []
    text = render(suites.make_suite_table(suite, found), "markdown")
    assert "n=2" in text
    assert "best of 2 configurations" in text
