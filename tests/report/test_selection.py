"""Selection of the runs behind a cell, and the notes about them."""

from pathlib import Path

import numpy as np
import pytest
from table_records import a_record, cells, long_form, ours

from lra.config.compose import upgrade_config
from lra.report import selection
from lra.report.formats import render
from lra.report.tables import configuration_table, make_table
from lra.runs.records import config_hash
from lra.runs.run_folder import RunFolder, load_records

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_has_learned_if_it_exceeds_the_majority_by_three_standard_errors():
    line = 0.17 + 3 * (0.17 * 0.83 / 2000) ** 0.5
    assert selection.has_learned(a_record(line + 1e-6)) is True
    assert selection.has_learned(a_record(line - 1e-6)) is False
    assert selection.has_learned(a_record(0.9, reference=None)) is None


def test_partial_data_is_a_row_of_its_own():
    partial = {"source": "release", "key": "aabbccddeeff", "partial": True}
    rows = ours([a_record(0.6), a_record(0.9, data=partial), a_record(0.7, model="lru")])
    assert {name: row["listops_short"] for name, row in rows.items()} == {
        "lru [generated]": "70.0 n=1",
        "stu [generated]": "60.0 n=1",
        "stu [release, partial data]": "90.0 n=1",
    }


def test_first_and_stratified_examples_are_rows_of_their_own():
    partial = {"source": "release", "key": "aabbccddeeff", "partial": True}
    stratified = a_record(0.9, 1, data=partial | {"sample": "stratified"})
    assert ours([a_record(0.6, data=partial), stratified]) == {
        "stu [partial data, first examples]": {"listops_short": "60.0 n=1"},
        "stu [partial data, stratified examples]": {"listops_short": "90.0 n=1"},
    }
    assert set(ours([stratified])) == {"stu [partial data]"}


@pytest.mark.parametrize(
    ("val", "rule", "marked"), [("a", "best", True), ("b", "best", False), ("a", "last", False)]
)
def test_weights_chosen_on_test_are_marked(val, rule, marked):
    data = {
        "source": "release",
        "key": "k",
        "splits": {"val": {"sha256": val}, "test": {"sha256": "a"}},
    }
    text = render(
        make_table([a_record(0.6, data=data, selection={"rule": rule})], published="none"),
        "markdown",
    )
    assert ("weights chosen on the test split" in text) == marked


def test_validation_selects_among_configurations_and_a_footnote_says_so():
    good_on_val = [a_record(0.60, seed, val=0.62, config={"lr": 1}) for seed in range(2)]
    good_on_test = [a_record(0.70, seed, val=0.61, config={"lr": 2}) for seed in range(2)]
    table = make_table(good_on_test + good_on_val, published="none")
    assert cells(table, "Ours")["stu"]["listops_short"] == "60.0 (60.0 to 60.0) n=2 [1]"
    assert table.footnotes == ["best of 2 configurations by validation: lr=1"]


def test_runs_that_competed_are_counted():
    """Three rates on one seed and two widths on two; a recorded number counts if it is larger."""
    records = [
        a_record(0.6, seed, config={"optim": {"lr": lr}, "backbone": {"width": width}})
        for lr, width, seed in [(1, 8, 0), (2, 8, 0), (3, 8, 0), (3, 8, 1), (3, 16, 0), (3, 16, 1)]
    ]
    row, *_ = long_form(make_table(records, published="none"))
    assert (row["tuning_runs"], row["settings"]) == ("6", "optim.lr=3 backbone.width=8")
    assert row["note"] == (
        "best of 4 configurations by validation: optim.lr=3 backbone.width=8; 2 with fewer than 2 "
        "seeds did not compete"
    )
    many = [record | {"tuning_runs": 40} for record in records]
    row, *_ = long_form(make_table(many, published="none"))
    assert row["tuning_runs"] == "40"
    assert "settings chosen by 40 runs" in row["note"]
    row, *_ = long_form(make_table(records[:1], published="none"))
    assert (row["tuning_runs"], row["settings"], row["note"]) == ("1", "", "")


def test_a_lucky_single_run_does_not_beat_several_seeds():
    lucky = [a_record(0.9, config={"lr": lr}) for lr in (1, 2, 3)]
    several = [a_record(0.6 + seed / 100, seed, config={"lr": 4}) for seed in range(5)]
    table = make_table([*lucky, *several], published="none")
    assert cells(table, "Ours")["stu"]["listops_short"] == "62.0 [60.0, 64.0] n=5 [1]"


