"""Retrieval: the release's files, both encodings, errors (copies by CSV readers above all)."""

import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_texts
from configured_task import configured_task

from lra.data.store import prepare, store_name
from lra.errors import ConfigError, DataError
from lra.tasks.retrieval import parse_row


def make_task(data_root="unused", inputs="s4", **changes):
    return configured_task("retrieval", {"inputs": inputs}, data_root, **changes)


@pytest.fixture
def aan(tmp_path):
    """A data root and the folder of the pairs in it."""
    return tmp_path, tiny_texts.aan(tmp_path)


# --- Encodings and splits ---


@pytest.mark.parametrize(("inputs", "vocabulary"), [("s4", 98), ("lra2020", 257)])
def test_vocabulary_and_length_are_the_protocols(inputs, vocabulary):
    task = make_task(inputs=inputs)
    assert len(set(task.vocab)) == len(task.vocab) == vocabulary
    assert (task.vocab[0], task.seq_len, task.num_classes, task.dual) == ("<pad>", 4000, 2, True)
    assert make_task(inputs=inputs, seq_len=300).seq_len == 300


def test_s4_ids_are_those_of_printable_ascii():
    vocab = make_task().vocab
    assert vocab[:3] == ("<pad>", "<unk>", "<eos>")
    assert vocab[3:] == tuple(chr(code) for code in range(32, 127))


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_rows_are_read_in_the_order_of_the_file(aan, inputs):
    data_root, folder = aan
    task = make_task(data_root, inputs)
    for split, name in (("train", "train"), ("val", "eval"), ("test", "test")):
        lines = (folder / f"new_aan_pairs.{name}.tsv").read_text().splitlines()
        expected = [(line.split("\t")[3:], int(line[0])) for line in lines]
        found = [
            ([task.to_text(ids) for ids in inputs], label) for inputs, label in task.examples(split)
        ]
        assert len(found) == tiny_texts.PAIRS[name]
        assert found == expected


def test_documents_are_cut_and_s4_ends_with_eos(aan):
    u, v = next(iter(make_task(aan[0], seq_len=10).examples("train"))).inputs
    assert len(u) == len(v) == 10
    assert u[-1] == v[-1] == 2
    assert make_task().to_text(u) == tiny_texts.document(0)[:9]
    u, _ = next(iter(make_task(aan[0], "lra2020", seq_len=10).examples("train"))).inputs
    assert (u - 1).astype(np.uint8).tobytes() == tiny_texts.document(0)[:10].encode()


def test_pair_reads_as_two_documents():
    task = make_task(inputs="lra2020")
    pair = np.array([[98, 99, 0], [100, 0, 0]], np.uint16)
    assert task.to_text(pair) == "ab\n--------\nc"


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_store_holds_the_pairs(aan, inputs):
    data_root, _ = aan
    with pytest.raises(DataError, match="24 examples in train.*expected 147,086"):
        prepare(make_task(data_root, inputs), data_root)
    store = prepare(make_task(data_root, inputs), data_root, allow_partial=True)
    assert {name: len(split) for name, split in store.splits.items()} == {
        "train": 24,
        "val": 8,
        "test": 8,
    }
    assert store.splits["test"].inputs.shape == (8, 2, 4000)
    assert store.manifest["source"] == "release"
    bag = "bag_of_bytes" if inputs == "lra2020" else "bag_of_characters"
    assert store.manifest["reference"] == {"majority": 0.5, bag: 1.0}  # equal letters or not


def test_published_counts_are_demanded():
    assert make_task().split_sizes() == {"train": 147_086, "val": 18_090, "test": 17_437}


def test_changed_file_and_other_settings_make_another_store(aan):
    data_root, folder = aan
    name = store_name(make_task(data_root))
    assert store_name(make_task(data_root)) == name
    assert (
        len(
            {
                store_name(make_task(data_root, **other))
                for other in ({"seq_len": 9}, {"inputs": "lra2020"})
            }
            - {name}
        )
        == 2
    )
    with open(folder / "new_aan_pairs.test.tsv", "a") as file:
        file.write("1.0\ta\tb\tc\td\n")
    assert store_name(make_task(data_root)) != name


# --- Notes and reference lines ---


def rows(*lines):
    return "".join("\t".join(line) + "\n" for line in lines)


def write(folder, part, *lines):
    (folder / f"new_aan_pairs.{part}.tsv").write_text(rows(*lines), encoding="utf-8")


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_notes_count_shared_documents_and_unknown_characters(aan, inputs):
    data_root, folder = aan
    write(
        folder,
        "train",
        ("1.0", "A", "B", "caf\u00e9", "x"),
        ("0.0", "C", "D", "y", "\u201cz\u201d"),
    )
    write(folder, "eval", ("1.0", "X", "Y", "x", "y"))
    write(
        folder,
        "test",
        ("1.0", "D", "A", "x", "y"),
        ("0", "E", "B", "x", "y"),
        ("0", "E", "F", "x", "y"),
    )
    task = make_task(data_root, inputs)
    for split in ("train", "val", "test", "test"):  # read again, counted once
        list(task.examples(split))
    shared, *unknown = task.notes()
    assert shared.startswith("2 of 3 rows of test")
    if inputs == "s4":
        assert unknown[0].startswith(
            "3 of 29 ids"
        )  # 17 characters and the end tokens of 12 documents
    else:
        assert unknown == []


