"""Does the table say what the records say, and nothing that they do not?"""

import csv
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lra.config.compose import upgrade_config
from lra.errors import ConfigError, LraError
from lra.report import formats, tables
from lra.report.formats import render
from lra.report.published import published_path, read_results
from lra.report.tables import comparison_table, make_table, summarise
from lra.runs.run_folder import RunFolder, load_records

ROOT = Path(__file__).resolve().parents[2]
LRA = ["listops", "text", "retrieval", "image", "pathfinder", "pathx"]


def a_record(accuracy, seed=0, **changes):
    """A finished run; `changes` go into the record, `config` into its config."""
    settings = {"seed": seed, **changes.pop("config", {})}
    val = changes.pop("val", accuracy)
    return {
        **{
            "schema": 1,
            "status": "finished",
            "task": "listops_short",
            "model": "stu",
            "protocol": "strict",
        },
        **{
            "seed": seed,
            "config": settings,
            "experiment": None,
            "step": 2000,
            "tuning_runs": 1,
            "commit": "abc1234",
        },
        "metrics": {
            "val": {"accuracy": val, "count": 2000},
            "test": {"accuracy": accuracy, "count": 2000},
        },
        "reference": {"majority": 0.17, "root_operator": 0.363},
        "data": {"source": "generated", "key": "aabbccddeeff"},
        "params": {"total": 12345},
        **changes,
    }


def cells(table, title):
    """{row: {task: text}} of the section whose title begins so."""
    return {
        row.name: row.cells
        for name, rows in table.sections
        if name.startswith(title)
        for row in rows
    }


def ours(records, **options):
    return cells(make_table(records, published="none", **options), "Ours")


def long_form(table):
    return list(csv.DictReader(io.StringIO(render(table, "csv"))))


# ---- statistics


def test_the_interval_is_the_bootstrap_of_the_mean():
    values = [60.0, 61.0, 62.0, 64.0, 68.0]
    found = summarise(values)
    rng = np.random.default_rng(1)
    means = sorted(np.mean([values[i] for i in rng.integers(5, size=5)]) for _ in range(20_000))
    low, high = means[500], means[-500]
    assert found["ci_low"] == pytest.approx(low, abs=0.15)
    assert found["ci_high"] == pytest.approx(high, abs=0.15)
    assert (found["n"], found["median"], found["mean"], found["min"], found["max"]) == (
        5,
        62,
        63,
        60,
        68,
    )
    assert found["std"] == pytest.approx(3.1622777)
    assert summarise(values) == found  # the same table every time


def test_what_the_remark_says_of_few_seeds_is_true():
    for values in ([1.0, 2.0], [1.0, 2.0, 5.0]):
        found = summarise(values)
        assert (found["ci_low"], found["ci_high"]) == (min(values), max(values))
    assert summarise([1.0, 2.0, 4.0, 5.0])["ci_low"] > 1.0
    assert summarise([1.0])["ci_low"] is None


def test_learning_is_beating_the_majority_by_three_standard_errors():
    line = 0.17 + 3 * (0.17 * 0.83 / 2000) ** 0.5
    assert tables.learned(a_record(line + 1e-6)) is True
    assert tables.learned(a_record(line - 1e-6)) is False
    assert tables.learned(a_record(0.9, reference=None)) is None


# ---- marks


def test_partial_data_is_a_row_of_its_own():
    partial = {"source": "release", "key": "aabbccddeeff", "partial": True}
    rows = ours([a_record(0.6), a_record(0.9, data=partial), a_record(0.7, model="lru")])
    assert {name: row["listops_short"] for name, row in rows.items()} == {
        "lru [generated]": "70.0 n=1",
        "stu [generated]": "60.0 n=1",
        "stu [release, partial data]": "90.0 n=1",
    }


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


# ---- our rows


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


def test_only_finished_runs_count_and_the_others_are_named():
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


def test_of_two_configurations_validation_decides_and_the_cell_says_so():
    good_on_val = [a_record(0.60, seed, val=0.62, config={"lr": 1}) for seed in range(2)]
    good_on_test = [a_record(0.70, seed, val=0.61, config={"lr": 2}) for seed in range(2)]
    table = make_table(good_on_test + good_on_val, published="none")
    assert cells(table, "Ours")["stu"]["listops_short"] == "60.0 [60.0, 60.0] n=2 [1]"
    assert table.footnotes == ["best of 2 configurations by validation"]


def test_settings_without_effect_do_not_split_the_seeds():
    trainers = [
        {"steps": 9},
        {"steps": 9, "progress": False, "compilation_cache": False, "call_seconds": 5.0},
    ]
    trainers.append({"steps": 9, "checkpoint_every": 3, "eval_batch_size": 8})
    table = make_table(
        [a_record(0.6, i, config={"trainer": t}) for i, t in enumerate(trainers)], published="none"
    )
    assert cells(table, "Ours")["stu"]["listops_short"] == "60.0 [60.0, 60.0] n=3"
    longer = [a_record(0.6, i, config={"trainer": {"steps": 9 + i}}) for i in range(2)]
    assert make_table(longer, published="none").footnotes == [
        "best of 2 configurations by validation"
    ]


