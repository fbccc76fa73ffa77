"""The task interface: recorded arguments, and fingerprints that no argument escapes."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_listops
import tiny_pictures
import tiny_texts
from configured_task import CONF, configured_task
from deadline import deadline

from lra.data.store import prepare, settings_key
from lra.errors import ConfigError, DataError
from lra.tasks.base import SPLITS, Example, Task, check_sizes, permutation

TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
PROTOCOLS = sorted(path.stem for path in (CONF / "protocol").glob("*.yaml"))
SUPPLIED = ("protocol", "data_root")  # by the harness
WORDS = ("generated", "release", "easy", "hard")


def sources(task):
    return ("generated", "release") if "source" in task.arguments else (None,)


def variants(name, protocol, **changes):
    """The task with each of its sources."""
    for source in sources(configured_task(name, protocol)):
        chosen = {"source": source} if source else {}
        yield configured_task(name, protocol, **chosen, **changes)


def other_values(value):
    """Values to try in place of `value`; the task refuses some of them."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, 2 * value, value - 1, value // 2]
    if isinstance(value, list):
        return [[x + 1 for x in value]]
    if isinstance(value, dict):
        return [{key: x + 1 for key, x in value.items()}]
    return [10_000] if value is None else [f"{value}_2", *WORDS]


def with_other(task, key):
    """A task of the same class whose argument `key` has another valid value, or None."""
    for value in other_values(task.arguments[key]):
        if value == task.arguments[key]:
            continue
        try:
            return type(task)(**(task.arguments | {key: value}))
        except ConfigError:
            continue
    return None


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TASKS)
def test_every_argument_changes_the_fingerprint_unless_declared(name, protocol):
    for task in variants(name, protocol):
        counted = []
        for key in set(task.arguments) - {*SUPPLIED}:
            other = with_other(task, key)
            if other is None:  # no other value is valid without a change of a second argument
                assert key in task.fingerprint()
            elif settings_key(other) != settings_key(task):
                counted.append(key)
            else:
                assert key in task.unused_arguments()
        assert "name" in counted
        assert set(task.unused_arguments()) <= set(task.arguments)


def test_missing_sources_name_the_command_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    task = configured_task("text", "s4", tmp_path)
    with pytest.raises(
        DataError,
        match=rf"IMDB reviews: no folder aclImdb under {tmp_path}; run `lra data prepare text`",
    ):
        task.source_files()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A data root with a few examples of every publisher."""
    root = tmp_path_factory.mktemp("published")
    tiny_texts.imdb(root)
    tiny_texts.aan(root)
    tiny_pictures.cifar(root, per_batch=4)
    tiny_pictures.pathfinder(root, count=10, per_batch=10)
    task = tiny_listops.listops()
    task.export(prepare(task, root).splits, root / "listops-1000")
    return root


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["text", "scifar", "pathfinder", "listops_short"])
def test_unused_arguments_change_no_byte(name, protocol, published):
    """One task per class that declares unused arguments, in each of its variants."""
    small = {
        "pathfinder": {"sizes": {"train": 8, "val": 1, "test": 1}},
        "listops_short": {"sizes": tiny_listops.SIZES},
    }
    for task in variants(name, protocol, data_root=published, **small.get(name, {})):
        expected = stored(task)
        for key in task.unused_arguments():
            other = with_other(task, key)
            if settings_key(other) == settings_key(task):
                assert stored(other) == expected, key


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("text", "aclImdb/train/neg/0_1.txt"),
        ("retrieval", "lra_release/lra_release/tsv_data/new_aan_pairs.eval.tsv"),
        ("scifar", "cifar-10-batches-py/data_batch_2"),
        ("listops_short", "listops-1000/basic_val.tsv"),
    ],
)
def test_publishers_file_that_is_no_file_is_one_line(name, file, kind, published, tmp_path):
    root = shutil.copytree(published, tmp_path / "data", ignore=shutil.ignore_patterns("packed"))
    (root / file).unlink()
    make = {"pipe": os.mkfifo, "device": lambda x: x.symlink_to("/dev/null"), "folder": os.mkdir}
    make[kind](root / file)
    source = {"source": "release", "sizes": tiny_listops.SIZES} if name == "listops_short" else {}
    task = configured_task(name, data_root=root, **source)
    with deadline(10), pytest.raises(DataError, match=f"{Path(file).name}: is not a regular file"):
        prepare(task, root, allow_partial=True)


def stored(task):
    return [
        (np.asarray(example.inputs).tobytes(), example.label)
        for split in SPLITS
        for example in task.examples(split)
    ]


def test_every_class_with_unused_arguments_is_covered_above():
    covered = {
        type(configured_task(name)) for name in ("text", "scifar", "pathfinder", "listops_short")
    }
    for name in TASKS:
        for protocol in PROTOCOLS:
            for task in variants(name, protocol):
                assert type(task) in covered or not task.unused_arguments()


def test_a_new_argument_counts_by_default():
    class Base(Task):
        name, inputs, num_classes, seq_len, vocab = "new", "s4", 2, 1, None

        def __init__(self, protocol, width, *, depth=2):
            pass

        def examples(self, split):
            yield Example(np.zeros(1, np.uint8), 0)

        def split_sizes(self):
            return None

    class Derived(Base):
        def __init__(self, protocol, height):
            super().__init__(protocol, width=7)

    assert Base({}, 3).fingerprint() == {"width": 3, "depth": 2}
    assert Base({}, 3, depth=4).fingerprint() == {"width": 3, "depth": 4}
    assert Derived({}, 5).fingerprint() == {"height": 5}
    with pytest.raises(TypeError, match=r"__init__\(\) missing 1 required positional argument"):
        Base({})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 1, "test": 1}, "expected the number of examples of train, val, test"),
        ({"train": 1, "val": 1, "test": 1, "more": 1}, "expected the number of examples"),
        ({"train": 1, "val": 0, "test": 1}, r"task\.sizes\.val=0: expected 1 or more"),
        ({"train": 10**12, "val": 1, "test": 1}, r"train=1000000000000: expected at most 100,000"),
    ],
)
def test_sizes_that_are_not_those_of_the_splits_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        check_sizes(sizes)


def test_permutations_are_the_same_on_every_machine():
    """Golden: if it changes, the splits of CIFAR-10 and of the Pathfinder release change."""
    assert permutation(10, 0).tolist() == [1, 8, 2, 6, 9, 5, 7, 4, 3, 0]
    assert sorted(permutation(1000, 3)) == list(range(1000))