def test_a_file_without_a_newline_at_its_end_is_noted(aan):
    data_root, folder = aan
    file = folder / "new_aan_pairs.eval.tsv"
    file.write_bytes(file.read_bytes()[:-5])
    task = make_task(data_root)
    for split in ("train", "val", "test", "val"):
        assert (
            len(list(task.examples(split))) == tiny_texts.PAIRS["eval" if split == "val" else split]
        )
    (note,) = [note for note in task.notes() if "newline" in note]
    assert note == f"{file}, row 8: no newline at its end, so it may be truncated"
    file.write_bytes(file.read_bytes().rpartition(b"\t")[0])  # cut off in the first text
    with pytest.raises(DataError, match=r"eval\.tsv, row 8: 4 columns"):
        list(task.examples("val"))


def test_archive_of_the_pairs_alone_is_taken(aan):
    data_root, folder = aan
    with tarfile.open(data_root / "tsv_data.tar.gz", "w:gz") as tar:
        tar.add(folder, "tsv_data")
    shutil.rmtree(data_root / "lra_release")
    (data_root / "lra_release.gz").write_bytes(b"not looked at")
    store = prepare(make_task(data_root), data_root, allow_partial=True)
    assert len(store.splits["train"]) == 24


def test_reference_lines_by_hand(monkeypatch):
    """The label depends on whether the documents agree, not on either alone."""
    monkeypatch.setattr("lra.tasks.retrieval.ROWS_PER_COUNT", 3)
    a, b = [10, 10, 10, 0], [11, 11, 0, 0]
    pairs = {(0, 0): 1, (0, 1): 0, (1, 0): 0, (1, 1): 1}
    inputs = np.array([[[a, b][i], [a, b][j]] for i, j in pairs] * 5, np.uint8)
    split = SimpleNamespace(inputs=inputs, labels=np.array([*pairs.values()] * 5, np.uint8))
    test = SimpleNamespace(inputs=inputs[:3], labels=split.labels[:3])
    lines = make_task().reference_lines({"train": split, "test": test})
    assert lines == {"majority": pytest.approx(2 / 3), "bag_of_characters": 1.0}


# --- Refusals ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1.0\ta\tb\tone text", "4 columns, expected 5"),
        (b"1.0\ta\tb\tone\ttwo\tthree", "6 columns, expected 5"),
        (b"", "1 columns, expected 5"),
        (b"label\tid1\tid2\ttext1\ttext2", "found the label 'label'"),
        (b"2.0\ta\tb\tc\td", "found the label '2.0'"),
        (b"nan\ta\tb\tc\td", "found the label 'nan'"),
        (b'"1.0"\t"a"\t"b"\t"c"\t"d"', "found the label '\"1.0\"'.*CSV reader"),
        (b"1.0\ta\tb\t\td", "text1 is empty"),
        (b'1.0\ta\tb\tc\t"an ""odd"" text"', "text2 is in quotes.*CSV reader"),
    ],
)
def test_malformed_row_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_row(line)


@pytest.mark.parametrize(
    "text", [b'"', b'""', b'"a', b'a"', b'"a" and "b"', b'"a "" b" "', b'say ""x""']
)
def test_quote_is_an_ordinary_character(text):
    assert parse_row(b"0.0\ta\tb\t" + text + b"\tother").texts == (text, b"other")


def test_copy_by_a_csv_reader_is_refused_and_named(aan):
    """The rows of the tiny file hold open quotes, so pandas joins them."""
    data_root, folder = aan
    file = folder / "new_aan_pairs.test.tsv"
    write(
        folder,
        "test",
        ("1.0", "A", "B", '"open', "x"),
        ("0.0", "C", "D", "y", 'close" z'),
        ("0.0", "E", "F", "y", "z"),
    )
    assert len(list(make_task(data_root).examples("test"))) == 3
    frame = pd.read_csv(
        file, sep="\t", header=None, names=["label", "id1", "id2", "text1", "text2"]
    )
    assert len(frame) == 2
    frame.to_csv(file, sep="\t", header=False, index=False)
    with pytest.raises(
        DataError,
        match=r"test\.tsv, row 2: 6 columns.*CSV reader with default quoting.*lra_release",
    ):
        list(make_task(data_root).examples("test"))


def test_bytes_that_are_no_text_are_refused_with_their_row(aan):
    data_root, folder = aan
    with open(folder / "new_aan_pairs.test.tsv", "ab") as file:
        file.write(b"1.0\ta\tb\tfine\tcaf\xe9 au lait\n")
    for inputs in ("s4", "lra2020"):
        with pytest.raises(
            DataError, match=r"test\.tsv, row 9: byte 0xe9 at 3 of a text is not UTF-8"
        ):
            list(make_task(data_root, inputs).examples("test"))


def test_line_ends_of_windows_are_taken(aan):
    data_root, folder = aan
    file = folder / "new_aan_pairs.test.tsv"
    before = [example.inputs[1].tolist() for example in make_task(data_root).examples("test")]
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert [
        example.inputs[1].tolist() for example in make_task(data_root).examples("test")
    ] == before


def test_missing_pairs_say_what_and_where(aan):
    data_root, folder = aan
    (folder / "new_aan_pairs.eval.tsv").unlink()
    task = make_task(data_root)
    with pytest.raises(DataError, match="lra data prepare retrieval"):
        task.source_files()
    with pytest.raises(DataError, match=r"new_aan_pairs\.eval\.tsv.*lra_release\.gz"):
        prepare(task, data_root)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"inputs": "s5"}, "protocol.inputs=s5"), ({"seq_len": 1}, r"task\.seq_len")],
)
def test_invalid_values_are_refused(changes, key):
    with pytest.raises(ConfigError, match=key):
        make_task(**changes)
