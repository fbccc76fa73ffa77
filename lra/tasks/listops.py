"""ListOps: the value of nested lists of MIN, MAX, MED and SM over single digits.

The rows are generated from a seed, or read from the files `listops-1000/basic_*.tsv` of the Long
Range Arena release. Grammar: Nangia & Bowman 2018 (arXiv 1804.06028) with the limits of Tay et al.
2020 (arXiv 2011.04006): the root has depth 1; a node above the last depth is an operator with
probability 1/4; the number of arguments, the operator and the digits are uniform; MED is truncated
to an integer, SM is the sum modulo 10. A digit counts as one token, an operator as two, its name
and its closing bracket.

A row is a uint8 array of indices into `TOKENS`; a digit is its own index. `encode` makes the ids
that a model sees.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt8

from lra.errors import ConfigError, DataError, LraError
from lra.sources.locate import LRA_RELEASE, Source, open_source
from lra.tasks.base import SPLITS, Example, Task, check_data_seed, check_option, check_sizes
from lra.tasks.linear_baseline import grouped_linear_accuracy
from lra.tasks.listops_generator import (
    CLOSE,
    FIRST_OPERATOR,
    OPERATORS,
    TOKENS,
    Grammar,
    Rows,
    evaluate,
    generate,
    parse_text,
)

SPECIAL = {"lra2020": ("<pad>",), "s4": ("<pad>", "<unk>", "<eos>")}
EOS = 2  # s4 only
RELEASE_MAX_LENGTH = 1999
RELEASE_SEQ_LEN = {"lra2020": 2000, "s4": 2048}
RELEASE = Source(
    "ListOps of the Long Range Arena release",
    "listops-1000",
    tuple(f"basic_{split}.tsv" for split in SPLITS),
    ("listops-1000.tar.gz", LRA_RELEASE.filename),
    LRA_RELEASE,
    "task.source=generated draws such rows instead",
)
ROWS_PER_COUNT = 1024  # bounds the memory of `depths`
ROWS_PER_FIT = 20_000  # of train for a reference line; all 96,000 change it by less than a point
MAX_LINE = 2**24  # characters of a row, so that no file fills the memory


def to_release_text(tokens: Integer[np.ndarray, " L"]) -> str:
    """A row in the release's form: a binary tree that joins each argument to those before it."""
    words: list[str] = []
    open_at: list[int] = []  # indices of the open operators in `words`
    joins: list[int] = []  # and their numbers of arguments so far
    for token in tokens.tolist():
        words.append(TOKENS[token])
        if FIRST_OPERATOR <= token < CLOSE:
            open_at.append(len(words) - 1)
            joins.append(0)
            continue
        if token == CLOSE:
            words.append(")")
            place = open_at.pop()
            words[place] = "( " * (joins.pop() + 1) + words[place]
        if open_at:  # a digit or a whole list is an argument of the innermost open operator
            words.append(")")
            joins[-1] += 1
    return " ".join(words)


