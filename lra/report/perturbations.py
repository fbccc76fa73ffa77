"""What is done to examples to find out what a model reads in them, and what its answers are counted by. NumPy alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

Z = 1.959963984540054  # a normal variable is beyond +-Z in 5 % of all cases
MAX_VALUES = 20  # of a factor of numbers, a row of the table each; more are binned
BINS, PER_BIN = (
    8,
    50,
)  # by quantiles: so many bins at most, of so many examples or more where there are two
ELEMENTS_AT_ONCE = 2**23  # of an array of indices, which bounds the memory


class AccuracyRow(NamedTuple):
    """One line of a table: `value` is what its examples share; accuracies are fractions."""

    value: str
    accuracy: float
    low: float  # of the 95 % interval
    high: float
    examples: int


def row(value: Any, right: Float[np.ndarray, " n"]) -> AccuracyRow:
    """Accuracy and its Wilson interval, from the share of right labels of each example (0 or 1 where it has one)."""
    accuracy = float(right.mean())
    return AccuracyRow(str(value), accuracy, *wilson(accuracy, len(right)), len(right))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` independent examples (Wilson 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5 / (1 + Z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def by_factors(
    factors: Mapping[str, np.ndarray], right: Float[np.ndarray, " n"]
) -> dict[str, list[AccuracyRow]]:
    """A table for each factor that differs between the examples: a row a value, or a row a bin."""
    tables = {name: by_factor(values, right) for name, values in factors.items()}
    return {name: rows for name, rows in tables.items() if len(rows) > 1}


def by_factor(
    values: Integer[np.ndarray, " n"] | np.ndarray, right: Float[np.ndarray, " n"]
) -> list[AccuracyRow]:
    """Rows in ascending order; more than `MAX_VALUES` different numbers are cut into bins of about equally many examples."""
    found = np.unique(values)
    if values.dtype.kind in "US" or len(found) <= MAX_VALUES:
        return [row(value, right[values == value]) for value in found.tolist()]
    bins = min(BINS, max(2, len(values) // PER_BIN))
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
    places = np.searchsorted(edges, values)  # equal values share a bin
    rows = []
    for place in np.unique(places):
        inside = values[places == place]
        low, high = inside.min(), inside.max()
        rows.append(row(low if low == high else f"{low} to {high}", right[places == place]))
    return rows


def scales(first: int, last: int) -> list[int]:
    """`first`, 4 `first`, 16 `first`, ... below `last`, and `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 4
    return [*sizes, last]


# --- Permutation -----------------------------------------------------------------------------------------------------


def shuffle_blocks(
    inputs: Integer[np.ndarray, "n *pair_L_F"],
    lengths: Int[np.ndarray, "n *pair"],
    size: int,
    seed: int = 0,
) -> Integer[np.ndarray, "n *pair_L_F"]:
    """Examples whose real positions, cut into blocks of `size` from the first on, have these blocks in random order.

    The last block is shorter where `size` does not divide the length. Padding stays where it is; of a pair each sequence is
    shuffled by itself. The order depends on (seed, size, L) and on the number of the example alone.
    """
    axis = lengths.ndim  # of positions
    length = inputs.shape[axis]
    flat, real = inputs.reshape(-1, *inputs.shape[axis:]), lengths.reshape(-1)
    moved = np.empty_like(flat)
    blocks = -(-length // size)
    words = np.random.Philox(key=np.array([seed, size], np.uint64))
    step = max(1, ELEMENTS_AT_ONCE // length)
    for first in range(0, len(flat), step):
        rows = slice(first, first + step)
        count = len(real[rows])
        order = _positions(
            words.random_raw(count * blocks).reshape(count, blocks), real[rows], length, size
        )
        moved[rows] = np.take_along_axis(
            flat[rows], order.reshape(*order.shape, *(1,) * (flat.ndim - 2)), axis=1
        )
    return moved.reshape(inputs.shape)


def _positions(
    words: Integer[np.ndarray, "n blocks"], lengths: Int[np.ndarray, " n"], length: int, size: int
) -> Int[np.ndarray, "n L"]:
    """Which position comes to stand at each, from a random word a block."""
    ranks = np.argsort(np.argsort(words, axis=1, kind="stable"), axis=1, kind="stable")
    place = np.arange(length)
    keys = ranks[:, place // size] * size + place % size
    keys = np.where(
        place < lengths[:, None], keys, words.shape[1] * size + place
    )  # padding last, as it stands
    return np.argsort(keys, axis=1, kind="stable")


# --- Locality --------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Windows of examples as sequences of their own, those without a real position left out."""

    inputs: Integer[np.ndarray, "m w *F"]
    lengths: Int[np.ndarray, " m"]
    owners: Int[np.ndarray, " m"]  # the example of each, ascending


def cut_windows(
    inputs: Integer[np.ndarray, "n L *F"], lengths: Int[np.ndarray, " n"], size: int, padded: int
) -> Windows:
    """Positions 0 to `size` - 1, `size` to 2 `size` - 1, ... of each example, each padded with 0 to `padded` positions.

    The last window of an example has what is left of it; one without any real position keeps its first window, empty.
    """
    count = -(-inputs.shape[1] // size)
    fill = [(0, 0), (0, count * size - inputs.shape[1])] + [(0, 0)] * (inputs.ndim - 2)
    windows = np.pad(inputs, fill).reshape(len(inputs), count, size, *inputs.shape[2:])
    real = np.clip(np.asarray(lengths)[:, None] - size * np.arange(count), 0, size)  # (n, count)
    kept = real > 0
    kept[:, 0] = True
    owners = np.nonzero(kept)[0]
    fill = [(0, 0), (0, padded - size)] + [(0, 0)] * (inputs.ndim - 2)
    return Windows(np.pad(windows[kept], fill), real[kept].astype(np.int32), owners)


def mean_by_owner(
    logits: Float[np.ndarray, "m C"], owners: Int[np.ndarray, " m"], count: int
) -> np.ndarray:
    """The mean of each example's logits (n, C); every window weighs the same."""
    sums = np.zeros((count, logits.shape[1]))
    np.add.at(sums, owners, logits)
    return sums / np.bincount(owners, minlength=count)[:, None]
