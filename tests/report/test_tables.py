"""The comparison table: cells, columns, reference lines and remarks."""

import pytest
from table_records import a_record, cells, ours

from lra.errors import ConfigError, LraError
from lra.report import tables
from lra.report.formats import render
from lra.report.tables import comparison_table, make_table, summary_after_run
from lra.runs.run_folder import RunFolder

LRA = ["listops", "text", "retrieval", "image", "scifar", "pathfinder", "pathx"]


def test_a_cell_is_median_range_and_seeds():
    found = ours(
        [a_record(x, seed) for seed, x in enumerate([0.60, 0.62, 0.64])]
        + [a_record(0.5, model="lru")]
    )
    assert found == {
        "lru": {"listops_short": "50.0 n=1"},
        "stu": {"listops_short": "62.0 (60.0 to 64.0) n=3"},
    }


def test_five_seeds_have_an_interval_of_the_median_and_the_remarks_say_so():
    five = [a_record(0.60 + seed / 100, seed) for seed in range(5)]
    assert ours(five) == {"stu": {"listops_short": "62.0 [60.0, 64.0] n=5"}}
    three = [a_record(0.5, seed, model="lru") for seed in range(3)]
    line, error = make_table(five + three, published="none").remarks[:2]
    assert line == (
        "Ours: median over n seeds (lowest to highest seed) or [95 % interval of the median by the "
        "sign test; 93.75 % for n=5]."
    )
    assert "listops_short ±2.2 points (2,000 examples)" in error
    assert "interval" not in make_table(three, published="none").remarks[0]
    assert make_table(three[:1], published="none").remarks[0] == "Ours: median over n seeds."


def test_configurations_are_listed_with_what_differs(tmp_path):
    for lr, seed in [(1, 0), (1, 1), (2, 0)]:
        with RunFolder(tmp_path / f"{lr}-{seed}") as folder:
            folder.write_record(
                a_record(0.5 + lr / 10, seed, val=0.9, config={"optim": {"lr": lr}})
            )
    with RunFolder(tmp_path / "lru") as folder:
        command = "lra train task=listops_short model=lru optim.lr=3e-3 seed=0 resume=auto"
        folder.write_record(a_record(0.4, model="lru", command=command))
    text = comparison_table([tmp_path], configs=True, format="markdown")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:9]]
    assert [row for row in rows if row[1:]] == [
        ["**lru on listops_short**", "", "", ""],
        ["optim.lr=3e-3", "1 (0)", "40.0", "40.0 n=1"],
        ["**stu on listops_short**", "", "", ""],
        ["optim.lr=1", "2 (0 1)", "90.0", "60.0 (60.0 to 60.0) n=2"],
        ["optim.lr=2", "1 (0)", "90.0", "70.0 n=1"],
    ]
    assert text.startswith("| configuration")
    csv = comparison_table([tmp_path], configs=True, format="csv", models=["stu"])
    assert csv.count("configuration,listops_short,stu,,optim.lr=") == 2
    assert "no finished runs" in comparison_table([tmp_path / "none"], configs=True)


def test_a_run_ends_with_its_result_and_what_to_beat(tmp_path, monkeypatch):
    """The run, other records of its task, and the best published number."""
    data = {"source": "generated", "key": "aabbccddeeff"}
    others = {
        "runs/lru": a_record(0.5, model="lru"),
        "runs/text": a_record(0.5, model="lru", task="text"),
        "results/s5": a_record(0.45, model="s5", data=data),
        "results/other data": a_record(0.9, model="gru", data=data | {"key": "11"}),
        "results/other protocol": a_record(0.9, model="mega", protocol="s4"),
    }
    for name, record in others.items():
        with RunFolder(tmp_path / name) as folder:
            folder.write_record(record)
    monkeypatch.setattr(tables, "RECORDED", tmp_path / "results")
    text = summary_after_run(a_record(0.61234, 3), tmp_path / "runs")
    lines = [line.split() for line in text.splitlines()]
    assert ["stu,", "seed", "3", "61.23"] in lines
    assert ["lru", "50.0", "n=1"] in lines
    assert ["s5", "45.0", "n=1"] in lines
    assert not {"gru", "mega"} & {line[0] for line in lines if line}
    assert [line[0] for line in lines if line and line[-2:] == ["63.85", "±0.45"]] == ["B2S6,"]
    assert f"lra table {tmp_path / 'runs'} --task listops_short" in " ".join(text.split())
    assert len(lines) < 40 < len(comparison_table([tmp_path / "runs"]).splitlines())


def test_runs_that_did_not_learn_are_counted_in_the_cell():
    found = ours([a_record(x, seed) for seed, x in enumerate([0.17, 0.60, 0.61])])
    assert found["stu"]["listops_short"] == "60.0 (17.0 to 61.0) n=3, 2 learned"


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
    assert "61.0 (60.0 to 62.0) n=2" in text
    with pytest.raises(LraError, match=r"nowhere.*No such file"):
        comparison_table([tmp_path / "runs"], output=tmp_path / "nowhere" / "table.md")
