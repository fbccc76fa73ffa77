"""Five small generated tasks that test memory: copy, select, add, look back and associate.

They train on a CPU in minutes. Lengths and alphabets are ours, so scores are not comparable with
published ones. All rows of a task have the same length, without padding, and are the same under
every protocol.

Random stream: split 0, 1, 2 (train, val, test) draws from `random_stream(data_seed, split)`. Row i
takes the i-th `words_per_row` 64-bit words. A choice scales the high half of a word, as a fraction
of 2^32, to the number of options (each probability is exact to 2^-32); a choice of several distinct
items takes those with the smallest words. Rows are independent: if the arguments admit only few
distinct rows, splits share some, which `lra data verify` counts.
"""

import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt64

from lra.errors import ConfigError
from lra.tasks.base import (
    ENCODINGS,
    SPLITS,
    Example,
    Task,
    check_at_least,
    check_data_seed,
    check_option,
    check_sizes,
)
from lra.tasks.random_words import random_stream

Words = UInt64[np.ndarray, "n words"]  # the random words of n rows
Rows = tuple[Int[np.ndarray, "n L"], Int[np.ndarray, "n *targets"]]  # ids and labels

PAD = "<pad>"  # id 0, which never occurs
ROWS_PER_DRAW = 1024  # bounds the memory; the rows do not depend on it


