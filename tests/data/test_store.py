"""The packed store: content, names, building, damaged files."""

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tiny_listops import SIZES, listops

from lra.data import store as store_module
from lra.data.store import open_store, prepare, settings_key, store_path
from lra.data.verify import changed_sources, verify
from lra.errors import DataError, LraError
from lra.tasks.base import SPLITS, Example, Task


class Toy(Task):
    """`given` holds the (inputs, label) pairs of each split, `files` the claimed source files."""

    name, inputs, num_classes, seq_len = "toy", "s4", 3, 4

    def __init__(self, given, *, vocab_size=None, dual=False, sizes=None, files=None, **attributes):
        self.given, self.dual, self.sizes, self.files = given, dual, sizes, files
        for name, value in attributes.items():
            setattr(self, name, value)
        self.vocab = None if vocab_size is None else tuple(map(str, range(vocab_size)))

    def examples(self, split):
        return (Example(*pair) for pair in self.given.get(split, []))

    def split_sizes(self):
        return self.sizes

    def fingerprint(self):
        return {"toy": True}

    def source_files(self):
        if self.files and not all(file.exists() for file in self.files):
            raise DataError("toy's file is missing")
        return self.files or []


def ids(*values, dtype=np.int64):
    return np.array(values, dtype)


def left_in(data_root):
    """Files that a failed build left, except the empty lock files."""
    packed = Path(data_root) / "packed"
    return (
        [path.name for path in packed.iterdir() if path.suffix != ".lock"]
        if packed.exists()
        else []
    )


# --- Contents ---


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_store_holds_the_examples(tmp_path, inputs):
    task = listops({"inputs": inputs, "name": inputs})
    store = prepare(task, tmp_path)
    assert store.path == store_path(task, tmp_path)
    assert store.path.parent.name == "packed"
    assert store.path.name.startswith(f"listops_short-{inputs}-")
    for name in SPLITS:
        split = store.splits[name]
        assert isinstance(split.inputs, np.memmap)
        assert (split.inputs.dtype, split.inputs.shape) == (np.uint8, (SIZES[name], task.seq_len))
        for row, length, label, example in zip(
            split.inputs, split.lengths, split.labels, task.examples(name), strict=True
        ):
            assert np.array_equal(row[:length], example.inputs)
            assert not row[length:].any()
            assert label == example.label


def test_rows_of_a_store_can_be_exported_and_read_again(tmp_path):
    store = prepare(listops(), tmp_path)
    assert listops().export(store.splits, tmp_path) == tmp_path
    released = prepare(listops(data_root=tmp_path, source="release"), tmp_path)
    assert released.path != store.path
    for name in SPLITS:
        assert (
            released.manifest["splits"][name]["sha256"] == store.manifest["splits"][name]["sha256"]
        )
    assert [file["name"] for file in released.manifest["source_files"]] == [
        f"basic_{name}.tsv" for name in SPLITS
    ]
    assert all(len(file["sha256"]) == 64 for file in released.manifest["source_files"])


def test_manifest_describes_the_content(tmp_path):
    task = listops()
    manifest = prepare(task, tmp_path).manifest
    train = manifest["splits"]["train"]
    labels = [example.label for example in task.examples("train")]
    lengths = [len(example.inputs) for example in task.examples("train")]
    assert train["count"] == 60
    assert train["labels"] == [labels.count(label) for label in range(10)]
    assert train["lengths"] == {
        "min": min(lengths),
        "mean": round(sum(lengths) / 60, 3),
        "max": max(lengths),
    }
    assert (manifest["task"], manifest["inputs"], manifest["source"]) == (
        "listops_short",
        "s4",
        "generated",
    )
    assert tuple(manifest["vocab"]) == task.vocab
    assert manifest["fingerprint"]["max_args"] == 6
    assert manifest["key"].startswith(store_path(task, tmp_path).name.rsplit("-", 1)[1])