def test_keys_without_effect_do_not_split_the_seeds():
    trainers = [
        {"steps": 9},
        {"steps": 9, "progress": False, "compilation_cache": False, "call_seconds": 5.0},
    ]
    trainers.append({"steps": 9, "checkpoint_every": 3, "eval_batch_size": 8})
    table = make_table(
        [a_record(0.6, i, config={"trainer": t}) for i, t in enumerate(trainers)], published="none"
    )
    assert cells(table, "Ours")["stu"]["listops_short"] == "60.0 (60.0 to 60.0) n=3"
    longer = [a_record(0.6, i, config={"trainer": {"steps": 9 + i}}) for i in range(2)]
    assert make_table(longer, published="none").footnotes == [
        "best of 2 configurations by validation: trainer.steps=9"
    ]


def test_a_key_newer_than_the_record_makes_no_other_configuration():
    old = load_records([ROOT / "tests" / "support" / "first_version"])
    config = upgrade_config(old[0]["config"])
    assert "ema" in config["optim"]
    assert "ema" not in old[0]["config"]["optim"]
    assert config["backbone"]["precision"] == "float32"  # refers to another key
    table = make_table(
        [*old, old[0] | {"seed": 99, "config": config | {"seed": 99}}], published="none"
    )
    assert f"n={len(old) + 1}" in cells(table, "Ours")["lru"]["listops_short"]


def test_sections_that_runs_share_are_hashed_once(monkeypatch):
    hashed = []

    def count(config, **options):
        hashed.append(config)
        return config_hash(config, **options)

    selection._section_hash.cache_clear()
    monkeypatch.setattr(selection, "config_hash", count)
    group = [
        a_record(0.6, seed, config={"task": {"name": "hashed once"}, "optim": {"lr": lr}})
        for seed in range(5)
        for lr in (1, 2)
    ]
    assert len(selection.configurations(group)) == 2
    assert len(hashed) == 3  # one task and two optimizers


def test_tuning_runs_and_repeated_seeds_have_footnotes():
    table = make_table(
        [a_record(0.6, tuning_runs=12), a_record(0.6, path="again")], published="none"
    )
    assert cells(table, "Ours")["stu"]["listops_short"] == "60.0 n=1 [1]"
    table = make_table([a_record(0.6, tuning_runs=12)], published="none")
    assert table.footnotes == ["settings chosen by 12 runs"]


def test_protocols_never_share_a_row():
    records = [a_record(0.6), a_record(0.9, protocol="s4"), a_record(0.5, model="lru")]
    assert set(ours(records)) == {"stu [strict]", "stu [s4]", "lru [strict]"}
    assert set(ours(records, protocol="s4")) == {"stu"}
    table = make_table(records, protocol="s4", published="none")
    assert table.sections[0][0] == "Ours, test accuracy in %, protocol s4"


def test_data_sources_and_data_never_share_a_row():
    release, other = (
        {"source": "release", "key": "11"},
        {"source": "generated", "key": "9988776655"},
    )
    assert ours([a_record(0.6), a_record(0.9, data=release)]) == {
        "stu [generated]": {"listops_short": "60.0 n=1"},
        "stu [release]": {"listops_short": "90.0 n=1"},
    }
    assert set(ours([a_record(0.6), a_record(0.9, data=other)])) == {
        "stu [data aabbccdd]",
        "stu [data 99887766]",
    }
    two_tasks = [a_record(0.6), a_record(0.9, task="image", data=release)]
    assert ours(two_tasks) == {"stu": {"image": "90.0 n=1", "listops_short": "60.0 n=1"}}


def test_a_command_that_is_no_shell_command_has_no_words():
    record = a_record(0.6, command="lra train optim.lr='")
    assert selection.command_words(record) == []
    (row,) = configuration_table([record]).sections[0][1]
    assert row.name == "defaults"


def test_a_run_whose_predictions_contradict_its_record_is_left_out(tmp_path, caplog):
    logits = np.eye(4, dtype=np.float32)
    for seed in range(2):
        with RunFolder(tmp_path / str(seed)) as folder:
            folder.write_record(a_record(0.75 if seed == 0 else 0.99, seed))
            folder.write_predictions(logits, np.array([0, 1, 2, 0]), np.arange(4))
    assert ours(load_records([tmp_path])) == {"stu": {"listops_short": "75.0 n=1"}}
    (line,) = caplog.messages
    assert "1/record.json states a test accuracy of 0.9900, but its predictions.npz gives" in line


def test_a_run_whose_predictions_are_damaged_is_left_out(tmp_path, caplog):
    with RunFolder(tmp_path) as folder:
        folder.write_record(a_record(0.99))
    assert "stu" in ours(load_records([tmp_path]))  # without predictions
    (tmp_path / "predictions.npz").write_bytes(b"PK")
    assert ours(load_records([tmp_path])) == {}
    (line,) = caplog.messages
    assert line.startswith(f"skipped: {tmp_path}/predictions.npz is damaged (")
