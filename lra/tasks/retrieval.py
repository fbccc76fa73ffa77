"""Does one paper cite the other? Pairs of papers of the ACL Anthology Network (AAN) in the Long Range Arena release.

`tsv_data/new_aan_pairs.{train,eval,test}.tsv`, no header, five columns apart by tabs: the label as a float, two ids and
two texts. A quote is an ordinary character: readers with the default quoting of CSV join rows at an open quote and
write others back with quotes doubled, and such copies of the files are about. They are refused here.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from lra.errors import ConfigError, DataError
from lra.sources.download import obtain
from lra.sources.locate import LRA_RELEASE, Progress, Source, located
from lra.tasks.base import SPLITS, Example, Task, check_option
from lra.tasks.characters import AAN_CHARACTERS, UNK, Bytes, Characters, frequencies
from lra.tasks.linear_baseline import linear_accuracy

FILES = {split: f"new_aan_pairs.{'eval' if split == 'val' else split}.tsv" for split in SPLITS}
ARCHIVES = ("tsv_data.tar.gz", LRA_RELEASE.filename)
PAIRS = Source("AAN pairs", "tsv_data", tuple(FILES.values()), ARCHIVES, LRA_RELEASE)
SIZES = {"train": 147_086, "val": 18_090, "test": 17_437}
COLUMNS = ("label", "id1", "id2", "text1", "text2")
SEQ_LEN = 4000  # of each document, in both protocols
ROWS_PER_COUNT = 1024

REMEDY = (
    "a CSV reader with default quoting leaves such files, for it joins rows at an open quote and doubles quotes; "
    f"take the file from {LRA_RELEASE.filename}"
)


class Pair(NamedTuple):
    label: int
    ids: tuple[bytes, bytes]
    texts: tuple[bytes, bytes]


# --- Reading -------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> Iterator[tuple[int, Pair]]:
    """The rows of one file with their numbers, from 1, a row at a time.

    Raises:
        DataError: naming the file and the row of the first thing that is wrong.
    """
    with open(path, "rb") as file:  # a text file would end lines at other characters too
        for row, line in enumerate(file, start=1):
            try:
                yield row, parse_row(line.removesuffix(b"\n").removesuffix(b"\r"))
            except ValueError as error:
                raise DataError(f"{path}, row {row}: {error}") from None


def parse_row(line: bytes) -> Pair:
    """The five columns of a line without its end.

    Raises:
        ValueError: there are not five, the label is not 0 or 1, a text is empty, or one was written by a CSV writer.
    """
    fields = line.split(b"\t")
    if len(fields) != len(COLUMNS):
        raise ValueError(
            f"{len(fields)} columns, expected {len(COLUMNS)} ({', '.join(COLUMNS)}); {REMEDY}"
        )
    label, id1, id2, text1, text2 = fields
    try:
        value = float(label)
    except ValueError:
        value = -1.0
    if value not in (0.0, 1.0):
        raise ValueError(
            f"found the label {label[:20].decode(errors='replace')!r}, expected 0.0 or 1.0; {REMEDY}"
        )
    for column, text in (("text1", text1), ("text2", text2)):
        if not text:
            raise ValueError(f"{column} is empty; take the file from {LRA_RELEASE.filename}")
        if _is_csv_quoted(text):
            raise ValueError(f"{column} stands in quotes, and those in it are doubled; {REMEDY}")
    return Pair(int(value), (id1, id2), (text1, text2))


def ends_in_newline(path: Path) -> bool:
    """Whether the last row of a file is whole, as far as one can see; so is that of an empty file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"\n", b"")


def _is_csv_quoted(text: bytes) -> bool:
    """Whether a CSV writer has put the text in quotes for the quotes in it: no author doubles each of them."""
    if not (text.startswith(b'"') and text.endswith(b'"')):
        return False
    inner = text[1:-1]
    return b'""' in inner and b'"' not in inner.replace(b'""', b"")


# --- The task ------------------------------------------------------------------------------------------------------