def test_reference_lines_of_an_older_store_are_computed_once(tmp_path, monkeypatch):
    """Without another name or other hashes; in memory if the folder cannot be written."""
    store = prepare(listops(), tmp_path)
    manifest, file = dict(store.manifest), store.path / "manifest.json"
    old = manifest | {"reference": {"majority": 0.1}}
    old["versions"] = {key: value for key, value in old["versions"].items() if key != "reference"}
    file.write_text(json.dumps(old))

    def refuse(*_):
        raise LraError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_atomically", refuse)
        assert prepare(listops(), tmp_path).manifest == manifest
    assert json.loads(file.read_text()) == json.loads(json.dumps(old))
    again = prepare(listops(), tmp_path)
    assert (again.path, again.manifest) == (store.path, manifest)
    assert not verify(again).problems
    monkeypatch.setattr(type(listops()), "reference_lines", refuse)
    assert prepare(listops(), tmp_path).manifest == json.loads(file.read_text()) == manifest


def test_pairs_have_two_rows_and_two_lengths(tmp_path):
    pairs = [((ids(1, 2, 3), ids(4)), 0), ((ids(5), ids(6, 7)), 2)]
    split = prepare(Toy({"train": pairs}, vocab_size=9, dual=True), tmp_path).splits["train"]
    assert split.inputs.tolist() == [[[1, 2, 3, 0], [4, 0, 0, 0]], [[5, 0, 0, 0], [6, 7, 0, 0]]]
    assert split.lengths.tolist() == [[3, 1], [1, 2]]
    assert split.labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (70_000, np.int32)]
)
def test_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    split = prepare(
        Toy({"train": [(ids(vocab_size - 1), 0)]}, vocab_size=vocab_size), tmp_path
    ).splits["train"]
    assert split.inputs.dtype == dtype
    assert split.inputs.tolist() == [[vocab_size - 1, 0, 0, 0]]


def test_values_keep_the_readers_type_and_zeros(tmp_path):
    split = prepare(Toy({"train": [(ids(0, 255, 0, dtype=np.uint8), 1)]}), tmp_path).splits["train"]
    assert (split.inputs.dtype, split.inputs.tolist(), split.lengths.tolist()) == (
        np.uint8,
        [[0, 255, 0, 0]],
        [3],
    )


def test_positions_of_several_values_have_an_axis_more(tmp_path):
    colours = ids(1, 2, 3, 4, 5, 6, dtype=np.uint8).reshape(2, 3)
    split = prepare(Toy({"train": [(colours, 0)]}, num_features=3), tmp_path).splits["train"]
    assert split.inputs.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0], [0, 0, 0]]]
    assert split.lengths.tolist() == [2]


@pytest.mark.parametrize("accuracy", [36.3, float("nan")])
def test_a_task_whose_reference_line_is_no_fraction_makes_no_store(tmp_path, accuracy):
    given = {"train": [(ids(1), 0)], "test": [(ids(1), 0)]}
    toy = Toy(given, reference_lines=lambda splits: {"majority": accuracy})
    with pytest.raises(DataError, match=rf"^toy: reference_lines gives majority={accuracy}, expec"):
        prepare(toy, tmp_path)
    assert not list((tmp_path / "packed").glob("[!.]*"))


def test_several_labels_an_example(tmp_path):
    given = {
        "train": [(ids(1, 2), ids(0, 2)), (ids(3, 4), ids(2, 2))],
        "test": [(ids(1), ids(2, 0))],
    }
    store = prepare(Toy(given, num_targets=2), tmp_path)
    assert store.splits["train"].labels.tolist() == [[0, 2], [2, 2]]
    assert store.manifest["splits"]["train"]["labels"] == [1, 0, 3]
    assert store.manifest["reference"] == {"majority": 0.5}
    with pytest.raises(ValueError, match="label"):
        prepare(Toy({"train": [(ids(1), ids(0, 3))]}, num_targets=2), tmp_path / "other")


def test_split_under_a_second_name_is_stored_once(tmp_path):
    given = {"train": [(ids(1), 0)], "test": [(ids(2), 1), (ids(1), 2)]}
    store = prepare(Toy(given, same={"val": "test"}), tmp_path)
    assert store.splits["val"] is store.splits["test"]
    assert store.manifest["splits"]["val"]["count"] == 2
    assert sorted(path.name for path in store.path.glob("*.inputs.npy")) == [
        "test.inputs.npy",
        "train.inputs.npy",
    ]
    assert verify(store).overlaps == {"train/test": 1}