def test_a_key_that_is_new_since_is_no_other_configuration():
    old = [r for r in load_records([ROOT / "results" / "runs"]) if r["model"] == "lru"]
    config = upgrade_config(old[0]["config"])
    assert "ema" in config["optim"]
    assert "ema" not in old[0]["config"]["optim"]
    assert config["backbone"]["precision"] == "float32"  # which refers to another key
    table = make_table(
        [*old, old[0] | {"seed": 99, "config": config | {"seed": 99}}], published="none"
    )
    assert f"n={len(old) + 1}" in cells(table, "Ours")["lru"]["listops_short"]


def test_tuning_and_repeated_seeds_are_owned_up_to():
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


def test_choosing_tasks_and_models():
    records = [a_record(0.6), a_record(0.7, task="text"), a_record(0.8, model="lru")]
    assert ours(records, tasks=["text", "pathx"]) == {"stu": {"text": "70.0 n=1"}}
    assert list(make_table(records, tasks=["text", "pathx"]).columns) == ["text", "pathx"]
    assert set(ours(records, models=["lru"])) == {"lru"}
    assert ours(records, models=["lru"], metric="val") == {"lru": {"listops_short": "80.0 n=1"}}


def test_reference_lines_are_the_records_own():
    table = make_table(
        [a_record(0.6), a_record(0.7, task="text", reference={"majority": 0.5})], published="none"
    )
    assert cells(table, "Reference") == {
        "majority": {"listops_short": "17.0", "text": "50.0"},
        "root operator": {"listops_short": "36.3"},
    }


# ---- the numbers of others


def test_published_numbers_are_all_sourced_and_readable():
    rows = read_results(published_path())
    assert len(rows) > 500
    assert all(row["source"] for row in rows)
    assert all(row["accuracy"] == "FAIL" or 0 <= float(row["accuracy"]) <= 100 for row in rows)
    keys = Counter((row["model"], row["variant"], row["task"], row["source"]) for row in rows)
    assert max(keys.values()) == 1
    tasks = list(dict.fromkeys(row["task"] for row in rows))  # whose order is that of the columns
    assert tasks == [*LRA, "average", "scifar"]
    assert {row["trust"] for row in rows} == {"primary", "quoted", "low"}
    assert {row["featured"] for row in rows} == {"0", "1"}


def test_the_paper_this_project_reproduces_reads_right():
    rows = [r for r in read_results(published_path()) if r["featured"] == "1"]
    found = {(r["model"], r["variant"], r["task"]): r["accuracy"] for r in rows}
    assert found["STU", "eq4, K=24, no AR (App. Table 2)", "listops"] == "61.04"
    assert found["AR-STU", "k_y=2", "pathx"] == "90.49"
    assert found["AR-STU", "k_y=32", "image"] == "91.34"
    assert found["Transformer", "original LRA paper", "pathx"] == "FAIL"
    lru = {task: accuracy for (model, _, task), accuracy in found.items() if model == "LRU"}
    assert lru["scifar"] == "89.0"
    assert "image" not in lru  # the LRU paper's pictures are coloured
    assert 20 <= len({key[:2] for key in found}) <= 30


def test_published_rows_carry_their_source():
    table = make_table([a_record(0.6, task="listops")])
    (name,) = (name for name in cells(table, "Published") if name.startswith("STU"))
    number = int(name.rpartition("[")[2].rstrip("]"))
    assert table.footnotes[number - 1] == "arXiv 2312.06837v4, Table 2 p.24; median of 5 trials"
    assert cells(table, "Published")[name] == {"listops": "61.04"}
    assert len(cells(make_table([], published="all"), "Published")) > 60


def test_notes_that_hold_for_one_task_name_it():
    table = make_table([])
    (note,) = (note for note in table.footnotes if note.startswith("arXiv 2312.06837v4"))
    assert note.endswith(
        'median of 5 trials; image: "image" column is headed CIFAR; image: official code uses colour CIFAR-10'
    )


def test_a_tier_stands_beside_the_full_size_task():
    table = make_table([a_record(0.6)])
    assert table.columns == {
        "listops_short": "listops_short",
        "listops": "listops (published, full size)",
    }
    assert all("listops_short" not in row for row in cells(table, "Published").values())
    both = make_table([a_record(0.6), a_record(0.6, task="listops")])
    assert both.columns == {"listops_short": "listops_short", "listops": "listops"}
    assert list(make_table([a_record(0.6)], published="none").columns) == ["listops_short"]


def test_columns_stand_in_the_customary_order_and_what_is_new_at_the_end():
    tasks = ["parity", "scifar", "text_short", "retrieval", "text", "listops"]
    table = make_table([a_record(0.6, task=task) for task in tasks], published="none")
    assert list(table.columns) == ["listops", "text_short", "text", "retrieval", "scifar", "parity"]
    (line,) = (line for line in table.remarks if line.startswith("Data: listops "))
    assert line.index("text_short") < line.index("scifar") < line.index("parity")


