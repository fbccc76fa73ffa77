"""The small tasks: rows, answers derived independently from their text, statistics, errors."""

import hashlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from configured_task import configured_task

import lra.tasks.synthetic as synthetic
from lra.data.store import prepare
from lra.errors import ConfigError
from lra.tasks.base import SPLITS
from lra.tasks.synthetic import most_frequent

SMALL = {
    "copy": {"categories": 12, "copy_len": 3, "blank_len": 4},
    "selective_copy": {"categories": 12, "copy_len": 3, "blank_len": 4},
    "adding": {"length": 9},
    "induction_heads": {"num_tokens": 5, "length": 8},
    "associative_recall": {"num_pairs": 4, "num_keys": 6, "num_values": 3},
}
SIZES = {"train": 50, "val": 20, "test": 30}


def make(name, inputs="s4", **changes):
    return configured_task(name, {"inputs": inputs}, **({"sizes": SIZES} | changes))


def arguments_of(task):
    return {key: task.arguments[key] for key in SMALL[task.name]}


def arrays(task, split="train"):
    examples = list(task.examples(split))
    return np.stack([example.inputs for example in examples]), np.array(
        [example.label for example in examples]
    )


def many(name, **changes):
    """Ids and labels of 4,000 rows, for statistics."""
    return arrays(make(name, **SMALL[name] | {"sizes": SIZES | {"train": 4000}} | changes))


# --- Answers, read from the text of a row ---


def answer_copy(words, copy_len, blank_len, **_):
    assert words[copy_len : copy_len + blank_len] == ["."] * blank_len
    return [int(word) for word in words[:copy_len]]


def answer_selective_copy(words, copy_len, blank_len, **_):
    body = words[: copy_len + blank_len]
    assert body.count(".") == blank_len
    return [int(word) for word in body if word != "."]


def answer_adding(words, **_):
    assert len(words) == 9
    (one,), (other,) = (
        [word for word in part if word.endswith("*")] for part in (words[:4], words[4:])
    )
    assert all(len(word.rstrip("*")) == 1 for word in words)
    return int(one[0]) + int(other[0])


def answer_induction_heads(words, **_):
    assert words.count("!") == 2
    assert words[-1] == "!"
    return int(words[words.index("!") + 1])


def answer_associative_recall(words, num_pairs, **_):
    keys, values = words[:-1:2], words[1::2]
    assert len(set(keys)) == len(keys) == len(values) == num_pairs
    assert all(key.startswith("k") for key in [*keys, words[-1]])
    return int(dict(zip(keys, values, strict=True))[words[-1]])


@pytest.mark.parametrize("changes", ["small", "default"])
@pytest.mark.parametrize("name", SMALL)
def test_labels_are_the_answers(name, changes):
    task = make(name, **(SMALL[name] if changes == "small" or name == "adding" else {}))
    for split in SPLITS:
        examples = list(task.examples(split))
        assert len(examples) == SIZES[split] == task.split_sizes()[split]
        for ids, label in examples:
            words = task.to_text(ids).split(" ")
            assert len(words) == task.seq_len
            if task.num_targets > 1:
                assert words[-task.num_targets :] == ["?"] * task.num_targets
                assert words.count("?") == task.num_targets == len(label)
            assert globals()[f"answer_{name}"](words, **arguments_of(task)) == (
                label.tolist() if task.num_targets > 1 else label
            )


@pytest.mark.parametrize(
    ("name", "seq_len", "num_classes", "num_targets", "vocab"),
    [
        ("copy", 10, 12, 3, "<pad> . ? 0 1 2 3 4 5 6 7 8 9 10 11"),
        ("selective_copy", 10, 12, 3, "<pad> . ? 0 1 2 3 4 5 6 7 8 9 10 11"),
        ("adding", 9, 19, 1, "<pad> 0 1 2 3 4 5 6 7 8 9 0* 1* 2* 3* 4* 5* 6* 7* 8* 9*"),
        ("induction_heads", 8, 5, 1, "<pad> ! 0 1 2 3 4"),
        ("associative_recall", 9, 3, 1, "<pad> k0 k1 k2 k3 k4 k5 0 1 2"),
    ],
)
def test_shape_follows_from_the_arguments(name, seq_len, num_classes, num_targets, vocab):
    task = make(name, **SMALL[name])
    assert (task.seq_len, task.num_classes, task.num_targets) == (seq_len, num_classes, num_targets)
    assert task.vocab == tuple(vocab.split())
    assert arrays(task)[0].shape == (SIZES["train"], seq_len)