def test_split_without_examples_is_empty(tmp_path):
    store = prepare(Toy({"train": [(ids(1), 0)]}, vocab_size=9), tmp_path)
    assert store.splits["val"].inputs.shape == (0, 4)
    assert verify(store).problems == ()


# --- Keys ---


def test_protocols_with_the_same_inputs_share_a_store():
    assert settings_key(listops({"inputs": "s4", "name": "s4"})) == settings_key(listops())


def test_versions_change_the_key(monkeypatch):
    before, task = settings_key(listops()), listops()
    task.reader_version += 1
    assert settings_key(task) != before
    monkeypatch.setattr(store_module, "STORE_VERSION", 99)
    assert settings_key(listops()) != before


# --- Building ---


def test_second_call_opens_and_does_not_build(tmp_path, monkeypatch):
    calls = []
    task = listops()
    prepare(task, tmp_path, on_progress=lambda *call: calls.append(call))
    assert calls == [("train", 60, 60), ("val", 20, 20), ("test", 30, 30)]
    monkeypatch.setattr(task, "examples", None)
    monkeypatch.setattr(
        store_module, "_build_locked", None
    )  # not even the lock: data_root may be read-only by then
    started = time.perf_counter()
    prepare(task, tmp_path)
    assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("reader")])
def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch, error):
    def examples(split):
        yield Example(ids(1), 0)
        raise error

    task = Toy({}, vocab_size=9)
    monkeypatch.setattr(task, "examples", examples)
    with pytest.raises(type(error)):
        prepare(task, tmp_path)
    assert left_in(tmp_path) == []


def test_too_few_examples_are_taken_only_when_asked(tmp_path):
    """A partial store has another name, and is opened only with `allow_partial`."""
    task = Toy(
        {name: [(ids(1), 0)] for name in SPLITS},
        vocab_size=9,
        sizes={"train": 3, "val": 1, "test": 1},
    )
    with pytest.raises(
        DataError,
        match="1 examples in train, expected 3; data.allow_partial=true .* takes what is there",
    ):
        prepare(task, tmp_path)
    store = prepare(task, tmp_path, allow_partial=True)
    assert store.manifest["partial"]
    assert store.path.name.endswith("-partial")
    assert prepare(task, tmp_path, allow_partial=True).path == store.path
    with pytest.raises(
        DataError, match=r"only a partial store is prepared, .*data\.allow_partial=true"
    ):
        prepare(task, tmp_path)
    assert left_in(tmp_path) == [store.path.name]


def test_whole_data_is_no_partial_store(tmp_path):
    task = Toy(
        {name: [(ids(1), 0)] for name in SPLITS}, vocab_size=9, sizes=dict.fromkeys(SPLITS, 1)
    )
    store = prepare(task, tmp_path, allow_partial=True)
    assert not store.manifest["partial"]
    assert prepare(task, tmp_path).path == store.path


@pytest.mark.parametrize("found", [0, 4])
def test_none_or_too_many_are_refused_with_allow_partial(tmp_path, found):
    given = {"train": [(ids(1), 0)] * found, "val": [(ids(1), 0)], "test": [(ids(1), 0)]}
    with pytest.raises(DataError, match=f"{found} examples in train, expected 3$"):
        prepare(
            Toy(given, vocab_size=9, sizes={"train": 3, "val": 1, "test": 1}),
            tmp_path,
            allow_partial=True,
        )


def test_changed_source_is_another_store(tmp_path):
    file = tmp_path / "source.txt"
    file.write_text("one")
    task = Toy({"train": [(ids(1), 0)]}, vocab_size=9, files=[file])
    first = prepare(task, tmp_path)
    assert first.manifest["source_files"] == [
        {
            "name": "source.txt",
            "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
        }
    ]
    file.write_text("two!")
    assert store_path(task, tmp_path) != first.path


