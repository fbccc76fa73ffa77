"""What does a nested list of MIN, MAX, MED and SM over single digits evaluate to?

Two sources, one reader: rows generated from a seed, and the files `listops-1000/basic_*.tsv` of the Long Range Arena
release. Grammar: Nangia & Bowman 2018 (arXiv 1804.06028) with the limits of Tay et al. 2020 (arXiv 2011.04006): the
root has depth 1, a node above the last depth is an operator with probability 1/4, the number of arguments, the operator
and the digits are uniform; MED is truncated to an integer, SM is the sum modulo 10. A row counts one token for a digit
and two for an operator, its name and its closing bracket.

In here a row is a uint8 array of places in `TOKENS`: a digit is its own value. What a model sees is `encode`.

The random stream: chunk c of a seed draws from Philox with the 128-bit key (seed, c), whose raw stream NumPy
guarantees. Each 64-bit word is two 32-bit words, the low half first, and each node takes one, level by level (a level
starts with a new 64-bit word): bits 30 and 31 zero -> operator; bits 28 and 29 -> which; bits 0 to 27, as a fraction
of 2^28, scaled to the number of arguments or to the digit (no value is off its probability by more than 2^-28). A tree
gets no further level once it is known to be too long. Everything after that is integer arithmetic, so the rows depend
on the seed and the limits alone, not on the machine or the NumPy version.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt8, UInt32

from lra.data.fetch import obtain
from lra.data.sources import LRA_RELEASE, Source, located
from lra.errors import ConfigError, DataError, LraError
from lra.tasks import SPLITS, Example, Progress, Task, check_option

TOKENS = (*"0123456789", "[MAX", "[MED", "[MIN", "[SM", "]")  # sorted
OPERATORS = ("MAX", "MED", "MIN", "SM")
FIRST_OPERATOR, CLOSE = 10, 14
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
)

DRAWS_PER_CHUNK = 8192
ROWS_PER_COUNT = 1024  # bounds the memory of `depths`
BARREN_CHUNKS = 256  # so many chunks in a row without a new row: the limits leave too few


# --- Rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of unequal length, back to back: row i is `tokens[offsets[i]:offsets[i + 1]]`, its answer `labels[i]`."""

    tokens: UInt8[np.ndarray, " T"]
    offsets: Int[np.ndarray, " bounds"]  # R + 1
    labels: UInt8[np.ndarray, " R"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, " L"]:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def take(self, first: int, last: int) -> "Rows":
        """Rows first..last-1, without copying the tokens."""
        offsets = self.offsets[first : last + 1]
        return Rows(self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0], self.labels[first:last])


def join(parts: list[Rows]) -> Rows:
    """The rows of all parts, in order."""
    lengths = [np.diff(part.offsets) for part in parts]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))]).astype(np.int64)
    empty = np.zeros(0, np.uint8)
    tokens = np.concatenate([empty, *(part.tokens for part in parts)])
    return Rows(tokens, offsets, np.concatenate([empty, *(part.labels for part in parts)]))


def evaluate(tokens: Integer[np.ndarray, " L"]) -> int:
    """The answer of one row, by a stack machine; independent of the generator on purpose.

    Raises:
        ValueError: brackets do not match, an operator has no argument, or there is more than one expression.
    """
    outer: list[list[int]] = []
    current: list[int] = []  # the operator, then its arguments; below all operators: the answers
    for token in tokens.tolist():
        if token < FIRST_OPERATOR:
            current.append(token)
        elif token < CLOSE:
            outer.append(current)
            current = [token]
        else:
            if not outer or len(current) < 2:
                raise ValueError("a closing bracket without an operator and arguments before it")
            value = _apply(OPERATORS[current[0] - FIRST_OPERATOR], current[1:])
            current = outer.pop()
            current.append(value)
    if outer or len(current) != 1:
        raise ValueError(f"{len(outer)} brackets left open and {len(current)} expressions, expected 0 and 1")
    return current[0]


def _apply(operator: str, values: list[int]) -> int:
    if operator == "MAX":
        return max(values)
    if operator == "MIN":
        return min(values)
    if operator == "SM":
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def parse_text(text: str) -> UInt8[np.ndarray, " L"]:
    """Tokens of a row in the release's text form, or in any form with its 15 tokens apart by blanks and parentheses.

    Raises:
        ValueError: naming the first token that is none of the 15.
    """
    words = text.replace("(", " ").replace(")", " ").split()
    try:
        return np.fromiter((_TOKEN_IDS[word] for word in words), np.uint8, len(words))
    except KeyError as error:
        raise ValueError(f"unknown token {error.args[0]!r}") from None


