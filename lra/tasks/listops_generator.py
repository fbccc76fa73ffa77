"""Generates and evaluates ListOps expressions.

Random stream: chunk c of a seed draws 32-bit words from `random_stream(seed, c)`. Each node takes
one word, level by level (a level starts with a new 64-bit word): it is an operator if bits 30
and 31 are zero; bits 28 and 29 choose the operator; bits 0 to 27, as a fraction of 2^28, are scaled
to the number of arguments or to the digit (each probability is exact to 2^-28). A tree grows no
further level once it is known to be too long. The rest is integer arithmetic, so the rows depend on
the seed and the limits alone, not on the machine or the NumPy version.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt8, UInt32

from lra.errors import ConfigError
from lra.tasks.random_words import random_stream, words32

TOKENS = (*"0123456789", "[MAX", "[MED", "[MIN", "[SM", "]")  # sorted
FIRST_OPERATOR, CLOSE = 10, 14
OPERATORS = ("MAX", "MED", "MIN", "SM")

DRAWS_PER_CHUNK = 8192
BARREN_CHUNKS = 256  # give up after so many consecutive chunks without a new row


@dataclass(frozen=True)
class Rows:
    """Concatenated rows: row i is `tokens[offsets[i]:offsets[i + 1]]`, its answer `labels[i]`."""

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
        return Rows(
            self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0], self.labels[first:last]
        )


def join(parts: list[Rows]) -> Rows:
    """The rows of all parts, in order."""
    lengths = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
    empty = np.zeros(0, np.uint8)
    tokens = np.concatenate([empty, *(part.tokens for part in parts)])
    labels = np.concatenate([empty, *(part.labels for part in parts)])
    return Rows(tokens, np.cumsum(np.concatenate(lengths)), labels)


def evaluate(tokens: Integer[np.ndarray, " L"]) -> int:
    """The answer of one row by a stack machine; raises ValueError unless it is one expression."""
    outer: list[list[int]] = []
    current: list[int] = []  # an operator and its arguments; outside of operators: answers
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
        raise ValueError(
            f"{len(outer)} brackets left open and {len(current)} expressions, expected 0 and 1"
        )
    return current[0]


def _apply(operator: str, values: list[int]) -> int:
    if operator == "SM":
        return sum(values) % 10
    ordered, count = sorted(values), len(values)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) // 2
    return {"MIN": ordered[0], "MED": median, "MAX": ordered[-1]}[operator]


def parse_text(text: str) -> UInt8[np.ndarray, " L"]:
    """Tokens of a row as released, separated by blanks and parentheses; ValueError if unknown."""
    words = text.replace("(", " ").replace(")", " ").split()
    try:
        return np.fromiter((_TOKEN_IDS[word] for word in words), np.uint8, len(words))
    except KeyError as error:
        raise ValueError(f"unknown token {error.args[0]!r}") from None


_TOKEN_IDS = {token: i for i, token in enumerate(TOKENS)}


class Grammar(NamedTuple):
    """Limits on a generated row, all inclusive; `max_depth` counts the root."""

    max_depth: int
    min_args: int
    max_args: int
    min_length: int
    max_length: int

    def check(self) -> None:
        """Raises ConfigError if no row meets the limits or the random words cannot express them."""
        depth, min_args, max_args, shortest, longest = self
        if depth < 2:
            raise ConfigError(
                f"max_depth={depth} leaves single digits only; set task.max_depth to 2 or more"
            )
        if not 1 <= min_args <= max_args <= 16:
            raise ConfigError(
                f"min_args={min_args}, max_args={max_args}: expected 1 <= min <= max <= 16"
            )
        if not 1 <= shortest <= longest:
            raise ConfigError(
                f"min_length={shortest}, max_length={longest}: expected 1 <= min <= max"
            )


class Level(NamedTuple):
    """All nodes of one depth, ordered by tree and parent, so that siblings are adjacent."""

    tokens: UInt8[np.ndarray, " M"]
    operators: Int[np.ndarray, " P"]  # indices of the operators in `tokens`
    args: Int[np.ndarray, " P"]  # and their numbers of children in the next level


def generate(sizes: Mapping[str, int], seed: int, grammar: Grammar) -> dict[str, Rows]:
    """Distinct rows for each split, from `seed` alone.

    The last split is cut first, so that the test and validation rows do not depend on the size of
    train. Raises ConfigError if the grammar admits too few distinct rows.
    """
    grammar.check()
    rows = _distinct_rows(sum(sizes.values()), seed, grammar)
    splits, first = {}, 0
    for name in reversed(list(sizes)):
        splits[name] = rows.take(first, first + sizes[name])
        first += sizes[name]
    return {name: splits[name] for name in sizes}


def _distinct_rows(wanted: int, seed: int, grammar: Grammar) -> Rows:
    """The first `wanted` distinct rows of chunks 0, 1, 2, ..."""
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
                f"only {len(seen)} of {wanted} distinct rows, and none new in "
                f"{BARREN_CHUNKS * DRAWS_PER_CHUNK} draws; widen task.min_length, task.max_length, "
                "task.max_depth or lower task.sizes"
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
    """The rows within the limits among `DRAWS_PER_CHUNK` draws, with their answers."""
    levels = _grow(random_stream(seed, chunk), grammar)
    values, sizes = _evaluate_levels(levels)
    offsets = np.concatenate([[0], np.cumsum(sizes[0])])
    return Rows(_lay_out(levels, sizes, offsets), offsets, values)


def _grow(bits: np.random.Philox, grammar: Grammar) -> list[Level]:
    """Draw trees level by level; keep those with an operator as root and a length in the limits."""
    words = words32(bits, DRAWS_PER_CHUNK)
    words = words[words < 2**30]  # drop trees that are a single digit
    tree = np.arange(len(words))
    length = np.ones(len(words), np.int64)  # tokens drawn so far
    drawn = []
    for depth in range(1, grammar.max_depth + 1):
        is_last = depth == grammar.max_depth
        operators = np.zeros(0, np.int64) if is_last else np.flatnonzero(words < 2**30)
        span = grammar.max_args - grammar.min_args + 1
        args = grammar.min_args + _scale(words[operators], span).astype(np.int64)
        np.add.at(length, tree[operators], 1 + args)
        drawn.append((words, tree, operators, args))
        growing = length[tree[operators]] <= grammar.max_length
        tree = np.repeat(tree[operators[growing]], args[growing])
        words = words32(bits, len(tree))
    kept = (grammar.min_length <= length) & (length <= grammar.max_length)
    return [_level(*level, kept, grammar) for level in drawn]


def _scale(words: UInt32[np.ndarray, " M"], span: int) -> UInt32[np.ndarray, " M"]:
    """Scale bits 0 to 27 of each word to 0..span-1; span <= 16."""
    return ((words & np.uint32(2**28 - 1)) * np.uint32(span)) >> np.uint32(28)


def _level(words, tree, operators, args, kept, grammar) -> Level:
    of_kept_operators = kept[tree[operators]]
    of_kept = kept[tree]
    place = np.cumsum(of_kept) - 1  # index of a kept node among the kept nodes
    tokens = _scale(words[of_kept], 10).astype(np.uint8)
    places = place[operators[of_kept_operators]]
    tokens[places] = FIRST_OPERATOR + (words[operators[of_kept_operators]] >> 28)
    return Level(tokens, places, args[of_kept_operators])


def _evaluate_levels(
    levels: list[Level],
) -> tuple[UInt8[np.ndarray, " R"], list[Int[np.ndarray, " M"]]]:
    """Bottom-up: the answers of the roots, and for each level the size of each node's subtree."""
    values, sizes = levels[-1].tokens, [np.ones(len(levels[-1].tokens), np.int64)]
    for level in reversed(levels[:-1]):
        starts = np.cumsum(level.args) - level.args
        here = np.ones(len(level.tokens), np.int64)
        if len(starts):
            here[level.operators] = 2 + np.add.reduceat(sizes[0], starts)
        sizes.insert(0, here)
        below, values = values, level.tokens.copy()
        operators = level.tokens[level.operators]
        values[level.operators] = _apply_all(operators, below, starts, level.args)
    return values, sizes


def _apply_all(operators, values, starts, args) -> UInt8[np.ndarray, " P"]:
    """Answers of all operators of a level; operator p has `values[starts[p]:][:args[p]]`."""
    answers = np.zeros(len(operators), np.uint8)
    for count in np.unique(args):
        here = np.flatnonzero(args == count)
        ordered = np.sort(values[starts[here, None] + np.arange(count)], axis=1)  # (P', count)
        median = (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) // 2
        total = ordered.sum(axis=1, dtype=np.uint8) % 10  # at most 16 digits: below 256
        answers[here] = np.choose(
            operators[here] - FIRST_OPERATOR, [ordered[:, -1], median, ordered[:, 0], total]
        )
    return answers


def _lay_out(levels: list[Level], sizes, offsets) -> UInt8[np.ndarray, " T"]:
    """Top-down: a node's offset is its parent's, plus one, plus the sizes of its left siblings."""
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
