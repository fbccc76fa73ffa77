"""The output of `lra data info`, `verify` and `show`, and the sheet of pictures."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from configured_task import configured_task
from PIL import Image

from lra.data import inspect
from lra.data.inspect import (
    content_hashes,
    expected_hashes,
    info_lines,
    reference_line,
    show_lines,
    verify_lines,
    write_sheet,
)
from lra.data.store import prepare, settings_name
from lra.errors import DataError
from lra.tasks.base import Example, Task


class Letters(Task):
    """Pairs of words, read from a file that may be missing."""

    name, inputs, num_classes, seq_len, dual, source = "letters", "s4", 2, 4, True, "release"
    vocab = ("<pad>", *"abcd")
    same: Mapping[str, str] = {"val": "test"}

    def __init__(self, file):
        self.file = file

    def examples(self, split):
        for label in (0, 1):
            yield Example((np.array([1, 2]), np.array([3 + label])), label)

    def split_sizes(self):
        return {"train": 2, "val": 2, "test": 2}

    def fingerprint(self):
        return {}

    def source_files(self):
        if not self.file.exists():
            raise DataError(f"{self.file} is missing")
        return [self.file]

    def notes(self):
        return ["one word is spelt wrongly, as in the release"]

    def to_text(self, inputs):
        return "".join(self.vocab[i] for i in inputs)


class Dots(Task):
    """Pictures of 2 x 3 pixels in colour."""

    name, inputs, num_classes, seq_len, vocab = "dots", "pixels", 10, 6, None
    num_features, picture_shape = 3, (2, 3)

    def examples(self, split):
        for label in range(7):
            yield Example(np.full((6, 3), [label * 30, 0, 255], np.uint8), label)

    def split_sizes(self):
        return None


@pytest.fixture
def letters(tmp_path):
    (tmp_path / "letters.txt").write_text("ab c 0\nab d 1\n")
    return Letters(tmp_path / "letters.txt")


def test_info_before_and_after_preparation(letters, tmp_path):
    before = "\n".join(info_lines(letters, "s4", tmp_path))
    assert "letters, protocol s4: length 2 x 4, 5 tokens, 2 classes" in before
    assert "should have train 2, val 2, test 2" in before
    assert "val is test" in before
    assert f"source: release files in {tmp_path}" in before
    assert "not prepared; `lra data prepare letters`" in before
    store = prepare(letters, tmp_path)
    after = "\n".join(info_lines(letters, "s4", tmp_path))
    assert f"prepared: {store.path}" in after
    assert "test          2 examples; labels 50.0 50.0 %; length 1 to 2, mean 1.5" in after
    assert "to beat: majority 50.0 %" in after
    assert "note: one word is spelt wrongly" in after


def test_info_of_a_missing_source_says_so(letters, tmp_path):
    letters.file.unlink()
    text = "\n".join(info_lines(letters, "s4", tmp_path))
    assert "letters.txt is missing" in text
    assert "not prepared" in text


def test_verify_tells_counts_hashes_notes_and_overlaps(letters, tmp_path):
    lines = list(verify_lines(letters, prepare(letters, tmp_path)))
    text = "\n".join(line for line, _ in lines)
    assert not any(problem for _, problem in lines)
    assert "train         2 examples; labels 50.0 50.0 %" in text
    assert "val   is test," in text
    assert "source letters.txt: sha256" in text
    assert "note: one word" in text
    assert "equal examples: train/test 2" in text
    assert "pairs with a document that the other split has too: train/test 2" in text
    assert text.endswith("letters: sound")


def test_verify_finds_a_changed_manifest(letters, tmp_path):
    store = prepare(letters, tmp_path)
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["test"]["labels"] = [2, 0]
    store = type(store)(store.path, manifest, store.splits)
    problems = [line for line, problem in verify_lines(letters, store) if problem]
    assert problems == [
        "  NOT SOUND: test: labels is [1, 1], the manifest says [2, 0]",
        "letters: NOT sound",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "listops_short",
        "copy",
        "selective_copy",
        "adding",
        "induction_heads",
        "associative_recall",
    ],
)
def test_generated_data_equals_the_reference(name, tmp_path):
    """The generators give the recorded bytes; val and test do not depend on the size of train."""
    task = configured_task(name)
    known = expected_hashes(task)
    small = configured_task(name, sizes=task.sizes | {"train": 1})
    found = content_hashes(prepare(small, tmp_path))
    assert (found["val"], found["test"]) == (known["val"], known["test"])


def test_unknown_data_has_no_reference(letters, tmp_path):
    assert (
        reference_line(letters, prepare(letters, tmp_path))
        == "no reference is known for these settings"
    )


def test_show_prints_both_texts_without_padding(letters, tmp_path):
    split = prepare(letters, tmp_path).splits["train"]
    assert list(show_lines(letters, "train", split, 9)) == [
        "letters train 0 label 0: ab\n  | c",
        "letters train 1 label 1: ab\n  | d",
    ]


def test_long_row_is_folded_at_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    task = configured_task("listops")
    split = inspect.generated_rows(task, "train", 1, Path("nowhere"))
    (shown,) = show_lines(task, "train", split, 1)
    lines = shown.split("\n")
    assert 50 < max(map(len, lines)) <= 60
    assert all(line.startswith("  ") for line in lines[1:])
    text = task.to_text(split.inputs[0][: split.lengths[0]])
    assert shown.split() == f"listops train 0 label {split.labels[0]}: {text}".split()


def test_label_has_the_name_of_its_class():
    assert configured_task("image").label_text(np.uint8(3)) == "3 (cat)"
    assert configured_task("listops").label_text(np.uint8(3)) == "3"
    assert configured_task("copy").label_text(np.array([1, 2])) == "[1 2]"


def test_sheet_has_each_picture_in_its_place(tmp_path):
    split = prepare(Dots(), tmp_path).splits["train"]
    file = write_sheet(Dots(), split, 6, tmp_path / "new" / "dots.png")
    sheet = np.asarray(Image.open(file))
    scale = 160 // 3
    width, height = 3 * scale + 4, 2 * scale + 16
    assert sheet.shape == (2 * height, 5 * width, 3)
    corners = [sheet[row // 5 * height, row % 5 * width].tolist() for row in range(6)]
    assert corners == [[30 * row, 0, 255] for row in range(6)]
    assert sheet[height, width].tolist() == [255, 255, 255]  # a seventh was not asked for


def test_whole_data_that_differs_from_the_reference_is_not_sound(letters, tmp_path, monkeypatch):
    store = prepare(letters, tmp_path)
    known = {
        settings_name(letters): {
            name: entry["sha256"] for name, entry in store.manifest["splits"].items()
        }
    }
    file = tmp_path / "checksums.json"
    monkeypatch.setattr(inspect, "CHECKSUMS", file)
    file.write_text(json.dumps(known))
    assert reference_line(letters, store).startswith("content equals the reference")
    assert not any(problem for _, problem in verify_lines(letters, store))
    known[settings_name(letters)]["train"] = "other"
    file.write_text(json.dumps(known))
    problems = [line for line, problem in verify_lines(letters, store) if problem]
    assert problems[0].startswith("  content DIFFERS from the reference in train:")
    assert problems[1:] == ["letters: NOT sound"]
    for changes in ({"source": "tfds"}, {"partial": True}):  # others by right
        other = type(store)(store.path, {**store.manifest, **changes}, store.splits)
        assert not any(problem for _, problem in verify_lines(letters, other))


def test_source_changed_after_preparation_is_not_sound(letters, tmp_path):
    store = prepare(letters, tmp_path)
    letters.file.write_text("ab c 1\nab d 0\n")
    problems = [line for line, problem in verify_lines(letters, store) if problem]
    assert "source letters.txt has changed since the store was made" in problems[0]
