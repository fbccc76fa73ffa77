"""Can a model copy, select, add, look back and associate? Five small generated tasks, each a question about memory.

They are the smoke tests of sequence models and train on a CPU in minutes: copying (Arjovsky et al. 2016, arXiv
1511.06464), selective copying (Jing et al. 2019, arXiv 1706.02761; Gu & Dao 2023, arXiv 2312.00752), adding (Hochreiter
& Schmidhuber 1997), induction heads (Olsson et al. 2022, arXiv 2209.11895; Dao et al. 2023, arXiv 2212.14052) and
associative recall (Ba et al. 2016, arXiv 1610.06258; Arora et al. 2023, arXiv 2312.04927). Lengths and alphabets are
ours, so scores are comparable with nobody's paper. All rows of a task have the same length: nothing is padded, and the
inputs are the same under every protocol.

The random stream: a split draws from Philox with the 128-bit key (data_seed, split), split 0, 1, 2 for train, val, test,
whose raw stream NumPy guarantees; row i takes the i-th `words_per_row` 64-bit words. The high half of a word, as a
fraction of 2^32, scaled to the number of choices is one choice (no choice is off its probability by more than 2^-32);
several different places or keys are those whose words are the smallest. So a row depends on the seed, its split, its
number and the task's arguments alone. Rows are independent draws: where the arguments admit few different ones, splits
share rows, which `lra data verify` counts.
"""

import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt64

from lra.errors import ConfigError
from lra.tasks.base import SPLITS, Example, Task, check_option

Words = UInt64[np.ndarray, "n words"]  # the random words of n rows
Rows = tuple[Int[np.ndarray, "n L"], Int[np.ndarray, "n *targets"]]  # ids and labels

PAD = "<pad>"  # id 0, in no row
ROWS_PER_DRAW = 1024  # bounds the memory; the rows do not depend on it


class Synthetic(Task):
    """What the five share: independent rows of one length, drawn from `data_seed`, the same under every protocol.

    Args:
        sizes: rows of train, val and test, which are drawn apart: none depends on the size of another.
        data_seed: of the generator, independent of a run's seed.
        settings: the task's own arguments, each with the least value it may have.
    Raises:
        ConfigError: a value is too small, or `sizes` are not those of the three splits.
    """

    inputs = "tokens"
    vocab: tuple[str, ...]
    words_per_row: int
    first_label: int | None = (
        None  # the id that class 0 has in the rows; None where classes are no tokens
    )

    def __init__(
        self,
        protocol: Mapping[str, Any],
        name: str,
        sizes: Mapping[str, int],
        data_seed: int,
        **settings: tuple[int, int],
    ):
        check_option("protocol.inputs", protocol["inputs"], ("lra2020", "s4"))
        if sorted(sizes) != sorted(SPLITS):
            raise ConfigError(f"task.sizes={dict(sizes)}: expected rows of {', '.join(SPLITS)}")
        for key, (value, least) in (
            settings.items() | {f"sizes.{split}": (sizes[split], 1) for split in SPLITS}.items()
        ):
            if value < least:
                raise ConfigError(f"task.{key}={value}: expected {least} or more")
        if not 0 <= data_seed < 2**64:
            raise ConfigError(f"data_seed={data_seed} is outside 0..2^64-1; set task.data_seed")
        self.name, self.data_seed = name, data_seed
        self.sizes = {split: sizes[split] for split in SPLITS}
        self.settings = {key: value for key, (value, _) in settings.items()}

    @abc.abstractmethod
    def rows(self, words: Words) -> Rows:
        """Ids and labels of rows, from the random words of each."""

    def examples(self, split: str) -> Iterator[Example]:
        """All rows of `split`, in the order of the generator."""
        bits = np.random.Philox(key=np.array([self.data_seed, SPLITS.index(split)], np.uint64))
        for first in range(0, self.sizes[split], ROWS_PER_DRAW):
            count = min(ROWS_PER_DRAW, self.sizes[split] - first)
            inputs, labels = self.rows(
                bits.random_raw(count * self.words_per_row).reshape(count, self.words_per_row)
            )
            for row, label in zip(inputs, labels.astype(np.int32), strict=True):
                yield Example(row, label if self.num_targets > 1 else int(label))

    def split_sizes(self) -> Mapping[str, int]:
        return self.sizes

    def fingerprint(self) -> dict[str, Any]:
        return self.settings | {"sizes": self.sizes, "data_seed": self.data_seed}

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and `most_frequent`: of the tokens that a label can be, the one the row shows most often."""
        lines = super().reference_lines(splits)
        if self.first_label is not None:
            guesses = most_frequent(
                np.asarray(splits["test"].inputs), self.first_label, self.num_classes
            )
            labels = np.asarray(splits["test"].labels).reshape(len(guesses), -1)
            lines["most_frequent"] = float(np.mean(guesses[:, None] == labels))
        return lines


class Copying(Synthetic):
    """What the two copying tasks share: symbols among blanks, then as many marks, at which they are asked for in order.

    Args:
        categories: symbols to choose from, independently for each place; C.
        copy_len: symbols to remember; T. Their classes are predicted at the last T positions.
        blank_len: blanks around or after them.
    """

    BLANK, MARK = 1, 2
    first_label = 3

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
        super().__init__(
            protocol,
            name,
            sizes,
            data_seed,
            categories=(categories, 2),
            copy_len=(copy_len, 2),
            blank_len=(blank_len, 0),
        )
        self.num_classes, self.num_targets = categories, copy_len
        self.body_len = copy_len + blank_len
        self.seq_len = self.body_len + copy_len
        self.words_per_row = copy_len + self.body_len
        self.vocab = (PAD, ".", "?", *map(str, range(categories)))

    @abc.abstractmethod
    def places(self, words: Words) -> Int[np.ndarray, "n {self.num_targets}"]:
        """Where the symbols stand among the first `body_len` positions, from left to right."""

    def rows(self, words: Words) -> Rows:
        labels = choice(words[:, : self.num_targets], self.num_classes)
        ids = np.full((len(words), self.seq_len), self.BLANK, np.int64)
        ids[:, self.body_len :] = self.MARK
        np.put_along_axis(
            ids, self.places(words[:, self.num_targets :]), self.first_label + labels, axis=1
        )
        return ids, labels


class Copy(Copying):
    """The symbols come first, then the blanks: remember a sequence over a gap.

    Source: Arjovsky et al. 2016, who ask with one mark and then blanks; here each answer has a mark of its own.
    """

    def places(self, words: Words) -> Int[np.ndarray, "n {self.num_targets}"]:
        return np.broadcast_to(np.arange(self.num_targets), (len(words), self.num_targets))


class SelectiveCopy(Copying):
    """The symbols stand at random places among the blanks: what to remember depends on the token, not on its place.

    Source: Jing et al. 2019 (there: denoising); Gu & Dao 2023.
    """

    def places(self, words: Words) -> Int[np.ndarray, "n {self.num_targets}"]:
        return np.sort(distinct(words, self.num_targets), axis=1)


class Adding(Synthetic):
    """Random digits of which two are marked, one in each half: the class is the sum of the two, 0 to 18.

    The adding problem as classification: digits instead of real numbers, a class instead of a regression. Digit and mark
    are one token. The sum does not depend on where the two stand, so a model that pools by the mean over positions can
    add without remembering; `backbone.pool=last` asks for memory.

    Args:
        length: L, digits a row; the first half is its first `length // 2`.
    Source: Hochreiter & Schmidhuber 1997; one mark in each half as in Arjovsky et al. 2016.
    """

    num_classes = 19

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        length: int,
        sizes: Mapping[str, int],
        data_seed: int,
    ):
        super().__init__(protocol, name, sizes, data_seed, length=(length, 2))
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
    """Random tokens with a special one among them and once more at the end: which token followed it?

    Args:
        num_tokens: ordinary tokens; C.
        length: L, with the special token at the end.
    Source: Olsson et al. 2022; with a special token as in Dao et al. 2023.
    """

    SPECIAL = 1
    first_label = 2

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
        super().__init__(
            protocol, name, sizes, data_seed, num_tokens=(num_tokens, 2), length=(length, 3)
        )
        self.num_classes, self.seq_len, self.words_per_row = num_tokens, length, length + 1
        self.vocab = (PAD, "!", *map(str, range(num_tokens)))

    def rows(self, words: Words) -> Rows:
        tokens = choice(words[:, : self.seq_len], self.num_classes)
        place = choice(words[:, -1:], self.seq_len - 2)  # a token other than the last has to follow
        ids = self.first_label + tokens
        np.put_along_axis(ids, place, self.SPECIAL, axis=1)
        ids[:, -1] = self.SPECIAL
        return ids, np.take_along_axis(tokens, place + 1, axis=1)[:, 0]

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Also `distance`, positions between the two special tokens."""
        first = np.argmax(np.asarray(split.inputs) == self.SPECIAL, axis=1)
        return super().factors(split) | {"distance": self.seq_len - 1 - first}


