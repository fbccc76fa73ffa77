"""Tables as text for the terminal, Markdown, LaTeX and CSV."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from table_records import a_record, long_form

from lra.report import formats
from lra.report.formats import render
from lra.report.tables import make_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(tmp_path):
    """A table with every kind of section and with special characters."""
    path = tmp_path / "x.csv"
    path.write_text("model,task,accuracy,source\nA_b & 5%|c,text,90.40,a_b~c\\d [red]\n")
    records = [a_record(x, seed, task="text") for seed, x in enumerate([0.6, 0.61, 0.62])]
    return make_table([*records, a_record(0.5, task="text", protocol="s4")], csv=[path])


def test_terminal_keeps_brackets_and_fits_its_width(table):
    text = render(table, width=100)
    for part in (
        "stu [s4]",
        "61.0 (60.0 to 62.0) n=3",
        "A_b & 5%|c [",
        r"a_b~c\d [red]",
        "STU, eq4, K=24, no AR (App. Table 2) [",
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
        "ci_low": "",
        "min": "60.0",
        "examples": "2000",
        "test_error": "2.1357",
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


def test_the_terminal_table_needs_no_pandas():
    code = (
        "import sys; from lra.report.tables import comparison_table; comparison_table([]); "
        "sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


HOSTILE = {
    "model": "a\x1b]0;x\x07<img src=x>](http://x)\\|b",
    "experiment": "=cmd|' /C calc'!A0",
    "commit": "@SUM(1)",
    "task": "text\n| x",
}


@pytest.mark.parametrize("format", ["terminal", "markdown", "latex", "csv"])
def test_names_of_a_record_drive_no_terminal(format):
    text = render(make_table([a_record(0.5, **HOSTILE)]), format, width=300)
    assert not any(c < " " and c != "\n" for c in text)
    assert r"x1b]0;x" in text
    assert r"text\n" in text or r"text\textbackslash n" in text.replace("{}", " ")


def test_names_of_a_record_are_no_html_link_or_cell_in_markdown():
    text = render(make_table([a_record(0.5, **HOSTILE)], published="none"), "markdown")
    assert r"&lt;img src=x>]\(http://x)\\\|b" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {3}


def test_names_of_a_record_are_no_formulas_in_a_spreadsheet():
    (row, *_) = long_form(make_table([a_record(0.5, **HOSTILE)], published="none"))
    assert row["variant"] == "'=cmd|' /C calc'!A0"
    assert row["source"] == "'@SUM(1)"
