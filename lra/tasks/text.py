"""Is a film review positive? 50,000 reviews of IMDB (Maas et al. 2011), read byte by byte or character by character.

The publisher's folder `aclImdb/{train,test}/{neg,pos}/<id>_<rating>.txt`, in this order: neg (label 0) before pos (label
1), by number within each. Where only the folder is there that TFDS has prepared (`imdb_reviews/plain_text`), that is read
in TFDS's order; the reviews are the same.

IMDB has no validation split. A protocol takes test for it or carves it from train: a tenth of each class (1,250 of
12,500), chosen by `data_seed` and the reviews' text alone. So it is the same for TFDS's order, and of a review that
train has twice both copies are on one side. Both parts keep the order of the files.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from lra.errors import ConfigError, DataError
from lra.sources.download import obtain
from lra.sources.locate import IMDB, Progress, Source, locate, located
from lra.sources.tfds_reader import find_tfds, read_tfds
from lra.tasks.base import Example, Task, check_option
from lra.tasks.characters import IMDB_CHARACTERS, IMDB_UNUSED, Bytes, Characters, frequencies
from lra.tasks.linear_baseline import linear_accuracy

PARTS = ("train", "test")
CLASSES = ("neg", "pos")  # label 0, label 1
RATINGS = (range(1, 5), range(7, 11))  # of each class; reviews rated 5 and 6 are not in the data
FILE_NAME = re.compile(r"(\d+)_(\d+)\.txt")
REVIEWS = Source(
    "IMDB reviews",
    "aclImdb",
    tuple(f"{part}/{name}" for part in PARTS for name in CLASSES),
    (IMDB.filename,),
    IMDB,
)
TFDS_NAME = "imdb_reviews/plain_text"
SEQ_LEN = {"lra2020": 4000, "s4": 4096}


class Review(NamedTuple):
    place: str  # for messages: the file, or the record
    text: bytes
    label: int


# --- Reading -------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, label: int) -> tuple[list[Review], str]:
    """The reviews of one folder by their number, and a SHA-256 over their names and contents in this order.

    Raises:
        DataError: a .txt file is not named <id>_<rating>.txt, or its rating is not one of the folder's class.
    """
    names = [
        name for name in os.listdir(folder) if name.endswith(".txt") and not name.startswith(".")
    ]
    digest, reviews = hashlib.sha256(), []
    for name in sorted(names, key=lambda name: _numbers(folder / name, label)):
        text = (folder / name).read_bytes()
        digest.update(f"{name} {len(text)}\n".encode())
        digest.update(text)
        reviews.append(Review(str(folder / name), text, label))
    return reviews, digest.hexdigest()


def _numbers(path: Path, label: int) -> tuple[int, int]:
    match = FILE_NAME.fullmatch(path.name)
    if match is None:
        raise DataError(
            f"{path}: a review's file is named <id>_<rating>.txt; take it out of the folder"
        )
    number, rating = int(match[1]), int(match[2])
    if rating not in RATINGS[label]:
        raise DataError(
            f"{path}: rated {rating}, but {CLASSES[label]} has ratings {RATINGS[label][0]} to {RATINGS[label][-1]}; "
            f"fetch {IMDB.filename} again"
        )
    return number, rating


def read_prepared(folder: Path, part: str) -> Iterator[Review]:
    """The reviews of "train" or "test" in a folder that TFDS has prepared.

    Raises:
        DataError: a record has not the features `text` (bytes) and `label` (0 or 1), or the folder is damaged.
    """
    for i, record in enumerate(read_tfds(folder, part)):
        place = f"{folder}, split {part}, record {i}"
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, bytes) or label not in (0, 1):
            raise DataError(
                f"{place}: found the label {label!r}, expected a text and the label 0 or 1; prepare it again"
            )
        yield Review(place, text, int(label))


def held_out(reviews: Sequence[Review], seed: int) -> Bool[np.ndarray, " n"]:
    """Which rows of train are validation: a tenth of each class, at least one, by the SHA-256 of `seed` and text.

    The smallest hashes are taken, equal texts together; where they are more than their class has room for, the next.
    """
    same_text: dict[bytes, list[int]] = {}
    for row, review in enumerate(reviews):
        # without the white space at its ends, which TFDS removes
        digest = hashlib.sha256(seed.to_bytes(8, "big") + review.text.strip()).digest()
        same_text.setdefault(digest, []).append(row)
    labels = np.array([review.label for review in reviews], np.int64)
    room = np.maximum(1, np.bincount(labels, minlength=len(CLASSES)) // 10)
    chosen = np.zeros(len(reviews), bool)
    for _, rows in sorted(same_text.items()):
        wanted = np.bincount(labels[rows], minlength=len(CLASSES))
        if (wanted <= room).all():
            chosen[rows] = True
            room -= wanted
    return chosen


# --- The task ------------------------------------------------------------------------------------------------------


class Text(Task):
    """IMDB reviews, encoded as `protocol.inputs` asks; what is too long is cut at its end.

    Args:
        protocol: mapping with `inputs`: "lra2020" (bytes + 1) or "s4" (characters, one eos); and `validation`: "train"
            (a tenth of train) or "test" (test itself).
        data_root: where the publisher's folder, its archive or TFDS's folder is looked for.
        data_seed: of the choice of validation rows, independent of a run's seed; unused where test serves.
        seq_len: padded length; None: the protocol's own.
    Raises:
        ConfigError: a value cannot be used.
    """

    num_classes = 2
    vocab: tuple[str, ...]
    source = "release"  # or "tfds", once that folder was found in place of the publisher's

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        data_seed: int,
        seq_len: int | None = None,
    ):
        self.inputs, self.validation = protocol["inputs"], protocol["validation"]
        check_option("protocol.inputs", self.inputs, tuple(SEQ_LEN))
        check_option("protocol.validation", self.validation, ("train", "test"))
        if not 0 <= data_seed < 2**64:
            raise ConfigError(f"data_seed={data_seed} is outside 0..2^64-1; set task.data_seed")
        self.name, self.data_root, self.data_seed = name, Path(data_root), data_seed
        self.seq_len = SEQ_LEN[self.inputs] if seq_len is None else seq_len
        if self.seq_len < 2:
            raise ConfigError(f"seq_len={seq_len} leaves no room for a review; set task.seq_len")
        self.encoding = (
            Bytes() if self.inputs == "lra2020" else Characters(IMDB_CHARACTERS, IMDB_UNUSED)
        )
        self.vocab = self.encoding.vocab
        self.same = {"val": "test"} if self.validation == "test" else {}
        self._hashes: dict[str, str] = {}
        self._train: list[Review] = []  # while two splits are made of it

    def _find(self) -> Path | None:
        """The publisher's folder, else TFDS's, else None; sets `source`."""
        folder = locate(REVIEWS, self.data_root)
        prepared = None if folder else find_tfds(self.data_root, TFDS_NAME)
        self.source = "tfds" if prepared else "release"
        return folder or prepared

    def _folder(self) -> Path:
        return self._find() or located(REVIEWS, self.data_root, self.name)

    def fetch(self, *, download: bool, on_progress: Progress) -> None:
        if self._find() is None:
            obtain(REVIEWS, self.data_root, download=download, on_progress=on_progress)

    def source_files(self) -> list[Path]:
        """The four folders, whose times tell of added and removed files; or TFDS's files."""
        folder = self._folder()
        if self.source == "tfds":
            return sorted(path for path in folder.iterdir() if path.is_file())
        return [folder / name for name in REVIEWS.contains]

    def source_hashes(self) -> list[dict[str, str]]:
        """One for each of the four folders, over names and contents; or one for each of TFDS's files."""
        if self.source == "tfds":
            return super().source_hashes()
        return [{"name": name, "sha256": digest} for name, digest in self._hashes.items()]

    def packed(self) -> None:
        self._train = []

    def _read(self, part: str) -> list[Review]:
        folder = self._folder()
        if self.source == "tfds":
            return list(read_prepared(folder, part))
        reviews = []
        for label, name in enumerate(CLASSES):
            found, self._hashes[f"{part}/{name}"] = read_folder(folder / part / name, label)
            reviews += found
        return reviews

    def examples(self, split: str) -> Iterator[Example]:
        """All reviews of `split`, in the order of the files."""
        for review in self._of_split(self.same.get(split, split)):
            yield Example(self._encode(review), review.label)

    def _of_split(self, split: str) -> list[Review]:
        if split == "test" or self.validation == "test":
            return self._read(split)
        if split == "train" or not self._train:
            self._train = self._read("train")
        chosen = held_out(self._train, self.data_seed)
        return [
            review
            for review, is_val in zip(self._train, chosen, strict=True)
            if is_val == (split == "val")
        ]

    def _encode(self, review: Review) -> np.ndarray:
        if not review.text.strip():
            raise DataError(f"{review.place}: an empty review; fetch {IMDB.filename} again")
        try:
            return self.encoding.encode(review.text, self.seq_len)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{review.place}: byte {error.start} ({review.text[error.start]:#04x}) is not UTF-8; "
                f"fetch {IMDB.filename} again"
            ) from None

    def split_sizes(self) -> dict[str, int]:
        if self.validation == "test":
            return {"train": 25_000, "val": 25_000, "test": 25_000}
        return {"train": 22_500, "val": 2_500, "test": 25_000}

    def fingerprint(self) -> dict[str, Any]:
        common = {"inputs": self.inputs, "seq_len": self.seq_len, "validation": self.validation}
        return common | (
            {"data_seed": self.data_seed, "chosen_by": "text"} if self.validation == "train" else {}
        )

    def to_text(self, inputs: Integer[np.ndarray, " L"]) -> str:
        return self.encoding.decode(inputs)

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and a linear model on how often each id occurs: `bag_of_bytes` or `bag_of_characters`."""
        train, test = (
            (frequencies(splits[part].inputs, len(self.vocab)), np.asarray(splits[part].labels))
            for part in PARTS
        )
        return super().reference_lines(splits) | {
            self.encoding.bag: linear_accuracy(train, test, self.num_classes)
        }