class AssociativeRecall(Synthetic):
    """Pairs of a key and its value, all keys different, then one of the keys again: which value belongs to it?

    Args:
        num_pairs: pairs a row, so that L = 2 num_pairs + 1.
        num_keys: keys to choose from, each at most once a row; at least `num_pairs`.
        num_values: values to choose from, independently for each key; C. No value is a key.
    Source: Ba et al. 2016; one query a row where Arora et al. 2023 have several.
    """

    FIRST_KEY = 1

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
        super().__init__(
            protocol,
            name,
            sizes,
            data_seed,
            num_pairs=(num_pairs, 1),
            num_keys=(num_keys, 1),
            num_values=(num_values, 2),
        )
        if num_keys < num_pairs:
            raise ConfigError(
                f"task.num_keys={num_keys} is too few for different keys in task.num_pairs={num_pairs} pairs"
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
        """Also `distance`, positions from the pair that is asked for to the end."""
        inputs = np.asarray(split.inputs)
        return super().factors(split) | {
            "distance": self.seq_len - 1 - np.argmax(inputs == inputs[:, -1:], axis=1)
        }


def choice(words: UInt64[np.ndarray, "*shape"], count: int) -> Int[np.ndarray, "*shape"]:
    """One of 0..count-1 for each random word; count < 2^32."""
    return (((words >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def distinct(words: UInt64[np.ndarray, "n items"], count: int) -> Int[np.ndarray, "n {count}"]:
    """In each row `count` different ones of its items, in random order: those with the smallest words."""
    return np.argsort(words, axis=1, kind="stable")[:, :count]


def most_frequent(
    inputs: Integer[np.ndarray, "n L"], first: int, count: int
) -> Int[np.ndarray, " n"]:
    """Of ids first..first+count-1 the one that occurs most often in each row, less `first`; the lowest of several."""
    classes = inputs.astype(np.int64) - first
    row, place = np.nonzero((classes >= 0) & (classes < count))
    counts = np.bincount(row * count + classes[row, place], minlength=len(inputs) * count)
    return counts.reshape(-1, count).argmax(axis=1)
