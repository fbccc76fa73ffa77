"""CSV files of results: the published numbers, user files, and their rows in a table."""

from collections import Counter

import pytest
from table_records import a_record, cells

from lra.errors import LraError
from lra.report.published import published_path, read_results
from lra.report.tables import make_table

LRA = ["listops", "text", "retrieval", "image", "scifar", "pathfinder", "pathx"]


def test_published_numbers_all_have_a_source_and_are_valid():
    rows = read_results(published_path())
    assert len(rows) > 770
    assert all(row["source"] for row in rows)
    assert all(row["accuracy"] == "FAIL" or 0 <= float(row["accuracy"]) <= 100 for row in rows)
    keys = Counter((row["model"], row["variant"], row["task"], row["source"]) for row in rows)
    assert max(keys.values()) == 1
    assert {row["task"] for row in rows} == {*LRA, "average", "path256", "path512"}
    assert {row["trust"] for row in rows} == {"primary", "quoted", "low"}
    assert {row["featured"] for row in rows} == {"0", "1"}


def test_published_numbers_of_the_stu_paper():
    rows = [r for r in read_results(published_path()) if r["featured"] == "1"]
    found = {(r["model"], r["variant"], r["task"]): r["accuracy"] for r in rows}
    assert found["STU", "eq4, K=24, no AR (App. Table 2)", "listops"] == "61.04"
    assert found["AR-STU", "k_y=2", "pathx"] == "90.49"
    assert found["AR-STU", "k_y=32", "scifar"] == "91.34"
    assert found["Transformer", "original LRA paper", "pathx"] == "FAIL"
    lru = {task: accuracy for (model, _, task), accuracy in found.items() if model == "LRU"}
    assert lru["scifar"] == "89.0"
    colour = {model for model, _, task in found if task == "image"} & {"LRU", "STU", "AR-STU"}
    assert not colour  # their papers have colour images
    everything = read_results(published_path())
    stu = {row["task"] for row in everything if row["model"] in ("STU", "AR-STU")}
    assert stu == {*LRA, "average"} - {"image"}
    assert {"MEGALODON", "RTF", "S5", "Mega"} <= {model for model, *_ in found}
    assert 26 <= len({key[:2] for key in found}) <= 36


def test_published_rows_have_their_source_as_a_footnote():
    table = make_table([a_record(0.6, task="listops")])
    (name,) = (name for name in cells(table, "Published") if name.startswith("STU"))
    number = int(name.rpartition("[")[2].rstrip("]"))
    assert table.footnotes[number - 1] == "arXiv 2312.06837v4, Table 2 p.24; median of 5 trials"
    assert cells(table, "Published")[name] == {"listops": "61.04"}
    assert len(cells(make_table([], published="all"), "Published")) > 60


def test_footnotes_cite_papers_where_one_is_known():
    rows = [row for row in read_results(published_path()) if row["featured"] == "1"]
    assert {row["source"][:6] for row in rows} == {"arXiv "}
    (s5,) = {row["source"] for row in rows if row["model"] == "S5" and not row["variant"]}
    assert s5 == "arXiv 2208.04933 (S5)"


def test_notes_about_one_task_name_it():
    table = make_table([], tasks=["listops", "scifar"])
    (note,) = (note for note in table.footnotes if note.startswith("arXiv 2312.06837v4"))
    assert "; scifar: headed CIFAR in a table that mixes: its S4 row is grey Image" in note


def test_published_standard_deviations_are_shown():
    (name,) = (n for n in cells(make_table([]), "Published") if n.startswith("S5 ["))
    assert cells(make_table([]), "Published")[name]["listops"] == "62.15 ±0.23"


def test_the_best_credible_number_of_each_task():
    table = make_table([], tasks=["pathfinder", "average"], published="best")
    ((name, row),) = cells(table, "Published, best of each task").items()
    assert name.startswith("MEGALODON, full attention [")  # 99.2 is of low trust
    assert row == {"pathfinder": "98.13", "average": "88.63"}


def test_rows_of_low_trust_are_shown_on_request():
    found = {which: make_table([], published=which) for which in ("all", "featured", "unverified")}
    shown = {which: len(table.long) for which, table in found.items()}
    assert shown["unverified"] > shown["all"] > shown["featured"]
    assert any(name.startswith("xLSTM") for name in cells(found["unverified"], "Published"))
    assert not any(name.startswith("xLSTM") for name in cells(found["all"], "Published"))


def test_value_beyond_the_limit_of_csv_is_one_line(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(f"model,task,accuracy\n{'x' * 140_000},listops,50\n")
    with pytest.raises(LraError, match="field larger than field limit"):
        read_results(path)


def test_user_results_have_a_section(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeffmodel,task,accuracy,variant,source\n"
        "MyNet,text,91.5,big,my thesis\nMyNet,image,FAIL,big,my thesis\n"
    )
    table = make_table([a_record(0.6, task="text")], published="none", csv=[path])
    assert cells(table, f"From {path}") == {"MyNet, big [1]": {"text": "91.5", "image": "FAIL"}}
    assert list(table.columns) == ["text", "image"]
    assert any(line.startswith("FAIL:") for line in table.remarks)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model,accuracy\nx,1\n", "line 1: no column task"),
        (
            "model,task,accuracy\na,text,60\nb,text,good\n",
            "line 3, column accuracy: found 'good'; expected percent",
        ),
        ("model,task,accuracy\na,text,0.61\n", "line 2, column accuracy: found '0.61'"),
        ("model,task,accuracy\na,text,nan\n", "line 2, column accuracy: found 'nan'"),
        ("model,task,accuracy\na,text,101\n", "line 2, column accuracy"),
        ("model,task,accuracy\n,text,60\n", "line 2, column model: empty"),
        ("model,task,accuracy\na,text\n", "line 2, column accuracy: found ''"),
        ("model,task,accuracy\na,text,60,b,c\n", "line 2: more values than columns"),
        ("model,task,accuracy,std\na,text,60,+-1\n", r"line 2, column std: found '\+-1'"),
        (
            "model,task,accuracy\na,text,60\nb,text,60\na,text,61\n",
            "line 4: a has a result on text in line 2 already; remove one, or give them another",
        ),
        ("", "line 1: no column model"),
    ],
)
def test_errors_name_file_line_and_column(tmp_path, text, complaint):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(LraError, match=complaint) as caught:
        make_table([], csv=[path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
