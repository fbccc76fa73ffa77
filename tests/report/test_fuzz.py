"""Wrong values in every field of a record, a metrics line or predictions.npz, in all commands.

A record is skipped with one line, or its run is shown; `lra eval` refuses it with one line. An
unexpected exception fails the test, because `main` turns only `LraError` into an exit code.
"""

import copy
import io
import json
import shutil
import zipfile
from contextlib import suppress

import numpy as np
import pytest

from lra.cli import main
from lra.config.build import model_builder
from lra.errors import LraError, RunFolderError
from lra.report.formats import render
from lra.report.plots import plot_learning_curves, validation_curve
from lra.report.saved_run import SavedRun
from lra.report.selection import select_runs
from lra.report.tables import make_table
from lra.runs.records import read_metrics, read_predictions
from lra.runs.run_folder import load_records

GONE = object()  # the field is missing
DEEP = "deep"
for _ in range(60):
    DEEP = [DEEP]
WRONG = [
    *(GONE, None, True, -1, 2.5, 10**25, float("inf"), "", DEEP),
    {"_target_": "os.system", "command": "false"},
    "\x1b]0;x\x07${oc.env:HOME}=|<b>$x_{$\n",
    "lra train optim.lr='",
    f"lra train {'a' * 300}=1",
    "a{99999999999}",  # no regular expression: `re` raises OverflowError
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


@pytest.mark.slow
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


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(text):
    header = f"{text}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def archive(stored, **changes):
    """The bytes of predictions.npz; a change is the bytes or the array of one of its files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        for name, content in (stored | changes).items():
            is_array = isinstance(content, np.ndarray)
            parts.writestr(f"{name}.npy", npy(content) if is_array else content)
    return file.getvalue()


def damaged_archives(stored):
    """Predictions that are refused, and bytes at random places, which may be anywhere."""
    start = "{'descr': '<f4', 'fortran_order': False, 'shape': "
    for text in ("(-4, 2)}", f"({10**30}, 2)}}", f"({10**12}, 10)}}", "(4, 2)"):
        yield archive(stored, logits=npy_header(start + text))
    for text in ("((((", "(" * 3000, "{}", "\x00"):
        yield archive(stored, logits=npy_header(text))
    yield from (archive(stored, logits=content) for content in (b"", b"abc"))
    for rows in (stored["rows"][::-1], np.roll(stored["rows"], 1), 0 * stored["rows"]):
        yield archive(stored, rows=rows.copy())
    yield archive(stored, rows=stored["rows"] - 1)
    yield archive({name: array[:0] for name, array in stored.items()})
    yield archive(stored, logits=stored["logits"][:, :0])
    yield archive(stored).replace(b".npy", b".xyz")
    yield archive(stored)[:-50]
    encrypted = bytearray(archive(stored))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := encrypted.find(signature, place + 1)) >= 0:
            encrypted[place + offset] |= 1
    yield bytes(encrypted)


def test_damaged_predictions_are_refused_in_one_line(trained_run, tmp_path, capsys):
    stored = read_predictions(trained_run)
    shutil.copy(trained_run / "record.json", tmp_path)
    path = tmp_path / "predictions.npz"
    for content in damaged_archives(stored):
        path.write_bytes(content)
        assert main(["eval", str(tmp_path)]) == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert "predictions.npz is damaged (" in line
        assert line.isprintable()
    sound, rng = archive(stored), np.random.default_rng(0)
    for place, value in zip(
        rng.integers(len(sound), size=200), rng.integers(256, size=200), strict=True
    ):
        content = bytearray(sound)
        content[place] = value
        path.write_bytes(content)
        with suppress(RunFolderError):
            read_predictions(tmp_path)


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