# --- Statistics ---


def check_uniform(values, count):
    """Each of 0..count-1 within five standard errors of its share."""
    shares = np.bincount(np.ravel(values), minlength=count) / np.size(values)
    assert len(shares) == count
    assert shares == pytest.approx(
        1 / count, abs=5 * np.sqrt((1 - 1 / count) / count / np.size(values))
    )


@pytest.mark.parametrize("name", ["copy", "selective_copy"])
def test_symbols_are_uniform(name):
    _, labels = many(name)
    for column in labels.T:
        check_uniform(column, 12)


def test_places_of_selective_copy_are_uniform():
    ids, _ = many("selective_copy")
    symbols = ids[:, :7] >= 3
    assert symbols.mean(axis=0) == pytest.approx(3 / 7, abs=0.04)
    subsets = Counter(map(bytes, symbols))
    assert len(subsets) == 35  # 7 choose 3
    assert max(subsets.values()) < 2 * min(subsets.values())


def test_marks_of_adding_are_uniform_in_each_half():
    ids, _ = many("adding")
    marked = np.nonzero(ids > 10)[1].reshape(-1, 2)
    check_uniform(marked[:, 0], 4)
    check_uniform(marked[:, 1] - 4, 5)
    check_uniform((ids - 1) % 10, 10)


def test_special_token_is_anywhere_and_what_follows_is_uniform():
    ids, labels = many("induction_heads")
    check_uniform((ids == 1).argmax(axis=1), 6)  # not the last but one: a token has to follow
    check_uniform(labels, 5)
    check_uniform(ids[ids > 1] - 2, 5)


def test_keys_values_and_the_pair_asked_for_are_uniform():
    ids, labels = many("associative_recall")
    for column in (0, 2, 4, 6, 8):
        check_uniform(ids[:, column] - 1, 6)
    check_uniform(ids[:, 1:-1:2] - 7, 3)
    check_uniform((ids[:, :-1:2] == ids[:, -1:]).argmax(axis=1), 4)
    check_uniform(labels, 3)


# --- Streams ---