_TOKEN_IDS = {token: i for i, token in enumerate(TOKENS)}


def to_release_text(tokens: Integer[np.ndarray, " L"]) -> str:
    """A row as the release writes it: a binary tree, where each argument joins what stands left of it in its list."""
    words: list[str] = []
    open_at: list[int] = []  # places of the open operators in `words`
    joins: list[int] = []  # and how much has joined each
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
        if open_at:  # a digit or a whole list is an argument of what is open
            words.append(")")
            joins[-1] += 1
    return " ".join(words)


def export_tsv(splits: Mapping[str, Rows], folder: Path) -> None:
    """Write rows as `basic_<split>.tsv` of the release; `rows_of(split, vocab)` takes them from a packed store."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with open(folder / f"basic_{name}.tsv", "w", encoding="ascii", newline="\n") as file:
            file.write("Source\tTarget\n")
            file.writelines(f"{to_release_text(rows[i])}\t{rows.labels[i]}\n" for i in range(len(rows)))


def encode(tokens: UInt8[np.ndarray, " L"], inputs: str) -> UInt8[np.ndarray, " M"]:
    """Tokens -> the ids of `protocol.inputs`; s4 appends one end-of-sequence id."""
    ids = tokens + np.uint8(len(SPECIAL[inputs]))
    return np.append(ids, np.uint8(EOS)) if inputs == "s4" else ids


def rows_of(split: Any, vocab: tuple[str, ...]) -> Rows:
    """A packed split (`inputs (n, L)`, `lengths`, `labels`) as rows again; `vocab` is the one it was encoded with."""
    special = len(vocab) - len(TOKENS)
    lengths = np.asarray(split.lengths, np.int64) - (special > EOS)
    parts = [ids[:length] for ids, length in zip(split.inputs, lengths, strict=True)]
    tokens = np.concatenate([np.zeros(0, np.uint8), *parts]).astype(np.uint8) - np.uint8(special if parts else 0)
    return Rows(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.asarray(split.labels, np.uint8))


def depths(ids: Integer[np.ndarray, "n L"], special: int) -> Int[np.ndarray, " n"]:
    """Depth of the deepest node of each row, the root's being 1, as `max_depth` counts.

    Args:
        ids: padded rows as a model sees them; the first `special` ids are no tokens.
    """
    found = np.empty(len(ids), np.int64)
    for first in range(0, len(ids), ROWS_PER_COUNT):
        rows = np.asarray(ids[first : first + ROWS_PER_COUNT])
        opens = (rows >= special + FIRST_OPERATOR) & (rows < special + CLOSE)
        steps = opens.astype(np.int16) - (rows == special + CLOSE)  # a row has fewer brackets than 2^15
        found[first : first + ROWS_PER_COUNT] = 1 + np.cumsum(steps, axis=1, dtype=np.int16).max(axis=1)
    return found


# --- Generator -----------------------------------------------------------------------------------------------------


class Grammar(NamedTuple):
    """Limits on a generated row, all inclusive; `max_depth` counts the root."""

    max_depth: int
    min_args: int
    max_args: int
    min_length: int
    max_length: int

    def check(self) -> None:
        """Raises ConfigError on limits that no row can meet, or that the random words cannot express."""
        if self.max_depth < 2:
            raise ConfigError(f"max_depth={self.max_depth} leaves single digits only; set task.max_depth to 2 or more")
        if not 1 <= self.min_args <= self.max_args <= 16:
            raise ConfigError(f"min_args={self.min_args}, max_args={self.max_args}: expected 1 <= min <= max <= 16")
        if not 1 <= self.min_length <= self.max_length:
            raise ConfigError(f"min_length={self.min_length}, max_length={self.max_length}: expected 1 <= min <= max")


class Level(NamedTuple):
    """All nodes of one depth, tree after tree and parent after parent: so children of a node lie side by side."""

    tokens: UInt8[np.ndarray, " M"]
    operators: Int[np.ndarray, " P"]  # places of the operators in `tokens`
    args: Int[np.ndarray, " P"]  # and how many of the next level's nodes each owns


def generate(
    sizes: Mapping[str, int],
    *,
    seed: int,
    max_depth: int,
    max_args: int,
    min_length: int,
    max_length: int,
    min_args: int = 2,
) -> dict[str, Rows]:
    """Distinct rows for each split, from `seed` alone.

    The last split is cut first, so the same seed gives the same test and validation rows whatever the size of train.

    Args:
        sizes: rows of each split.
        min_length, max_length: inclusive, in tokens.
    Raises:
        ConfigError: the limits admit too few distinct rows.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"data_seed={seed} is outside 0..2^64-1; set task.data_seed")
    grammar = Grammar(max_depth, min_args, max_args, min_length, max_length)
    grammar.check()
    rows = _distinct_rows(sum(sizes.values()), seed, grammar)
    splits, first = {}, 0
    for name in reversed(list(sizes)):
        splits[name] = rows.take(first, first + sizes[name])
        first += sizes[name]
    return {name: splits[name] for name in sizes}