def test_copied_sources_do_not_make_a_second_copy(tmp_path):
    """Other times with the same content: the new name is a link to the existing store."""
    file = tmp_path / "source.txt"
    file.write_text("one")
    task = Toy({"train": [(ids(1), 0)]}, vocab_size=9, files=[file])
    first = prepare(task, tmp_path).path
    os.utime(file, ns=(1, 1))
    second = prepare(task, tmp_path).path
    assert second != first
    assert second.resolve() == first.resolve()
    assert verify(open_store(second)).problems == ()
    shutil.rmtree(first)
    assert not prepare(task, tmp_path).path.is_symlink()


def test_changed_content_is_no_link(tmp_path):
    file = tmp_path / "source.txt"
    file.write_text("one")
    task = Toy({"train": [(ids(1), 0)]}, vocab_size=9, files=[file])
    first = prepare(task, tmp_path).path
    os.utime(file, ns=(1, 1))
    task.given = {"train": [(ids(2), 0)]}
    second = prepare(task, tmp_path)
    assert second.path.resolve() != first
    assert second.splits["train"].inputs[0, 0] == 2


def test_changed_sources_are_found(tmp_path):
    """Even where size and time are as before."""
    file = tmp_path / "source.txt"
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    task = Toy({"train": [(ids(1), 0)]}, vocab_size=9, files=[file])
    store = prepare(task, tmp_path)
    assert changed_sources(task, store) == []
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert prepare(task, tmp_path).path == store.path
    assert changed_sources(task, store) == ["source.txt"]
    file.unlink()
    assert changed_sources(task, store) == []


def test_waiting_for_another_process_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.05)
    lock = FileLock(tmp_path / "packed" / f".{store_path(listops(), tmp_path).name}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True)
    said = []

    def on_progress(what, done, total):
        if "waiting" in what:
            said.append(what)
            lock.release()

    with lock.acquire():
        prepare(listops(), tmp_path, on_progress=on_progress)
    assert said == ["(another process prepares it: waiting)"]


def test_store_outlives_its_sources(tmp_path):
    file = tmp_path / "source.txt"
    file.write_text("one")
    task = Toy({"train": [(ids(1), 0)]}, vocab_size=9, files=[file])
    path = prepare(task, tmp_path).path
    file.unlink()
    assert prepare(task, tmp_path).path == path
    with pytest.raises(DataError, match="file is missing"):
        prepare(task, tmp_path / "elsewhere")


def test_missing_sources_are_fetched(tmp_path, monkeypatch):
    file = tmp_path / "source.txt"
    task = Toy({"train": [(ids(1), 0)]}, vocab_size=9, files=[file])
    asked = []

    def fetch(*, download, on_progress):
        asked.append(download)
        file.write_text("fetched")

    monkeypatch.setattr(task, "fetch", fetch)
    assert (
        prepare(task, tmp_path, download=True).manifest["source_files"][0]["name"] == "source.txt"
    )
    prepare(task, tmp_path)
    assert asked == [True]


@pytest.mark.parametrize("place", ["_sync_file", "describe_split", "sync_folder"])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, place):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, place, full)
    with pytest.raises(
        DataError,
        match=r"No space left on device .* free\); make room there or set another data\.root",
    ):
        prepare(listops(), tmp_path)
    assert left_in(tmp_path) == []


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "packed").write_text("a file in the way")
    with pytest.raises(
        DataError, match=r"packed: File exists; correct the path or set another data\.root"
    ):
        prepare(listops(), tmp_path)


@pytest.mark.parametrize(
    ("given", "sizes", "error", "message"),
    [
        ([(ids(1, 2, 3, 4, 5), 0)], None, DataError, r"length 5.*task\.seq_len=4"),
        ([(ids(1), 0)], {"train": 2}, DataError, "1 examples in train, expected 2"),
        ([(ids(9), 0)], None, ValueError, "outside the vocabulary of 9"),
        ([(ids(-1), 0)], None, ValueError, "outside the vocabulary of 9"),
        ([(ids(1), 3)], None, ValueError, "label 3"),
    ],
)
def test_wrong_examples_are_refused(tmp_path, given, sizes, error, message):
    with pytest.raises(error, match=message):
        prepare(Toy({"train": given}, vocab_size=9, sizes=sizes), tmp_path)
    assert left_in(tmp_path) == []


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    stale = tmp_path / "packed" / f".{store_path(listops(), tmp_path).name}.building-x"
    stale.mkdir(parents=True)
    (stale / "train.inputs.npy").write_bytes(b"half")
    prepare(listops(), tmp_path)
    assert left_in(tmp_path) == [store_path(listops(), tmp_path).name]