GOLDEN = {
    "copy": "807f3fe8775baa9a",
    "selective_copy": "b9885acd6965cca9",
    "adding": "29c71cb1bc051ea5",
    "induction_heads": "fe5a1aaaf28afc43",
    "associative_recall": "e52302379f19704a",
}


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_the_same_on_every_machine(name):
    """Golden: if it changes, every store of the task changes; increase `reader_version` too."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for array in arrays(make(name, **SMALL[name]), split):
            digest.update(array.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", SMALL)
def test_rows_depend_on_seed_split_and_number_alone(name, monkeypatch):
    def rows(split, **changes):
        return [
            hashlib.sha256(row.tobytes()).digest()
            for row in arrays(make(name, **changes), split)[0]
        ]

    more = {"sizes": {"train": 70, "val": 20, "test": 40}}
    assert rows("test", **more)[:30] == rows("test")
    assert rows("train", **more)[:50] == rows("train")
    assert rows("val", **more) == rows("val")
    assert not set(rows("test")) & set(rows("test", data_seed=1))
    assert not set(rows("train")) & set(rows("test"))
    assert not set(rows("val")) & {*rows("train"), *rows("test")}
    before = rows("train")
    monkeypatch.setattr(synthetic, "ROWS_PER_DRAW", 7)
    assert rows("train") == before


@pytest.mark.parametrize("name", SMALL)
def test_both_protocols_share_one_store(name, tmp_path):
    stores = {
        prepare(make(name, inputs, **SMALL[name]), tmp_path).path for inputs in ("s4", "lra2020")
    }
    assert len(stores) == 1


@pytest.mark.parametrize("name", SMALL)
def test_packed_rows_are_the_examples(name, tmp_path):
    task = make(name, **SMALL[name])
    split = prepare(task, tmp_path).splits["val"]
    inputs, labels = arrays(task, "val")
    assert np.array_equal(split.inputs, inputs)
    assert np.array_equal(split.labels, labels)
    assert (split.lengths == task.seq_len).all()


# --- Reference lines ---


def test_most_frequent_by_hand():
    ids = np.array(
        [[6, 6, 6, 5, 2], [2, 4, 4, 3, 1], [4, 3, 3, 4, 1]], np.uint8
    )  # 3, 4 and 5 are labels
    assert most_frequent(ids, 3, 3).tolist() == [2, 1, 0]


@pytest.mark.parametrize("name", ["induction_heads", "copy"])
def test_reference_lines_by_hand(name):
    task = make(name, **SMALL[name])
    if name == "copy":
        inputs = np.array([[3, 4, 4, 1, 1, 1, 1, 2, 2, 2], [6, 5, 5, 1, 1, 1, 1, 2, 2, 2]])
        test = SimpleNamespace(inputs=inputs, labels=np.array([[0, 1, 1], [3, 2, 2]]))
        train = SimpleNamespace(inputs=inputs, labels=np.array([[3, 3, 3], [0, 1, 2]]))
        expected = {"majority": 1 / 6, "most_frequent": 4 / 6}
    else:
        inputs = np.array([[2, 2, 3, 2, 1, 2, 4, 1], [2, 3, 3, 3, 1, 4, 4, 1]])
        test = SimpleNamespace(inputs=inputs, labels=np.array([0, 2]))
        train = SimpleNamespace(inputs=inputs, labels=np.array([2, 2, 1]))
        expected = {"majority": 0.5, "most_frequent": 0.5}
    assert task.reference_lines({"train": train, "test": test}) == pytest.approx(expected)


def test_adding_has_no_line_but_the_majority():
    _, labels = many("adding")
    split = SimpleNamespace(inputs=None, labels=labels)
    assert make("adding").reference_lines({"train": split, "test": split}) == {
        "majority": pytest.approx(0.1, abs=0.025)  # the sum is 9 in ten of a hundred cases
    }


# --- Refusals ---


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("copy", {"categories": 1}, "task.categories=1: expected 2 or more"),
        ("copy", {"copy_len": 1}, "task.copy_len=1: expected 2"),
        ("selective_copy", {"blank_len": -1}, "task.blank_len=-1: expected 0"),
        ("adding", {"length": 1}, "task.length=1: expected 2"),
        ("induction_heads", {"length": 2}, "task.length=2: expected 3"),
        ("induction_heads", {"num_tokens": 1}, "task.num_tokens=1"),
        ("associative_recall", {"num_pairs": 0}, "task.num_pairs=0"),
        ("associative_recall", {"num_values": 1}, "task.num_values=1"),
        (
            "associative_recall",
            {"num_keys": 3, "num_pairs": 4},
            "task.num_keys=3 is too few .* task.num_pairs=4",
        ),
    ],
)
def test_invalid_arguments_are_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **SMALL[name] | changes)


@pytest.mark.parametrize("name", SMALL)
def test_least_arguments_give_rows(name):
    least = {
        "copy": {"categories": 2, "copy_len": 2, "blank_len": 0},
        "selective_copy": {"categories": 2, "copy_len": 2, "blank_len": 0},
        "adding": {"length": 2},
        "induction_heads": {"num_tokens": 2, "length": 3},
        "associative_recall": {"num_pairs": 1, "num_keys": 1, "num_values": 2},
    }[name]
    task = make(name, **least)
    for ids, label in task.examples("train"):
        assert ids.shape == (task.seq_len,)
        assert (ids >= 1).all()
        assert 0 <= np.min(label) <= np.max(label) < task.num_classes


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"train": 5, "val": 5}}, r"task\.sizes=.*train, val, test"),
        ({"sizes": SIZES | {"val": 0}}, r"task\.sizes\.val=0"),
        ({"data_seed": -1}, r"task\.data_seed"),
        ({"data_seed": 2**64}, r"task\.data_seed"),
        ({"inputs": "s5"}, r"protocol\.inputs=s5"),
    ],
)
def test_common_arguments_are_checked(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **changes)
