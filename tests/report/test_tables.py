"""The comparison table: cells, columns, reference lines and remarks."""

import pytest
from table_records import a_record, cells, ours

from lra.errors import ConfigError, LraError
from lra.report.formats import render
from lra.report.tables import comparison_table, make_table
from lra.runs.run_folder import RunFolder

LRA = ["listops", "text", "retrieval", "image", "pathfinder", "pathx"]


def test_a_cell_is_median_interval_and_seeds():
    found = ours(
        [a_record(x, seed) for seed, x in enumerate([0.60, 0.62, 0.64])]
        + [a_record(0.5, model="lru")]
    )
    assert found == {
        "lru": {"listops_short": "50.0 n=1"},
        "stu": {"listops_short": "62.0 [60.0, 64.0] n=3"},
    }


def test_runs_that_did_not_learn_are_counted_in_the_cell():
    found = ours([a_record(x, seed) for seed, x in enumerate([0.17, 0.60, 0.61])])
    assert found["stu"]["listops_short"] == "60.0 [17.0, 61.0] n=3, 2 learned"


def test_only_finished_runs_are_in_cells_and_the_others_below():
    rest = [
        a_record(0.9, i, status=status, path=f"runs/{i}")
        for i, status in enumerate(["dead"] * 5 + ["diverged"])
    ]
    unscored = a_record(0.9, 7, metrics={"test": {"accuracy": None}}, path="runs/nan")
    table = make_table(
        [
            a_record(0.6),
            *rest,
            unscored,
            a_record(0.1, status="running", metrics=None, path="runs/now"),
        ]
    )
    assert cells(table, "Ours") == {"stu": {"listops_short": "60.0 n=1"}}
    (line,) = (line for line in table.remarks if line.startswith("Not counted"))
    assert "5 dead (runs/0, runs/1, runs/2, and 2 more)" in line
    for part in (
        "1 diverged (runs/5)",
        "1 finished without a score (runs/nan)",
        "1 running (runs/now)",
    ):
        assert part in line


def test_tasks_models_and_split_are_selected():
    records = [a_record(0.6), a_record(0.7, task="text"), a_record(0.8, model="lru")]
    assert ours(records, tasks=["text", "pathx"]) == {"stu": {"text": "70.0 n=1"}}
    assert list(make_table(records, tasks=["text", "pathx"]).columns) == ["text", "pathx"]
    assert set(ours(records, models=["lru"])) == {"lru"}
    assert ours(records, models=["lru"], metric="val") == {"lru": {"listops_short": "80.0 n=1"}}


def test_reference_lines_come_from_the_records():
    table = make_table(
        [a_record(0.6), a_record(0.7, task="text", reference={"majority": 0.5})], published="none"
    )
    assert cells(table, "Reference") == {
        "majority": {"listops_short": "17.0", "text": "50.0"},
        "root operator": {"listops_short": "36.3"},
    }


def test_a_short_tier_is_followed_by_its_full_size_task():
    table = make_table([a_record(0.6)])
    assert table.columns == {
        "listops_short": "listops_short",
        "listops": "listops (published, full size)",
    }
    assert all("listops_short" not in row for row in cells(table, "Published").values())
    both = make_table([a_record(0.6), a_record(0.6, task="listops")])
    assert both.columns == {"listops_short": "listops_short", "listops": "listops"}
    assert list(make_table([a_record(0.6)], published="none").columns) == ["listops_short"]


def test_columns_have_the_customary_order_and_new_tasks_come_last():
    tasks = ["parity", "scifar", "text_short", "retrieval", "text", "listops"]
    table = make_table([a_record(0.6, task=task) for task in tasks], published="none")
    assert list(table.columns) == ["listops", "text_short", "text", "retrieval", "scifar", "parity"]
    (line,) = (line for line in table.remarks if line.startswith("Data: listops "))
    assert line.index("text_short") < line.index("scifar") < line.index("parity")


def test_unknown_files_and_words_are_refused(tmp_path):
    with pytest.raises(LraError, match=r"cannot read .*nothing\.csv"):
        make_table([], csv=[tmp_path / "nothing.csv"])
    with pytest.raises(ConfigError, match="published=some"):
        make_table([], published="some")
    with pytest.raises(ConfigError, match="format=html"):
        render(make_table([]), "html")


def test_without_runs_the_table_shows_published_numbers_and_a_command(tmp_path, capsys):
    text = comparison_table([tmp_path])
    assert "61.04" in text
    assert "lra train" in text
    assert list(make_table([], published="none").columns) == list(make_table([]).columns) == LRA
    assert capsys.readouterr().err == ""


def test_a_table_of_folders_is_written_to_a_file(tmp_path):
    for seed in range(2):
        with RunFolder(tmp_path / "runs" / f"s{seed}") as folder:
            folder.write_record(a_record(0.6 + seed / 50, seed))
    output = tmp_path / "table.md"
    text = comparison_table([tmp_path / "runs"], published="none", format="markdown", output=output)
    assert output.read_text() == text
    assert "61.0 [60.0, 62.0] n=2" in text
    with pytest.raises(LraError, match=r"nowhere.*No such file"):
        comparison_table([tmp_path / "runs"], output=tmp_path / "nowhere" / "table.md")
