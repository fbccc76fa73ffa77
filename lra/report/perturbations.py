"""Perturbs the inputs of a model: permuted blocks of positions, and windows without context."""

import numpy as np
from jaxtyping import Float, Int, Integer

MAX_INDEX_ELEMENTS = 2**23  # size of an index array; bounds the memory


def geometric_sizes(first: int, last: int) -> list[int]:
    """`first`, 4 `first`, 16 `first`, ... below `last`, and `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 4
    return [*sizes, last]


def shuffle_blocks(
    inputs: Integer[np.ndarray, "n *pair_L_F"], lengths: Int[np.ndarray, "n *pair"], size: int
) -> Integer[np.ndarray, "n *pair_L_F"]:
    """Cuts the real positions of each example into blocks of `size` and permutes the blocks.

    The last block is shorter if `size` does not divide the length. Padding keeps its place. The two
    sequences of a pair are permuted independently. The permutation is a function of
    size, L and the index of the example.
    """
    axis = lengths.ndim  # of positions
    length = inputs.shape[axis]
    flat, real = inputs.reshape(-1, *inputs.shape[axis:]), lengths.reshape(-1)
    shuffled = np.empty_like(flat)
    num_blocks = -(-length // size)
    position = np.arange(length)
    random = np.random.Philox(key=np.array([0, size], np.uint64))
    step = max(1, MAX_INDEX_ELEMENTS // length)
    for first in range(0, len(flat), step):
        rows = slice(first, first + step)
        draws = random.random_raw(len(real[rows]) * num_blocks).reshape(-1, num_blocks)
        ranks = draws.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        keys = ranks[:, position // size] * size + position % size
        # padding sorts last, in its own order
        keys = np.where(position < real[rows, None], keys, num_blocks * size + position)
        order = keys.argsort(axis=1, kind="stable").reshape(-1, length, *(1,) * (flat.ndim - 2))
        shuffled[rows] = np.take_along_axis(flat[rows], order, axis=1)
    return shuffled.reshape(inputs.shape)


def cut_windows(
    inputs: Integer[np.ndarray, "n L *F"], lengths: Int[np.ndarray, " n"], size: int, padded: int
) -> tuple[Integer[np.ndarray, "m padded *F"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Cuts examples into windows of `size` positions, each padded with 0 to `padded` positions.

    The last window of an example may be shorter. Windows without real positions are left out, but
    an example without any keeps its first window.

    Returns:
        The windows as separate sequences, their lengths, and the index of the example of each.
    """
    count = -(-inputs.shape[1] // size)
    no_padding = [(0, 0)] * (inputs.ndim - 2)
    whole = np.pad(inputs, [(0, 0), (0, count * size - inputs.shape[1]), *no_padding])
    windows = whole.reshape(len(inputs), count, size, *inputs.shape[2:])
    real = np.clip(np.asarray(lengths)[:, None] - size * np.arange(count), 0, size)  # (n, count)
    kept = real > 0
    kept[:, 0] = True
    padded_windows = np.pad(windows[kept], [(0, 0), (0, padded - size), *no_padding])
    return padded_windows, real[kept].astype(np.int32), np.nonzero(kept)[0]


def mean_by_example(
    logits: Float[np.ndarray, "m C"], examples: Int[np.ndarray, " m"], count: int
) -> np.ndarray:
    """Mean logits (count, C) of the windows of each example."""
    sums = np.zeros((count, logits.shape[1]))
    np.add.at(sums, examples, logits)
    return sums / np.bincount(examples, minlength=count)[:, None]
