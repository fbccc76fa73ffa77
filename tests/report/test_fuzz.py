"""Wrong values in every field of a record or a metrics line, and missing fields, in all commands.

A record is skipped with one line, or its run is shown; `lra eval` refuses it with one line. An
unexpected exception fails the test, because `main` turns only `LraError` into an exit code.
"""

import copy
import json
import shutil

import pytest

from lra.cli import main
from lra.config.build import model_builder
from lra.errors import LraError, RunFolderError
from lra.report.formats import render
from lra.report.plots import plot_learning_curves, validation_curve
from lra.report.saved_run import SavedRun
from lra.report.selection import select_runs
from lra.report.tables import make_table
from lra.runs.records import read_metrics
from lra.runs.run_folder import load_records

GONE = object()  # the field is missing
DEEP = "deep"
for _ in range(60):
    DEEP = [DEEP]
WRONG = [
    *(GONE, None, True, -1, 2.5, 10**25, float("inf"), "", DEEP),
    {"_target_": "os.system", "command": "false"},
    "\x1b]0;x\x07${oc.env:HOME}=|<b>$x_{$\n",
]


def places(node, path=()):
    """The path of each value in a JSON object."""
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node if isinstance(node, list) else ())
    )
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(tree, path, value):
    node = tree = copy.deepcopy(tree)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    if value is GONE:
        del node[path[-1]]
    return tree


def text_of(value):
    return json.dumps(value).replace("Infinity", "1e999")


@pytest.fixture(scope="module")
def record(trained_run):
    record = json.loads((trained_run / "record.json").read_text())
    record["resumed_from"], record["damaged_checkpoints"] = [4], [4]
    record["stopped_early"] = {"step": 8, "reason": "none"}
    return record


@pytest.fixture(scope="module")
def mutants(record, tmp_path_factory):
    """A folder of runs, each with one wrong value; gives it and the number of runs."""
    root = tmp_path_factory.mktemp("mutants")
    cases = [(path, value) for path in places(record) for value in WRONG]
    assert len(cases) > 1500
    for number, (path, value) in enumerate(cases):
        folder = root / f"{number:04}"
        folder.mkdir()
        (folder / "record.json").write_text(text_of(replaced(record, path, value)))
    return root, len(cases)


def test_a_wrong_value_in_a_record_skips_it_with_a_line_or_shows_it(mutants, caplog):
    root, count = mutants
    records = load_records([root])
    assert len(caplog.messages) + len(records) == count
    assert all(line.startswith(f"skipped: {root}") for line in caplog.messages)
    assert not any(set(line) & {"\n", "\x1b"} for line in caplog.messages)
    assert count / 4 < len(records) < count
    for record in records[::3]:  # alone in its row, so that it is shown
        if record["status"] == "finished":
            select_runs([record])
    for metric, formats in (("test", ("terminal", "markdown")), ("val", ("latex", "csv"))):
        table = make_table(records, metric=metric)
        assert all(render(table, format) for format in formats)


def test_commands_over_wrong_records_end_as_documented(mutants, tmp_path, capsys):
    root, _ = mutants
    assert main(["table", str(root), "--output", str(tmp_path / "table.txt")]) == 0
    assert main(["plot", str(root), "--output", str(tmp_path / "curves.png")]) == 1  # no metrics
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("lra: ") and line.isprintable() for line in lines)


def test_a_wrong_value_in_a_record_is_refused_by_eval_or_has_no_effect(record, tmp_path):
    """Each field with one of the wrong values; without a checkpoint, no model runs."""
    codes = set()
    for number, path in enumerate(places(record)):
        content = replaced(record, path, WRONG[number % len(WRONG)])
        (tmp_path / "record.json").write_text(text_of(content))
        if path[0] != "config":
            codes.add(main(["eval", str(tmp_path)]))
            continue
        try:
            run = SavedRun(tmp_path)
            model_builder(run.cfg, run.task)
        except LraError as error:
            codes.add(error.exit_code)
    assert codes == {2, 4}


LINE = {"step": 8, "val/loss": 2.0, "val/accuracy": 0.5}


def test_a_wrong_value_in_a_metrics_line_leaves_out_the_curve(trained_run, tmp_path):
    sound = (trained_run / "metrics.jsonl").read_text()
    path, refused = tmp_path / "metrics.jsonl", []
    for key in LINE:
        for value in [*WRONG, 1.5]:
            path.write_text(sound + text_of(replaced(LINE, (key,), value)) + "\n")
            try:
                read_metrics(tmp_path)
            except RunFolderError as error:
                refused.append(str(error))
            validation_curve({"path": str(tmp_path)})
    assert len(refused) >= 20
    assert all(f"{path}, line {sound.count(chr(10)) + 1} " in line for line in refused)
    path.write_text(sound + "\x00\n[]\n")
    assert validation_curve({"path": str(tmp_path)}) is None


def test_names_and_reference_lines_of_others_are_drawn(record, trained_run, tmp_path):
    cases = [
        (path, value)
        for path in [
            ("task",),
            ("model",),
            ("protocol",),
            *((key,) for key in ("reference", "data")),
        ]
        for value in WRONG
    ]
    cases += [(("reference",), {"$x$\n": 0.5, "_": None})]
    for number, (path, value) in enumerate(cases):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "record.json").write_text(text_of(replaced(record, path, value)))
        shutil.copy(trained_run / "metrics.jsonl", folder)
    assert plot_learning_curves([tmp_path], tmp_path / "curves.svg").exists()
