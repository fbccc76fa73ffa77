"""Permuted blocks and windows against loops over examples."""

import numpy as np
import pytest

from lra.report import perturbations


def test_sizes_are_geometric_and_end_at_the_last():
    assert perturbations.geometric_sizes(16, 2048) == [16, 64, 256, 1024, 2048]
    assert perturbations.geometric_sizes(1, 16) == [1, 4, 16]
    assert perturbations.geometric_sizes(8, 8) == [8]


def shuffled_by_loop(rows, lengths, size):
    blocks = -(-rows.shape[1] // size)
    words = (
        np.random.Philox(key=np.array([0, size], np.uint64))
        .random_raw(len(rows) * blocks)
        .reshape(-1, blocks)
    )
    out = rows.copy()
    for row, length, order in zip(out, lengths, words, strict=True):
        parts = [row[i : i + size].copy() for i in range(0, length - length % size, size)]
        parts += [row[length - length % size : length].copy()] if length % size else []
        row[:length] = np.concatenate(
            [parts[i] for i in sorted(range(len(parts)), key=lambda i: order[i])] or [row[:0]]
        )
    return out


@pytest.mark.parametrize("size", [1, 3, 4, 8, 19, 20])
def test_shuffled_blocks_equal_a_loop(size, monkeypatch):
    monkeypatch.setattr(perturbations, "MAX_INDEX_ELEMENTS", 45)  # two rows
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(0, 1000, (9, 20, 2)), np.array([20, 19, 1, 0, 7, 8, 12, 20, 16])
    moved = perturbations.shuffle_blocks(rows, lengths, size)
    np.testing.assert_array_equal(moved, shuffled_by_loop(rows, lengths, size))
    padding = np.arange(20) >= lengths[:, None]
    np.testing.assert_array_equal(moved[padding], rows[padding])
    np.testing.assert_array_equal(np.sort(moved[..., 0]), np.sort(rows[..., 0]))
    assert np.array_equal(moved, rows) == (size == 20)
    np.testing.assert_array_equal(
        perturbations.shuffle_blocks(rows[:4], lengths[:4], size), moved[:4]
    )
    pairs = perturbations.shuffle_blocks(
        rows[:8].reshape(4, 2, 20, 2), lengths[:8].reshape(4, 2), size
    )
    np.testing.assert_array_equal(pairs.reshape(8, 20, 2), moved[:8])


def test_every_order_is_equally_likely():
    rows = np.tile(np.arange(3), (6000, 1))
    moved = perturbations.shuffle_blocks(rows, np.full(6000, 3), 1)
    _, counts = np.unique(moved, axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 150  # five standard deviations


def test_windows_equal_a_loop():
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(1, 1000, (5, 10, 3)), np.array([10, 9, 4, 0, 5])
    windows, counts, examples = perturbations.cut_windows(rows, lengths, 4, 6)
    expected = []
    for owner, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        starts = range(0, max(length, 1), 4)
        expected += [(owner, row[start : min(start + 4, length)]) for start in starts]
    assert examples.tolist() == [owner for owner, _ in expected]
    for inputs, length, (_, window) in zip(windows, counts, expected, strict=True):
        assert inputs.shape == (6, 3)
        np.testing.assert_array_equal(inputs[:length], window)
    assert (windows[:, 4:] == 0).all()
    logits = rng.normal(size=(len(expected), 2))
    means = [
        np.mean([logit for logit, (o, _) in zip(logits, expected, strict=True) if o == i], axis=0)
        for i in range(5)
    ]
    np.testing.assert_allclose(perturbations.mean_by_example(logits, examples, 5), means)