def export_tsv(splits: Mapping[str, Rows], folder: Path) -> None:
    """Write rows as `basic_<split>.tsv` of the release."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with open(folder / f"basic_{name}.tsv", "w", encoding="ascii", newline="\n") as file:
            file.write("Source\tTarget\n")
            file.writelines(
                f"{to_release_text(rows[i])}\t{rows.labels[i]}\n" for i in range(len(rows))
            )


def encode(tokens: UInt8[np.ndarray, " L"], inputs: str) -> UInt8[np.ndarray, " M"]:
    """Map tokens to the ids of `protocol.inputs`; s4 appends one end-of-sequence id."""
    ids = tokens + np.uint8(len(SPECIAL[inputs]))
    return np.append(ids, np.uint8(EOS)) if inputs == "s4" else ids


def rows_of(split: Any, vocab: tuple[str, ...]) -> Rows:
    """The rows of a packed split (`inputs (n, L)`, `lengths`, `labels`) encoded with `vocab`."""
    special = len(vocab) - len(TOKENS)
    lengths = np.asarray(split.lengths, np.int64) - (special > EOS)
    parts = [ids[:length] - special for ids, length in zip(split.inputs, lengths, strict=True)]
    tokens = np.concatenate([np.zeros(0, np.uint8), *parts]).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Rows(tokens, offsets, np.asarray(split.labels, np.uint8))


def depths(ids: Integer[np.ndarray, "n L"], special: int) -> Int[np.ndarray, " n"]:
    """Depth of the deepest node of each padded row, whose tokens follow `special` other ids.

    The root has depth 1, as for `max_depth`.
    """
    found = np.empty(len(ids), np.int64)
    for first in range(0, len(ids), ROWS_PER_COUNT):
        rows = np.asarray(ids[first : first + ROWS_PER_COUNT])
        opens = (rows >= special + FIRST_OPERATOR) & (rows < special + CLOSE)
        # int16 suffices: a row has fewer than 2^15 brackets
        steps = opens.astype(np.int16) - (rows == special + CLOSE)
        deepest = np.cumsum(steps, axis=1, dtype=np.int16).max(axis=1)
        found[first : first + ROWS_PER_COUNT] = 1 + deepest
    return found


def bags_of_tokens(
    ids: Integer[np.ndarray, "n L"], special: int
) -> tuple[Int[np.ndarray, "n 15"], Int[np.ndarray, "n 10"]]:
    """Counts in each padded row: of every token, and of the digits that are arguments of the root.

    The tokens follow `special` other ids.
    """
    tokens = np.zeros((len(ids), len(TOKENS)), np.int64)
    direct = np.zeros((len(ids), FIRST_OPERATOR), np.int64)
    for first in range(0, len(ids), ROWS_PER_COUNT):
        rows = np.asarray(ids[first : first + ROWS_PER_COUNT]).astype(np.int16) - special
        steps = ((rows >= FIRST_OPERATOR) & (rows < CLOSE)).astype(np.int16) - (rows == CLOSE)
        is_direct = (np.cumsum(steps, axis=1, dtype=np.int16) == 1) & (rows < FIRST_OPERATOR)
        for token in range(len(TOKENS)):
            is_token = rows == token
            tokens[first : first + ROWS_PER_COUNT, token] = is_token.sum(axis=1)
            if token < FIRST_OPERATOR:
                counts = (is_token & is_direct).sum(axis=1)
                direct[first : first + ROWS_PER_COUNT, token] = counts
    return tokens, direct


def read_release(path: Path) -> Iterator[tuple[UInt8[np.ndarray, " L"], int]]:
    """Rows (tokens, answer) of a released file, checked; raises DataError at the first error."""
    with io.TextIOWrapper(open_source(path), encoding="ascii", errors="replace") as file:
        header = file.readline(MAX_LINE).rstrip("\r\n")
        if header != "Source\tTarget":
            raise DataError(
                f"{path}, row 0: the header is {header[:80]!r}, expected 'Source<TAB>Target'"
            )
        lines = iter(partial(file.readline, MAX_LINE), "")
        for row, line in enumerate(lines, start=1):
            try:
                yield _read_row(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, row {row}: {error}; fetch the file again or set task.source=generated"
                ) from None


def _read_row(line: str) -> tuple[UInt8[np.ndarray, " L"], int]:
    if len(line) == MAX_LINE:
        raise ValueError(f"longer than the limit of {MAX_LINE:,} characters")
    source, tab, target = line.rstrip("\r\n").partition("\t")
    if not tab or target not in TOKENS[:FIRST_OPERATOR]:
        raise ValueError(
            f"found the answer {target[:20]!r}, expected a tab and one digit (is it truncated?)"
        )
    if "]" not in source:
        raise ValueError(
            "no closing bracket: this file lost its brackets, as those made before March 2021"
        )
    tokens = parse_text(source)
    answer = evaluate(tokens)
    if answer != int(target):
        raise ValueError(f"the answer is given as {target}, but the row evaluates to {answer}")
    return tokens, answer


class ListOps(Task):
    """ListOps, generated or released, encoded as `protocol.inputs` states.

    The encoding is "lra2020" (pad 0, then the 15 tokens) or "s4" (pad, unk, eos, then the tokens;
    one eos appended).

    Args:
        source: "generated" or "release".
        max_depth, min_args, max_args, min_length, max_length: inclusive limits of the generator;
            a released row may not exceed `max_length` either.
        sizes: rows of train, val and test; a released file must have the same number.
        data_seed: of the generator, independent of a run's seed.
        seq_len: padded length; None for the protocol's own.
    """

    num_classes = 10
    reference_version = 2
    vocab: tuple[str, ...]

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        source: str,
        max_depth: int,
        max_args: int,
        min_length: int,
        max_length: int,
        sizes: Mapping[str, int],
        data_seed: int,
        min_args: int = 2,
        seq_len: int | None = None,
    ):
        check_option("task.source", source, ("generated", "release"))
        self.inputs = protocol["inputs"]
        check_option("protocol.inputs", self.inputs, tuple(SPECIAL))
        self.name, self.source, self.data_root = name, source, Path(data_root)
        self.publisher = RELEASE if source == "release" else None
        self.grammar = Grammar(max_depth, min_args, max_args, min_length, max_length)
        self.sizes, self.data_seed = check_sizes(sizes), data_seed
        check_data_seed(data_seed)
        self.vocab = (*SPECIAL[self.inputs], *TOKENS)
        longest = max_length + (self.inputs == "s4")
        is_release = max_length == RELEASE_MAX_LENGTH
        default = RELEASE_SEQ_LEN[self.inputs] if is_release else -(-longest // 8) * 8
        self.seq_len = default if seq_len is None else seq_len
        if self.seq_len < longest:
            raise ConfigError(
                f"seq_len={seq_len} is shorter than {name}'s longest row, {longest}; set "
                "task.seq_len"
            )

    @cached_property
    def _generated(self) -> dict[str, Rows]:
        return generate(self.sizes, self.data_seed, self.grammar)

    def examples(self, split: str) -> Iterator[Example]:
        if self.source == "generated":
            return self._encoded(self._generated[split])
        return self._released(split)

    def first_examples(self, split: str, count: int) -> Iterator[Example]:
        if self.source == "release":
            return super().first_examples(split, count)
        sizes = {split: min(count, self.sizes[split])}  # the later splits are cut first
        sizes |= {later: self.sizes[later] for later in SPLITS[SPLITS.index(split) + 1 :]}
        return self._encoded(generate(sizes, self.data_seed, self.grammar)[split])

    def _encoded(self, rows: Rows) -> Iterator[Example]:
        for i in range(len(rows)):
            yield Example(encode(rows[i], self.inputs), int(rows.labels[i]))

    def _released(self, split: str) -> Iterator[Example]:
        found = read_release(self.source_files()[SPLITS.index(split)])
        for row, (tokens, label) in enumerate(found, start=1):
            if len(tokens) > self.grammar.max_length:
                raise DataError(
                    f"basic_{split}.tsv, row {row}: {len(tokens)} tokens, more than "
                    f"task.max_length={self.grammar.max_length}"
                )
            yield Example(encode(tokens, self.inputs), label)

    def split_sizes(self) -> Mapping[str, int]:
        return self.sizes

    def unused_arguments(self) -> Sequence[str]:
        return () if self.source == "generated" else (*Grammar._fields, "data_seed")

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"inputs": self.inputs}

    def parse(self, example: str) -> UInt8[np.ndarray, " L"]:
        """Ids of a list such as "[MAX 2 9 [MIN 4 7 ] 0 ]"; a release's parentheses are ignored."""
        try:
            tokens = parse_text(str(example).removesuffix("<eos>"))
            evaluate(tokens)
        except ValueError as error:
            raise DataError(f"{self.name}: {error}; expected [MAX 2 9 [MIN 4 7 ] 0 ]") from None
        return encode(tokens, self.inputs)

    def export(self, splits: Mapping[str, Any], folder: str | Path) -> Path:
        """Write packed splits as the release's files; raises LraError if one of them exists."""
        for name in splits:
            path = Path(folder) / f"basic_{name}.tsv"
            if path.exists():
                raise LraError(f"{path} exists; choose an empty folder to export to")
        rows = {name: rows_of(split, self.vocab) for name, split in splits.items()}
        export_tsv(rows, Path(folder))
        return Path(folder)

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Adds `depth`, of the deepest node as in `max_depth`, and `root operator`."""
        special = len(SPECIAL[self.inputs])
        roots = np.asarray(split.inputs[:, 0], np.int64) - special - FIRST_OPERATOR
        known = {
            "depth": depths(split.inputs, special),
            "root operator": np.array(OPERATORS)[roots],
        }
        return super().factors(split) | known

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority` and predictors that do not evaluate the expression, fitted to train.

        `root_operator` predicts the most frequent label of the root operator. The others are
        logistic regressions: on the counts of all tokens, the same with one regression for each
        root operator, and one for each root operator on the digits that are its own arguments
        (whether each occurs, and how often). Accuracies: docs/data.md.
        """
        special = len(SPECIAL[self.inputs])
        train, test = splits["train"], splits["test"]
        roots, test_roots = (np.asarray(x.inputs[:, 0], np.int64) - special for x in (train, test))
        labels, test_labels = np.asarray(train.labels), np.asarray(test.labels)
        counts = np.zeros((len(TOKENS), self.num_classes), np.int64)
        np.add.at(counts, (roots, labels), 1)
        guesses = counts.argmax(axis=1)[test_roots]
        bags, direct = bags_of_tokens(train.inputs[:ROWS_PER_FIT], special)
        test_bags, test_direct = bags_of_tokens(test.inputs, special)

        def fitted(features: np.ndarray, test_features: np.ndarray, by_root: int) -> float:
            """With a classifier for each root operator if `by_root` is 1, one for all if 0."""
            fit = by_root * roots[:ROWS_PER_FIT], features, labels[:ROWS_PER_FIT]
            scored = by_root * test_roots, test_features, test_labels
            return grouped_linear_accuracy(fit, scored, self.num_classes)

        digits, test_digits = (np.column_stack([x, x > 0]) for x in (direct, test_direct))
        return super().reference_lines(splits) | {
            "root_operator": float(np.mean(guesses == test_labels)),
            "bag_of_tokens": fitted(bags, test_bags, by_root=0),
            "root_and_bag_of_tokens": fitted(bags, test_bags, by_root=1),
            "root_and_direct_digits": fitted(digits, test_digits, by_root=1),
        }
