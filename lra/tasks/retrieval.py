"""Retrieval: whether one paper cites the other, for pairs of papers of the ACL Anthology (AAN).

Source: `tsv_data/new_aan_pairs.{train,eval,test}.tsv` of the Long Range Arena release: no header,
five columns separated by tabs: the label as a float, two ids and two texts. A quote is an ordinary
character. Readers with the default quoting of CSV join rows at an open quote and write quotes
doubled; copies of the files made this way exist and are refused.
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from lra.errors import DataError
from lra.sources.locate import LRA_RELEASE, Source, open_source
from lra.tasks.base import ENCODINGS, SPLITS, Example, Task, check_at_least, check_option
from lra.tasks.characters import AAN_CHARACTERS, UNK, Bytes, Characters, frequencies
from lra.tasks.linear_baseline import linear_accuracy

FILES = tuple(f"new_aan_pairs.{'eval' if split == 'val' else split}.tsv" for split in SPLITS)
SIZES = {"train": 147_086, "val": 18_090, "test": 17_437}
COLUMNS = ("label", "id1", "id2", "text1", "text2")
SEQ_LEN = 4000  # of each document, in both protocols
ROWS_PER_COUNT = 1024
MAX_LINE = 2**27  # bytes of a row, so that no file fills the memory
REMEDY = (
    "a CSV reader with default quoting writes such files, because it joins rows at an open quote "
    f"and doubles quotes; take the file from {LRA_RELEASE.filename}"
)


class Pair(NamedTuple):
    label: int
    ids: tuple[bytes, bytes]
    texts: tuple[bytes, bytes]


class Retrieval(Task):
    """AAN pairs, encoded as `protocol.inputs` states; a longer document is cut at its end.

    The encoding is "lra2020" (bytes + 1) or "s4" (characters, one eos).

    Args:
        seq_len: padded length of each document; None for the protocols' own.
    """

    num_classes, classes = 2, ("no citation", "citation")
    dual = True
    vocab: tuple[str, ...]
    source = "release"
    shortage = f"the file is incomplete, or {REMEDY}"
    publisher = Source(
        "AAN pairs", "tsv_data", FILES, ("tsv_data.tar.gz", LRA_RELEASE.filename), LRA_RELEASE
    )

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        seq_len: int | None = None,
    ):
        self.inputs = protocol["inputs"]
        check_option("protocol.inputs", self.inputs, ENCODINGS)
        self.name, self.data_root = name, Path(data_root)
        self.seq_len = SEQ_LEN if seq_len is None else seq_len
        check_at_least("task.seq_len", self.seq_len, 2)
        self.encoding = Bytes() if self.inputs == "lra2020" else Characters(AAN_CHARACTERS)
        self.vocab = self.encoding.vocab
        # by split, for the notes
        self._ids: dict[str, list[tuple[bytes, bytes]]] = {}
        self._unknown: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._last_row: dict[str, str] = {}  # if its line has no end

    def examples(self, split: str) -> Iterator[Example]:
        path = self.source_files()[SPLITS.index(split)]
        self._ids[split], self._unknown[split], self._total[split] = [], 0, 0
        for row, pair in read_pairs(path):
            try:
                u, v = (self.encoding.encode(text, self.seq_len) for text in pair.texts)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {row}: byte {error.object[error.start]:#04x} at {error.start} of "
                    f"a text is not UTF-8; take the file from {LRA_RELEASE.filename}"
                ) from None
            self._ids[split].append(pair.ids)
            self._unknown[split] += int(np.count_nonzero(u == UNK) + np.count_nonzero(v == UNK))
            self._total[split] += len(u) + len(v)
            yield Example((u, v), pair.label)
        if not ends_in_newline(path):
            self._last_row[split] = f"{path}, row {len(self._ids[split])}"

    def split_sizes(self) -> dict[str, int]:
        return SIZES

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"inputs": self.inputs}

    def notes(self) -> list[str]:
        """Documents shared by train and test, by id; for s4 the share of unk; truncated files."""
        known = {document for pair in self._ids["train"] for document in pair}
        shared = sum(one in known or other in known for one, other in self._ids["test"])
        count = len(self._ids["test"])
        notes = [f"{shared:,} of {count:,} rows of test have a document id that train has too"]
        if self.inputs == "s4":
            unknown, total = sum(self._unknown.values()), sum(self._total.values())
            notes.append(
                f"{unknown:,} of {total:,} ids are <unk>, a character that is not printable ASCII"
            )
        return notes + [
            f"{place}: no newline at its end, so it may be truncated"
            for place in self._last_row.values()
        ]

    def packed(self) -> None:
        self._ids = {}

    def parse(self, example: str) -> Integer[np.ndarray, " L"]:
        """Ids of a document, cut at its end if it is too long."""
        return self.encoding.encode(str(example).encode(), self.seq_len)

    def to_text(self, inputs: Integer[np.ndarray, "*pair L"]) -> str:
        """One document, or the two of a pair separated by a line of dashes."""
        return "\n--------\n".join(map(self.encoding.decode, np.atleast_2d(inputs)))

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """Adds `bag_of_bytes` or `bag_of_characters`: a linear model of |p - q| and p * q.

        p and q are the shares of each id in the two documents.
        """
        train, test = (self._features(splits[part].inputs) for part in ("train", "test"))
        used = train.any(axis=0)  # most bytes occur in no text
        accuracy = linear_accuracy(
            (train[:, used], np.asarray(splits["train"].labels)),
            (test[:, used], np.asarray(splits["test"].labels)),
            self.num_classes,
        )
        return super().reference_lines(splits) | {self.encoding.baseline: accuracy}

    def _features(self, inputs: Integer[np.ndarray, "n 2 L"]) -> Float[np.ndarray, "n F"]:
        size = len(self.vocab)
        features = np.empty((len(inputs), 2 * (size - 1)))
        for first in range(0, len(inputs), ROWS_PER_COUNT):
            rows = slice(first, first + ROWS_PER_COUNT)
            p, q = (frequencies(inputs[rows, side], size) for side in (0, 1))
            features[rows] = np.concatenate([np.abs(p - q), p * q], axis=1)
        return features


def read_pairs(path: Path) -> Iterator[tuple[int, Pair]]:
    """The rows of one file, numbered from 1; raises DataError if one is malformed."""
    # text mode would also end lines at other characters
    with open_source(path) as file:
        for row, line in enumerate(iter(partial(file.readline, MAX_LINE), b""), start=1):
            try:
                if len(line) == MAX_LINE:
                    raise ValueError(f"longer than the limit of {MAX_LINE:,} bytes")
                yield row, parse_row(line.removesuffix(b"\n").removesuffix(b"\r"))
            except ValueError as error:
                raise DataError(f"{path}, row {row}: {error}") from None


def parse_row(line: bytes) -> Pair:
    """Split a line; raises ValueError if a column is missing, malformed or quoted as in CSV."""
    fields = line.split(b"\t")
    if len(fields) != len(COLUMNS):
        raise ValueError(
            f"{len(fields)} columns, expected {len(COLUMNS)} ({', '.join(COLUMNS)}); {REMEDY}"
        )
    label, id1, id2, text1, text2 = fields
    try:
        value = (0.0, 1.0).index(float(label))
    except ValueError:
        found = label[:20].decode(errors="replace")
        raise ValueError(f"found the label {found!r}, expected 0.0 or 1.0; {REMEDY}") from None
    for column, text in (("text1", text1), ("text2", text2)):
        if not text:
            raise ValueError(f"{column} is empty; take the file from {LRA_RELEASE.filename}")
        inner = text[1:-1]
        is_quoted = text.startswith(b'"') and text.endswith(b'"')
        if is_quoted and b'""' in inner and b'"' not in inner.replace(b'""', b""):
            raise ValueError(f"{column} is in quotes, and the quotes in it are doubled; {REMEDY}")
    return Pair(value, (id1, id2), (text1, text2))


def ends_in_newline(path: Path) -> bool:
    """Whether the last row of a file has its line end; true for an empty file."""
    with open_source(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"\n", b"")