class Retrieval(Task):
    """AAN pairs, both documents encoded as `protocol.inputs` asks; what is too long is cut at its end.

    Args:
        protocol: mapping with `inputs`: "lra2020" (bytes + 1) or "s4" (characters, one eos).
        data_root: where the folder of the three files, or the release's archive, is looked for.
        seq_len: padded length of each document; None: the protocols' own.
    Raises:
        ConfigError: a value cannot be used.
    """

    num_classes = 2
    dual = True
    vocab: tuple[str, ...]
    source = "release"
    shortage = f"the file is incomplete, or {REMEDY}"  # what may be the reason where a file has too few rows

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        seq_len: int | None = None,
    ):
        self.inputs = protocol["inputs"]
        check_option("protocol.inputs", self.inputs, ("lra2020", "s4"))
        self.name, self.data_root = name, Path(data_root)
        self.seq_len = SEQ_LEN if seq_len is None else seq_len
        if self.seq_len < 2:
            raise ConfigError(f"seq_len={seq_len} leaves no room for a document; set task.seq_len")
        self.encoding = Bytes() if self.inputs == "lra2020" else Characters(AAN_CHARACTERS)
        self.vocab = self.encoding.vocab
        self._ids: dict[str, list[tuple[bytes, bytes]]] = {}  # by split, for the notes
        self._unknown: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._cut_off: dict[str, str] = {}  # by split, of what file the last row may be

    def fetch(self, *, download: bool, on_progress: Progress) -> None:
        obtain(PAIRS, self.data_root, download=download, on_progress=on_progress)

    def source_files(self) -> list[Path]:
        folder = located(PAIRS, self.data_root, self.name)
        return [folder / name for name in PAIRS.contains]

    def examples(self, split: str) -> Iterator[Example]:
        """All pairs of `split`, in the order of the file."""
        path = self.source_files()[SPLITS.index(split)]
        self._ids[split], self._unknown[split], self._total[split] = [], 0, 0
        for row, pair in read_pairs(path):
            try:
                u, v = (self.encoding.encode(text, self.seq_len) for text in pair.texts)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {row}: byte {error.object[error.start]:#04x} at {error.start} of a text is not UTF-8; "
                    f"take the file from {LRA_RELEASE.filename}"
                ) from None
            self._ids[split].append(pair.ids)
            self._unknown[split] += int(np.count_nonzero(u == UNK) + np.count_nonzero(v == UNK))
            self._total[split] += len(u) + len(v)
            yield Example((u, v), pair.label)
        if not ends_in_newline(path):
            self._cut_off[split] = f"{path}, row {len(self._ids[split])}"

    def notes(self) -> list[str]:
        """How many rows of test have a document of train, by the ids; in s4 how many characters became unk; what is cut."""
        known = {document for pair in self._ids["train"] for document in pair}
        shared = sum(one in known or other in known for one, other in self._ids["test"])
        notes = [
            f"{shared:,} of {len(self._ids['test']):,} rows of test have a document id that train has too"
        ]
        if self.inputs == "s4":
            unknown, total = sum(self._unknown.values()), sum(self._total.values())
            notes.append(
                f"{unknown:,} of {total:,} ids are <unk>, a character that is not printable ASCII"
            )
        notes += [
            f"{place}: no newline at its end, so it may be cut off"
            for place in self._cut_off.values()
        ]
        return notes

    def packed(self) -> None:
        self._ids = {}

    def split_sizes(self) -> dict[str, int]:
        return SIZES

    def fingerprint(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "seq_len": self.seq_len}

    def to_text(self, inputs: Integer[np.ndarray, "*pair L"]) -> str:
        """One document, or the two of a pair with a line of dashes between them."""
        return "\n--------\n".join(map(self.encoding.decode, np.atleast_2d(inputs)))

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and `bag_of_bytes` or `bag_of_characters`: a linear model on |p - q| and p * q.

        p and q are the shares of each id in the two documents.
        """
        train, test = (self._features(splits[part].inputs) for part in ("train", "test"))
        used = train.any(axis=0)  # most bytes occur in no text
        accuracy = linear_accuracy(
            (train[:, used], np.asarray(splits["train"].labels)),
            (test[:, used], np.asarray(splits["test"].labels)),
            self.num_classes,
        )
        return super().reference_lines(splits) | {self.encoding.bag: accuracy}

    def _features(self, inputs: Integer[np.ndarray, "n 2 L"]) -> Float[np.ndarray, "n F"]:
        size = len(self.vocab)
        features = np.empty((len(inputs), 2 * (size - 1)))
        for first in range(0, len(inputs), ROWS_PER_COUNT):
            p, q = (
                frequencies(inputs[first : first + ROWS_PER_COUNT, side], size) for side in (0, 1)
            )
            features[first : first + ROWS_PER_COUNT] = np.concatenate(
                [np.abs(p - q), p * q], axis=1
            )
        return features