class Synthetic(Task):
    """Base class: independent rows of one length, drawn from `data_seed`.

    Args:
        sizes: rows of train, val and test; no split depends on the size of another.
        data_seed: of the generator, independent of a run's seed.
    """

    inputs = "tokens"
    vocab: tuple[str, ...]
    minimums: Mapping[str, int]  # least values of the task's own arguments
    words_per_row: int
    first_label: int | None = None  # the id of class 0; None if classes are not tokens

    def __init__(
        self,
        protocol: Mapping[str, Any],
        name: str,
        sizes: Mapping[str, int],
        data_seed: int,
    ):
        check_option("protocol.inputs", protocol["inputs"], ENCODINGS)
        for key, least in self.minimums.items():
            check_at_least(f"task.{key}", self.arguments[key], least)
        check_data_seed(data_seed)
        self.name, self.sizes, self.data_seed = name, check_sizes(sizes), data_seed

    @abc.abstractmethod
    def rows(self, words: Words) -> Rows:
        """Ids and labels of rows from their random words."""

    def examples(self, split: str) -> Iterator[Example]:
        bits = random_stream(self.data_seed, SPLITS.index(split))
        for first in range(0, self.sizes[split], ROWS_PER_DRAW):
            count = min(ROWS_PER_DRAW, self.sizes[split] - first)
            words = bits.random_raw(count * self.words_per_row).reshape(count, -1)
            inputs, labels = self.rows(words)
            labels = labels.astype(np.int32)
            yield from map(Example, inputs, labels if self.num_targets > 1 else labels.tolist())

    def split_sizes(self) -> Mapping[str, int]:
        return self.sizes

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and `most_frequent`: the possible label that is most frequent in the row."""
        lines = super().reference_lines(splits)
        if self.first_label is not None:
            guesses = most_frequent(
                np.asarray(splits["test"].inputs), self.first_label, self.num_classes
            )
            labels = np.asarray(splits["test"].labels).reshape(len(guesses), -1)
            lines["most_frequent"] = float(np.mean(guesses[:, None] == labels))
        return lines


class Copying(Synthetic):
    """Base class of the copying tasks: symbols among blanks, then one mark per symbol to predict.

    Args:
        categories: C, number of symbols; each symbol is drawn independently.
        copy_len: T, symbols to remember; their classes are predicted at the last T positions.
        blank_len: number of blanks around or after them.
    """

    BLANK, MARK = 1, 2
    first_label = 3
    minimums: Mapping[str, int] = {"categories": 2, "copy_len": 2, "blank_len": 0}

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        categories: int,
        copy_len: int,
        blank_len: int,
        sizes: Mapping[str, int],
        data_seed: int,
    ):
        super().__init__(protocol, name, sizes, data_seed)
        self.num_classes, self.num_targets = categories, copy_len
        self.body_len = copy_len + blank_len
        self.seq_len = self.words_per_row = self.body_len + copy_len
        self.vocab = (PAD, ".", "?", *map(str, range(categories)))

    @abc.abstractmethod
    def places(self, words: Words) -> Int[np.ndarray, "n {self.num_targets}"]:
        """Positions of the symbols among the first `body_len`, ascending."""

    def rows(self, words: Words) -> Rows:
        labels = choice(words[:, : self.num_targets], self.num_classes)
        ids = np.full((len(words), self.seq_len), self.BLANK, np.int64)
        ids[:, self.body_len :] = self.MARK
        places = self.places(words[:, self.num_targets :])
        np.put_along_axis(ids, places, self.first_label + labels, axis=1)
        return ids, labels


class Copy(Copying):
    """Copy: the symbols precede the blanks, so the model remembers a sequence over a gap.

    Source: Arjovsky et al. 2016 (arXiv 1511.06464), with one mark and then blanks; here each answer
    has its own mark.
    """

    def places(self, words: Words) -> Int[np.ndarray, "n {self.num_targets}"]:
        return np.broadcast_to(np.arange(self.num_targets), (len(words), self.num_targets))


class SelectiveCopy(Copying):
    """Selective copy: the symbols are at random positions among the blanks.

    The token, not its position, decides what to remember. Source: Jing et al. 2019 (arXiv
    1706.02761, there called denoising); Gu & Dao 2023 (arXiv 2312.00752).
    """

    def places(self, words: Words) -> Int[np.ndarray, "n {self.num_targets}"]:
        return np.sort(distinct(words, self.num_targets), axis=1)


class Adding(Synthetic):
    """Random digits, one marked in each half; the class is the sum of the marked two, 0 to 18.

    The adding problem as classification: digits instead of real numbers, a class instead of a
    regression. Digit and mark are one token. The sum does not depend on the positions, so a model
    with mean pooling can add without memory; `backbone.pool=last` requires memory.

    Args:
        length: L, digits per row; the first half is its first `length // 2`.
    Source: Hochreiter & Schmidhuber 1997; one mark in each half as in Arjovsky et al. 2016.
    """

    num_classes = 19
    minimums: Mapping[str, int] = {"length": 2}

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        length: int,
        sizes: Mapping[str, int],
        data_seed: int,
    ):
        super().__init__(protocol, name, sizes, data_seed)
        self.seq_len, self.words_per_row = length, length + 2
        self.vocab = (PAD, *(f"{digit}{mark}" for mark in ("", "*") for digit in range(10)))

    def rows(self, words: Words) -> Rows:
        half = self.seq_len // 2
        digits = choice(words[:, : self.seq_len], 10)
        marked = np.stack(
            [choice(words[:, -2], half), half + choice(words[:, -1], self.seq_len - half)], axis=1
        )
        is_marked = np.zeros(digits.shape, np.int64)
        np.put_along_axis(is_marked, marked, 1, axis=1)
        return 1 + digits + 10 * is_marked, (digits * is_marked).sum(axis=1)


class InductionHeads(Synthetic):
    """Random tokens with a special one inside and at the end; the class is the token after it.

    Args:
        num_tokens: C, number of ordinary tokens.
        length: L, including the special token at the end.
    Source: Olsson et al. 2022 (arXiv 2209.11895); with a special token as in Dao et al. 2023 (arXiv
    2212.14052).
    """

    SPECIAL = 1
    first_label = 2
    minimums: Mapping[str, int] = {"num_tokens": 2, "length": 3}

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        num_tokens: int,
        length: int,
        sizes: Mapping[str, int],
        data_seed: int,
    ):
        super().__init__(protocol, name, sizes, data_seed)
        self.num_classes, self.seq_len, self.words_per_row = num_tokens, length, length + 1
        self.vocab = (PAD, "!", *map(str, range(num_tokens)))

    def rows(self, words: Words) -> Rows:
        tokens = choice(words[:, : self.seq_len], self.num_classes)
        place = choice(words[:, -1:], self.seq_len - 2)  # an ordinary token has to follow
        ids = self.first_label + tokens
        np.put_along_axis(ids, place, self.SPECIAL, axis=1)
        ids[:, -1] = self.SPECIAL
        return ids, np.take_along_axis(tokens, place + 1, axis=1)[:, 0]

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Adds `distance`, positions between the two special tokens."""
        first = np.argmax(np.asarray(split.inputs) == self.SPECIAL, axis=1)
        return super().factors(split) | {"distance": self.seq_len - 1 - first}