def _distinct_rows(wanted: int, seed: int, grammar: Grammar) -> Rows:
    """The first `wanted` distinct rows of chunks 0, 1, 2, ... (One thread: two were 1.15 times as fast.)"""
    parts: list[Rows] = []
    seen: set[bytes] = set()
    barren = 0
    for chunk in itertools.count():
        if len(seen) >= wanted:
            break
        before = len(seen)
        parts.append(_drop_seen(draw_chunk(seed, chunk, grammar), seen))
        barren = barren + 1 if len(seen) == before else 0
        if barren == BARREN_CHUNKS:
            raise ConfigError(
                f"only {len(seen)} of {wanted} distinct rows, and none new in {BARREN_CHUNKS * DRAWS_PER_CHUNK} draws; "
                "widen task.min_length, task.max_length, task.max_depth or lower task.sizes"
            )
    return join(parts).take(0, wanted)


def _drop_seen(rows: Rows, seen: set[bytes]) -> Rows:
    fresh = []
    for i in range(len(rows)):
        digest = blake2b(rows[i].tobytes(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            fresh.append(rows.take(i, i + 1))
    return rows if len(fresh) == len(rows) else join(fresh)


def draw_chunk(seed: int, chunk: int, grammar: Grammar) -> Rows:
    """The rows within the limits among `DRAWS_PER_CHUNK` draws of the grammar, with their answers."""
    levels = _grow(np.random.Philox(key=np.array([seed, chunk], np.uint64)), grammar)
    values, sizes = _evaluate_levels(levels)
    offsets = np.concatenate([[0], np.cumsum(sizes[0])])
    return Rows(_lay_out(levels, sizes, offsets), offsets, values)


def _grow(bits: np.random.Philox, grammar: Grammar) -> list[Level]:
    """Draw trees level by level; keep those whose root is an operator and whose length is within the limits."""
    words = _draw(bits, DRAWS_PER_CHUNK)
    words = words[words < 2**30]  # a root that is a digit is no row
    tree = np.arange(len(words))
    length = np.ones(len(words), np.int64)  # tokens known so far
    drawn = []
    for depth in range(1, grammar.max_depth + 1):
        operators = np.flatnonzero(words < 2**30) if depth < grammar.max_depth else np.zeros(0, np.int64)
        args = _scale(words[operators], grammar.max_args - grammar.min_args + 1).astype(np.int64) + grammar.min_args
        np.add.at(length, tree[operators], 1 + args)
        drawn.append((words, tree, operators, args))
        growing = length[tree[operators]] <= grammar.max_length
        tree = np.repeat(tree[operators[growing]], args[growing])
        words = _draw(bits, len(tree))
    kept = (grammar.min_length <= length) & (length <= grammar.max_length)
    return [_level(*level, kept, grammar) for level in drawn]


def _draw(bits: np.random.Philox, count: int) -> UInt32[np.ndarray, " M"]:
    raw = bits.random_raw((count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[:count].astype(np.uint32, copy=False)


def _scale(words: UInt32[np.ndarray, " M"], span: int) -> UInt32[np.ndarray, " M"]:
    """Bits 0-27 of each word -> 0..span-1, span <= 16."""
    return ((words & np.uint32(2**28 - 1)) * np.uint32(span)) >> np.uint32(28)


def _level(words, tree, operators, args, kept, grammar) -> Level:
    of_kept_operators = kept[tree[operators]]
    of_kept = kept[tree]
    place = np.cumsum(of_kept) - 1  # of a kept node among the kept
    tokens = _scale(words[of_kept], 10).astype(np.uint8)
    places = place[operators[of_kept_operators]]
    tokens[places] = FIRST_OPERATOR + (words[operators[of_kept_operators]] >> 28)
    return Level(tokens, places, args[of_kept_operators])


def _evaluate_levels(levels: list[Level]) -> tuple[UInt8[np.ndarray, " R"], list[Int[np.ndarray, " M"]]]:
    """Bottom-up: the answers of the roots, and for each level the tokens under (and of) each node."""
    values, sizes = levels[-1].tokens, [np.ones(len(levels[-1].tokens), np.int64)]
    for level in reversed(levels[:-1]):
        starts = np.cumsum(level.args) - level.args
        here = np.ones(len(level.tokens), np.int64)
        if len(starts):
            here[level.operators] = 2 + np.add.reduceat(sizes[0], starts)
        sizes.insert(0, here)
        below, values = values, level.tokens.copy()
        values[level.operators] = _apply_all(level.tokens[level.operators], below, starts, level.args)
    return values, sizes


def _apply_all(operators, values, starts, args) -> UInt8[np.ndarray, " P"]:
    """All operators of a level at once: the arguments of operator p are `values[starts[p]:][:args[p]]`."""
    answers = np.zeros(len(operators), np.uint8)
    for count in np.unique(args):
        here = np.flatnonzero(args == count)
        ordered = np.sort(values[starts[here, None] + np.arange(count)], axis=1)  # (P', count)
        median = (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) // 2
        total = ordered.sum(axis=1, dtype=np.uint8) % 10  # at most 16 digits: below 256
        answers[here] = np.choose(operators[here] - FIRST_OPERATOR, [ordered[:, -1], median, ordered[:, 0], total])
    return answers


def _lay_out(levels: list[Level], sizes, offsets) -> UInt8[np.ndarray, " T"]:
    """Top-down: a node's place is its parent's, plus one, plus the sizes of its left siblings."""
    tokens = np.empty(offsets[-1], np.uint8)
    places = offsets[:-1]
    for depth, level in enumerate(levels):
        tokens[places] = level.tokens
        parents = places[level.operators]
        tokens[parents + sizes[depth][level.operators] - 1] = CLOSE
        if depth + 1 < len(levels):
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            starts = np.cumsum(level.args) - level.args
            places = before + np.repeat(parents + 1 - before[starts], level.args)
    return tokens


# --- The release ---------------------------------------------------------------------------------------------------


def read_release(path: Path) -> Iterator[tuple[UInt8[np.ndarray, " L"], int]]:
    """Rows (tokens, answer) of one released file, each checked by evaluating it.

    Raises:
        DataError: naming the file and the row (the header is row 0) of the first thing that is wrong.
    """
    with open(path, encoding="ascii", errors="replace") as file:
        header = file.readline().rstrip("\r\n")
        if header != "Source\tTarget":
            raise DataError(f"{path}, row 0: the header is {header[:80]!r}, expected 'Source<TAB>Target'")
        for row, line in enumerate(file, start=1):
            try:
                yield _read_row(line.rstrip("\r\n"))
            except ValueError as error:
                raise DataError(
                    f"{path}, row {row}: {error}; fetch the file again or set task.source=generated"
                ) from None


def _read_row(line: str) -> tuple[UInt8[np.ndarray, " L"], int]:
    source, tab, target = line.partition("\t")
    if not tab or target not in TOKENS[:FIRST_OPERATOR]:
        raise ValueError(f"found the answer {target[:20]!r}, expected a tab and one digit (is the row cut off?)")
    if "]" not in source:
        raise ValueError("no closing bracket: this file lost its brackets, as those made before March 2021 did")
    tokens = parse_text(source)
    answer = evaluate(tokens)
    if answer != int(target):
        raise ValueError(f"the answer is given as {target}, but the row evaluates to {answer}")
    return tokens, answer


# --- The task ------------------------------------------------------------------------------------------------------


class ListOps(Task):
    """ListOps, generated or released, encoded as `protocol.inputs` asks.

    Args:
        protocol: mapping with `inputs`: "lra2020" (pad 0, then the 15 tokens) or "s4" (pad, unk, eos, then the tokens;
            one eos appended).
        data_root: where the release is looked for; unused when `source` is "generated".
        source: "generated" or "release".
        max_depth, min_args, max_args, min_length, max_length: limits of the generator, both ends included; a released
            row may not exceed `max_length` either.
        sizes: rows of train, val and test; a released file must have exactly so many.
        data_seed: of the generator, independent of a run's seed.
        seq_len: padded length; None: the protocol's own.
    Raises:
        ConfigError: a value cannot be used, for one a `seq_len` that would cut a row.
    """

    num_classes = 10
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
        self.grammar = Grammar(max_depth, min_args, max_args, min_length, max_length)
        self.sizes = {split: int(sizes[split]) for split in SPLITS}
        self.data_seed = data_seed
        self.vocab = (*SPECIAL[self.inputs], *TOKENS)
        self.seq_len = self._checked_seq_len(seq_len)

    def _checked_seq_len(self, seq_len: int | None) -> int:
        longest = self.grammar.max_length + (self.inputs == "s4")
        if seq_len is None:
            if self.grammar.max_length == RELEASE_MAX_LENGTH:
                return RELEASE_SEQ_LEN[self.inputs]
            return -(-longest // 8) * 8
        if seq_len < longest:
            raise ConfigError(
                f"seq_len={seq_len} is shorter than {self.name}'s longest row, {longest}; set task.seq_len"
            )
        return seq_len

    @cached_property
    def _generated(self) -> dict[str, Rows]:
        return generate(self.sizes, seed=self.data_seed, **self.grammar._asdict())

    def examples(self, split: str) -> Iterator[Example]:
        """All rows of `split`, in the order of the file or of the generator."""
        if self.source == "generated":
            rows = self._generated[split]
            found: Iterator = ((rows[i], int(rows.labels[i])) for i in range(len(rows)))
        else:
            found = read_release(self.source_files()[SPLITS.index(split)])
        for row, (tokens, label) in enumerate(found, start=1):
            if len(tokens) > self.grammar.max_length:
                limit = f"task.max_length={self.grammar.max_length}"
                raise DataError(f"basic_{split}.tsv, row {row}: {len(tokens)} tokens, more than {limit}")
            yield Example(encode(tokens, self.inputs), label)

    def split_sizes(self) -> Mapping[str, int]:
        return self.sizes

    def fetch(self, *, download: bool, on_progress: Progress) -> None:
        try:
            obtain(RELEASE, self.data_root, download=download, on_progress=on_progress)
        except DataError as error:
            raise DataError(f"{error}; or task.source=generated draws such rows instead") from error

    def source_files(self) -> list[Path]:
        if self.source == "generated":
            return []
        folder = located(RELEASE, self.data_root, self.name)
        return [folder / name for name in RELEASE.contains]

    def fingerprint(self) -> dict[str, Any]:
        common = {"inputs": self.inputs, "seq_len": self.seq_len, "source": self.source, "sizes": self.sizes}
        return common | (self.grammar._asdict() | {"data_seed": self.data_seed} if self.source == "generated" else {})

    def export(self, splits: Mapping[str, Any], folder: str | Path) -> Path:
        """Write packed splits into `folder` as the release's files, which `source=release` reads back.

        Raises:
            LraError: one of these files is there already.
        """
        for name in splits:
            path = Path(folder) / f"basic_{name}.tsv"
            if path.exists():
                raise LraError(f"{path} exists; choose an empty folder to export to")
        export_tsv({name: rows_of(split, self.vocab) for name, split in splits.items()}, Path(folder))
        return Path(folder)

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Also `depth` of the deepest node, as `max_depth` counts it, and `root operator`."""
        special = len(SPECIAL[self.inputs])
        roots = np.asarray(split.inputs[:, 0], np.int64) - special - FIRST_OPERATOR
        known = {"depth": depths(split.inputs, special), "root operator": np.asarray(OPERATORS)[roots]}
        return super().factors(split) | known

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and `root_operator`: the most frequent train label of the row's outermost operator."""
        train, test = splits["train"], splits["test"]
        counts = np.zeros((len(self.vocab), self.num_classes), np.int64)
        np.add.at(counts, (np.asarray(train.inputs[:, 0]), np.asarray(train.labels)), 1)
        guesses = counts.argmax(axis=1)[np.asarray(test.inputs[:, 0])]
        return super().reference_lines(splits) | {"root_operator": float(np.mean(guesses == np.asarray(test.labels)))}
