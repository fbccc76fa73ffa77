"""Text: sentiment of 50,000 IMDB reviews (Maas et al. 2011), read by bytes or by characters.

Source: the publisher's `aclImdb/{train,test}/{neg,pos}/<id>_<rating>.txt`, in this order: neg
(label 0) before pos (label 1), by number within each. If only the folder prepared by TFDS is
present (`imdb_reviews/plain_text`), the same reviews are read in TFDS's order.

IMDB has no validation split. A protocol uses test instead or takes a tenth of each class of train
(1,250 of 12,500), chosen by `data_seed` and the text of the reviews alone. So the choice is the
same in TFDS's order, and equal reviews are on the same side. Both parts keep the files' order.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from lra.errors import DataError
from lra.sources.locate import IMDB, Source, read_source
from lra.sources.tfds_reader import read_tfds
from lra.tasks.base import (
    ENCODINGS,
    Example,
    Task,
    check_at_least,
    check_data_seed,
    check_option,
)
from lra.tasks.characters import IMDB_CHARACTERS, IMDB_UNUSED, Bytes, Characters, frequencies
from lra.tasks.linear_baseline import linear_accuracy

PARTS = ("train", "test")
CLASSES = ("neg", "pos")  # label 0, label 1
RATINGS = (range(1, 5), range(7, 11))  # of each class; reviews rated 5 and 6 are not in the data
FILE_NAME = re.compile(r"(\d+)_(\d+)\.txt")
SEQ_LEN = {"lra2020": 4000, "s4": 4096}


class Review(NamedTuple):
    place: str  # the file or the record, for messages
    text: bytes
    label: int


class Text(Task):
    """IMDB reviews, encoded as `protocol.inputs` states; a longer review is cut at its end.

    The encoding is "lra2020" (bytes + 1) or "s4" (characters, one eos).

    Args:
        data_seed: of the choice of validation reviews, independent of a run's seed.
        seq_len: padded length; None for the protocol's own.
    """

    num_classes, classes = 2, CLASSES
    vocab: tuple[str, ...]
    source = "release"
    tfds_name = "imdb_reviews/plain_text"
    publisher = Source(
        "IMDB reviews",
        "aclImdb",
        tuple(f"{part}/{name}" for part in PARTS for name in CLASSES),
        (IMDB.filename,),
        IMDB,
    )

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        data_seed: int,
        seq_len: int | None = None,
    ):
        self.inputs, self.validation = protocol["inputs"], protocol["validation"]
        check_option("protocol.inputs", self.inputs, ENCODINGS)
        check_option("protocol.validation", self.validation, PARTS)
        check_data_seed(data_seed)
        self.name, self.data_root, self.data_seed = name, Path(data_root), data_seed
        self.seq_len = SEQ_LEN[self.inputs] if seq_len is None else seq_len
        check_at_least("task.seq_len", self.seq_len, 2)
        is_bytes = self.inputs == "lra2020"
        self.encoding = Bytes() if is_bytes else Characters(IMDB_CHARACTERS, IMDB_UNUSED)
        self.vocab = self.encoding.vocab
        self.same = {"val": "test"} if self.validation == "test" else {}
        self._hashes: dict[str, str] = {}  # of the publisher's folders, filled while reading
        self._train: list[Review] = []  # kept until the store is complete, because val needs it

    def examples(self, split: str) -> Iterator[Example]:
        for review in self._reviews(self.same.get(split, split)):
            yield Example(self._encode(review), review.label)

    def split_sizes(self) -> dict[str, int]:
        if self.validation == "test":
            return {"train": 25_000, "val": 25_000, "test": 25_000}
        return {"train": 22_500, "val": 2_500, "test": 25_000}

    def unused_arguments(self) -> Sequence[str]:
        return ("data_seed",) if self.validation == "test" else ()

    def fingerprint(self) -> dict[str, Any]:
        found = super().fingerprint() | {"inputs": self.inputs, "validation": self.validation}
        # reviews were once chosen by their position
        return found | ({"chosen_by": "text"} if self.validation == "train" else {})

    def source_hashes(self) -> list[dict[str, str]]:
        """One hash of names and contents for each of the four folders; one for each TFDS file."""
        if self.source == "tfds":
            return super().source_hashes()
        return [{"name": name, "sha256": digest} for name, digest in self._hashes.items()]

    def packed(self) -> None:
        self._train = []

    def parse(self, example: str) -> Integer[np.ndarray, " L"]:
        """Ids of a review, cut at its end if it is too long."""
        return self.encoding.encode(str(example).encode(), self.seq_len)

    def to_text(self, inputs: Integer[np.ndarray, " L"]) -> str:
        return self.encoding.decode(inputs)

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and `bag_of_bytes` or `bag_of_characters`: a linear model of frequencies."""
        train, test = (
            (frequencies(splits[part].inputs, len(self.vocab)), np.asarray(splits[part].labels))
            for part in PARTS
        )
        accuracy = linear_accuracy(train, test, self.num_classes)
        return super().reference_lines(splits) | {self.encoding.baseline: accuracy}

    def _reviews(self, split: str) -> list[Review]:
        if split == "test" or self.validation == "test":
            return self._read(split)
        if split == "train" or not self._train:
            self._train = self._read("train")
        wanted = held_out(self._train, self.data_seed) == (split == "val")
        return [review for review, kept in zip(self._train, wanted, strict=True) if kept]

    def _read(self, part: str) -> list[Review]:
        folder = self.source_folder()
        if self.source == "tfds":
            return list(read_prepared(folder, part))
        reviews = []
        for label, name in enumerate(CLASSES):
            found, self._hashes[f"{part}/{name}"] = read_folder(folder / part / name, label)
            reviews += found
        return reviews

    def _encode(self, review: Review) -> np.ndarray:
        if not review.text.strip():
            raise DataError(f"{review.place}: an empty review; fetch {IMDB.filename} again")
        try:
            return self.encoding.encode(review.text, self.seq_len)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{review.place}: byte {error.start} ({review.text[error.start]:#04x}) is not "
                f"UTF-8; fetch {IMDB.filename} again"
            ) from None


def read_folder(folder: Path, label: int) -> tuple[list[Review], str]:
    """The reviews of one folder ordered by number, and a SHA-256 of their names and contents.

    Raises DataError if a .txt file has another form of name or a rating of the other class.
    """
    paths = [path for path in folder.glob("*.txt") if not path.name.startswith(".")]
    digest, reviews = hashlib.sha256(), []
    for path in sorted(paths, key=lambda path: _number_and_rating(path, label)):
        text = read_source(path)
        digest.update(f"{path.name} {len(text)}\n".encode() + text)
        reviews.append(Review(str(path), text, label))
    return reviews, digest.hexdigest()


def _number_and_rating(path: Path, label: int) -> tuple[int, int]:
    match = FILE_NAME.fullmatch(path.name)
    if match is None:
        raise DataError(
            f"{path}: a review's file is named <id>_<rating>.txt; remove it from the folder"
        )
    number, rating = int(match[1]), int(match[2])
    if rating not in RATINGS[label]:
        raise DataError(
            f"{path}: rated {rating}, but {CLASSES[label]} has ratings {RATINGS[label][0]} to "
            f"{RATINGS[label][-1]}; fetch {IMDB.filename} again"
        )
    return number, rating


def read_prepared(folder: Path, part: str) -> Iterator[Review]:
    """The reviews of a part in a folder that TFDS prepared; raises DataError if one is damaged."""
    for i, record in enumerate(read_tfds(folder, part)):
        place = f"{folder}, split {part}, record {i}"
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, bytes) or label not in (0, 1):
            raise DataError(
                f"{place}: found the label {label!r}, expected a text and the label 0 or 1; "
                "prepare it again"
            )
        yield Review(place, text, int(label))


def held_out(reviews: Sequence[Review], seed: int) -> Bool[np.ndarray, " n"]:
    """Mask of the validation reviews: a tenth of each class, at least one.

    Reviews are taken in the order of the SHA-256 of `seed` and text, equal texts together. Equal
    texts that no longer fit into the tenth of their class are skipped.
    """
    same_text: dict[bytes, list[int]] = {}
    for row, review in enumerate(reviews):
        # TFDS strips white space at both ends
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