def test_two_callers_at_once_build_once(tmp_path, monkeypatch):
    """Threads stand for processes: the lock holds between any two file descriptors."""
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 60.0)
    built, stores = [], []

    def on_progress(split, done, total):
        built.append(split)
        time.sleep(0.05)

    def call():
        stores.append(prepare(listops(), tmp_path, on_progress=on_progress))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert [len(store.splits["test"]) for store in stores] == [30, 30]
    assert built == ["train", "val", "test"]


# --- Opening and checking ---


@pytest.mark.parametrize("array", ["inputs", "lengths", "labels"])
def test_truncated_file_is_refused(tmp_path, array):
    path = prepare(listops(), tmp_path).path
    file = path / f"val.{array}.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=rf"val\.{array}\.npy has .*`lra data prepare listops_short`"
    ):
        open_store(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "test.labels.npy").unlink(), "test.labels.npy has 0 bytes"),
        (lambda path: (path / "manifest.json").unlink(), "no packed store"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / "test.labels.npy").write_bytes(bytes(128 + 30)), "delete the folder"),
    ],
)
def test_damaged_store_is_refused(tmp_path, spoil, message):
    path = prepare(listops(), tmp_path).path
    spoil(path)
    with pytest.raises(DataError, match=message):
        open_store(path)


def test_other_store_version_is_refused(tmp_path):
    path = prepare(listops(), tmp_path).path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["versions"]["store"] = 0
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="store version 0"):
        open_store(path)


def test_sound_store_has_no_problems(tmp_path):
    report = verify(prepare(listops(), tmp_path))
    assert report.problems == ()
    assert report.overlaps == {"train/val": 0, "train/test": 0, "val/test": 0}


@pytest.mark.parametrize(
    ("array", "what"), [("inputs", "sha256"), ("lengths", "lengths"), ("labels", "labels")]
)
def test_changed_bytes_are_found(tmp_path, array, what):
    path = prepare(listops(), tmp_path).path
    file = path / f"train.{array}.npy"
    changed = np.load(file)
    changed.flat[-1] = (changed.flat[-1] + 1) % 10
    np.save(file, changed)
    problems = verify(open_store(path)).problems
    assert any(problem.startswith(f"train: {what} is") for problem in problems)
    assert any(problem.startswith("train: sha256 is") for problem in problems)


def test_shared_examples_are_counted(tmp_path):
    one, other, longer = (
        (ids(1, 2), 0),
        (ids(3), 1),
        (ids(1, 2, 0), 0),
    )  # the last differs by its length alone
    given = {"train": [one, other], "val": [longer], "test": [one, one, longer]}
    report = verify(prepare(Toy(given, vocab_size=9), tmp_path))
    assert report.overlaps == {"train/val": 0, "train/test": 2, "val/test": 1}
    assert report.problems == ()


def test_shared_documents_of_pairs_are_counted(tmp_path):
    a, b, c, d = (ids(i) for i in (1, 2, 3, 4))
    given = {
        "train": [((a, b), 0)],
        "val": [((c, d), 0)],
        "test": [((b, c), 1), ((d, d), 1), ((a, b), 0)],
    }
    report = verify(prepare(Toy(given, vocab_size=9, dual=True), tmp_path))
    assert report.overlaps == {"train/val": 0, "train/test": 1, "val/test": 0}
    assert report.documents == {"train/val": 0, "train/test": 2, "val/test": 2}


def test_store_can_be_moved(tmp_path):
    path = prepare(listops(), tmp_path).path
    moved = shutil.copytree(path, tmp_path / "elsewhere")
    assert verify(open_store(moved)).problems == ()