class AssociativeRecall(Synthetic):
    """Pairs of distinct keys and values, then one of the keys; the class is its value.

    Args:
        num_pairs: pairs per row; L = 2 num_pairs + 1.
        num_keys: number of keys, each at most once per row; at least `num_pairs`.
        num_values: C, number of values, drawn independently for each key; no value is a key.
    Source: Ba et al. 2016 (arXiv 1610.06258); one query per row, whereas Arora et al. 2023 (arXiv
    2312.04927) have several.
    """

    FIRST_KEY = 1
    minimums: Mapping[str, int] = {"num_pairs": 1, "num_keys": 1, "num_values": 2}

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        num_pairs: int,
        num_keys: int,
        num_values: int,
        sizes: Mapping[str, int],
        data_seed: int,
    ):
        super().__init__(protocol, name, sizes, data_seed)
        if num_keys < num_pairs:
            raise ConfigError(
                f"task.num_keys={num_keys} is too few for different keys in "
                f"task.num_pairs={num_pairs} pairs"
            )
        self.num_pairs, self.num_keys, self.num_classes = num_pairs, num_keys, num_values
        self.first_label = self.FIRST_KEY + num_keys
        self.seq_len, self.words_per_row = 2 * num_pairs + 1, num_keys + num_pairs + 1
        self.vocab = (PAD, *(f"k{key}" for key in range(num_keys)), *map(str, range(num_values)))

    def rows(self, words: Words) -> Rows:
        keys = distinct(words[:, : self.num_keys], self.num_pairs)
        values = choice(words[:, self.num_keys : -1], self.num_classes)
        asked = choice(words[:, -1:], self.num_pairs)
        ids = np.empty((len(words), self.seq_len), np.int64)
        ids[:, 0:-1:2] = self.FIRST_KEY + keys
        ids[:, 1:-1:2] = self.first_label + values
        ids[:, -1:] = self.FIRST_KEY + np.take_along_axis(keys, asked, axis=1)
        return ids, np.take_along_axis(values, asked, axis=1)[:, 0]

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Adds `distance`, positions from the queried pair to the end."""
        inputs = np.asarray(split.inputs)
        first = np.argmax(inputs == inputs[:, -1:], axis=1)
        return super().factors(split) | {"distance": self.seq_len - 1 - first}


def choice(words: UInt64[np.ndarray, "*shape"], count: int) -> Int[np.ndarray, "*shape"]:
    """Map each random word to 0..count-1; count < 2^32."""
    return (((words >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def distinct(words: UInt64[np.ndarray, "n items"], count: int) -> Int[np.ndarray, "n {count}"]:
    """The indices of the `count` smallest words of each row: distinct items in random order."""
    return np.argsort(words, axis=1, kind="stable")[:, :count]


def most_frequent(
    inputs: Integer[np.ndarray, "n L"], first: int, count: int
) -> Int[np.ndarray, " n"]:
    """The most frequent id of first..first+count-1 in each row, minus `first`; ties: the lowest."""
    classes = inputs.astype(np.int64) - first
    row, place = np.nonzero((classes >= 0) & (classes < count))
    counts = np.bincount(row * count + classes[row, place], minlength=len(inputs) * count)
    return counts.reshape(-1, count).argmax(axis=1)