def test_a_readers_own_rows_stand_below(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeffmodel,task,accuracy,variant,source\nMyNet,text,91.5,big,my thesis\nMyNet,image,FAIL,big,my thesis\n"
    )
    table = make_table([a_record(0.6, task="text")], published="none", user_csv=[path])
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
        ("", "line 1: no column model"),
    ],
)
def test_a_bad_file_is_named_with_line_and_column(tmp_path, text, complaint):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(LraError, match=complaint) as caught:
        make_table([], user_csv=[path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unusable_requests_are_refused(tmp_path):
    with pytest.raises(LraError, match=r"cannot read .*nothing\.csv"):
        make_table([], user_csv=[tmp_path / "nothing.csv"])
    with pytest.raises(ConfigError, match="published=some"):
        make_table([], published="some")
    with pytest.raises(ConfigError, match="format=html"):
        render(make_table([]), "html")


# ---- formats


@pytest.fixture
def table(tmp_path):
    """A bit of everything that needs care."""
    path = tmp_path / "x.csv"
    path.write_text("model,task,accuracy,source\nA_b & 5%|c,text,90.40,a_b~c\\d [red]\n")
    records = [a_record(x, seed, task="text") for seed, x in enumerate([0.6, 0.61, 0.62])]
    return make_table([*records, a_record(0.5, task="text", protocol="s4")], user_csv=[path])


def test_terminal_keeps_brackets_and_fits_its_width(table):
    text = render(table, width=100)
    for part in (
        "stu [s4]",
        "61.0 [60.0, 62.0] n=3",
        "A_b & 5%|c [",
        r"a_b~c\d [red]",
        "STU, eq4, K=24, no AR (App. Table 2) [1]",
        "Published",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "\x1b[" in render(table, width=100, color=True)


def test_markdown_keeps_digits_and_pipes(table):
    lines = render(table, "markdown").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in rows} == {3}
    assert any("90.40 " in line and r"A_b & 5%\|c" in line for line in rows)
    assert any(line.startswith("| **Published**") for line in rows)
    assert any(line.startswith("- [1] arXiv") for line in lines)


def test_markdown_prints_published_digits_as_they_were():
    text = render(make_table([], tasks=["retrieval"]), "markdown")
    assert "| 90.40 " in text
    assert "| 89.9 " in text


def test_latex_escapes_what_latex_reads(table):
    text = render(table, "latex")
    assert r"A\_b \& 5\%|c" in text
    assert r"a\_b\textasciitilde{}c\textbackslash{}d" in text
    assert "accuracy in \\%" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    stripped = text
    for escaped in (r"\&", r"\%", r"\_", r"\#", r"\$"):
        stripped = stripped.replace(escaped, "")
    assert not set("%_#$") & set(stripped)


def test_csv_has_every_number_behind_a_cell(table):
    rows = long_form(table)
    assert tuple(rows[0]) == formats.LONG_FORM_COLUMNS
    (row,) = (r for r in rows if r["kind"] == "ours" and r["protocol"] == "strict")
    expected = {
        "task": "text",
        "model": "stu",
        "n": "3",
        "accuracy": "61.0",
        "ci_low": "60.0",
        "max": "62.0",
        "std": "1.0",
    }
    expected |= {
        "learned": "1.0",
        "params": "12345",
        "steps": "2000",
        "val_accuracy": "61.0",
        "source": "abc1234",
    }
    assert expected.items() <= row.items()
    (single,) = (r for r in rows if r["protocol"] == "s4")
    assert (single["ci_low"], single["std"]) == ("", "")
    assert Counter(r["kind"] for r in rows)["published"] >= 20
    (user,) = (r for r in rows if r["kind"] == "user")
    assert user["accuracy"] == "90.40"  # as printed


def test_no_runs_yet_still_shows_the_field_and_the_way(tmp_path, capsys):
    text = comparison_table([tmp_path], width=120)
    assert "61.04" in text
    assert "lra train" in text
    assert list(make_table([], published="none").columns) == list(make_table([]).columns) == LRA
    assert capsys.readouterr().err == ""


def test_from_folders_to_a_file(tmp_path):
    for seed in range(2):
        with RunFolder(tmp_path / "runs" / f"s{seed}") as folder:
            folder.write_record(a_record(0.6 + seed / 50, seed))
    output = tmp_path / "table.md"
    text = comparison_table([tmp_path / "runs"], published="none", format="markdown", output=output)
    assert output.read_text() == text
    assert "61.0 [60.0, 62.0] n=2" in text
    with pytest.raises(LraError, match=r"nowhere.*No such file"):
        comparison_table([tmp_path / "runs"], output=tmp_path / "nowhere" / "table.md")


def test_the_terminal_table_needs_no_pandas():
    code = "import sys; from lra.report.tables import comparison_table as t; t([]); sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
