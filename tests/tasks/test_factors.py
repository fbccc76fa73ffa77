"""Factors of examples against slow references, such as a recursive parser of ListOps."""

import numpy as np
import pytest

from lra.config.build import build_task
from lra.config.compose import compose
from lra.data.store import Split, prepare
from lra.tasks.listops import ListOps
from lra.tasks.listops_generator import TOKENS


def parsed(words):
    """Depth of the first expression in `words`, and the words after it."""
    head, *rest = words
    if not head.startswith("["):
        return 1, rest
    deepest = 0
    while rest[0] != "]":
        depth, rest = parsed(rest)
        deepest = max(deepest, depth)
    return 1 + deepest, rest[1:]


@pytest.mark.parametrize("inputs", ["lra2020", "s4"])
def test_depth_and_root_operator_equal_a_recursive_parser(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("lra.tasks.listops.ROWS_PER_COUNT", 7)
    task = ListOps(
        {"inputs": inputs},
        tmp_path,
        "l",
        "generated",
        6,
        5,
        4,
        60,
        {"train": 1, "val": 1, "test": 60},
        0,
    )
    split = prepare(task, tmp_path).splits["test"]
    found = task.factors(split)
    special = len(task.vocab) - len(TOKENS)
    for i, (ids, length) in enumerate(zip(split.inputs, split.lengths, strict=True)):
        words = [task.vocab[k] for k in ids[:length] if k >= special]
        depth, rest = parsed(words)
        assert rest == []
        assert (found["depth"][i], f"[{found['root operator'][i]}") == (depth, words[0])
    assert set(found["depth"].tolist()) >= {2, 3, 4, 5}
    assert set(found["root operator"].tolist()) == {"MAX", "MED", "MIN", "SM"}
    np.testing.assert_array_equal(found["length"], split.lengths)
    np.testing.assert_array_equal(found["label"], split.labels)


@pytest.mark.parametrize("name", ["induction_heads", "associative_recall"])
def test_distance_is_that_to_the_queried_key(name, tmp_path):
    task = build_task(compose([f"task={name}", "task.sizes={train: 1, val: 1, test: 30}"]))
    split = prepare(task, tmp_path).splits["test"]
    for ids, label, distance in zip(
        split.inputs, split.labels, task.factors(split)["distance"], strict=True
    ):
        place = len(ids) - 1 - distance
        assert ids[place] == ids[-1]
        assert ids[place + 1] == task.first_label + label
        assert (ids[:place] != ids[-1]).all()


def test_pictures_have_brightness_and_pairs_two_lengths():
    picture = build_task(compose(["task=pathfinder"]))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1024), np.uint8)
    split = Split(pixels, np.full(5, 1024), np.arange(5) % 2)
    found = picture.factors(split)
    assert sorted(found) == ["brightness", "label"]  # the length is constant
    assert found["brightness"].tolist() == [round(float(row.mean())) for row in pixels]
    colour = build_task(compose(["task=scifar"]))
    found = colour.factors(
        Split(pixels.reshape(-1)[: 3 * 1024].reshape(1, 1024, 3), np.array([1024]), np.array([0]))
    )
    assert found["brightness"].tolist() == [round(float(pixels.reshape(-1)[: 3 * 1024].mean()))]
    pair = build_task(compose(["task=retrieval"]))
    found = pair.factors(
        Split(np.ones((2, 2, 4000), np.uint8), np.array([[7, 9], [8, 5]]), np.array([0, 1]))
    )
    assert found["length of the first"].tolist() == [7, 8]
    assert found["length of the second"].tolist() == [9, 5]
