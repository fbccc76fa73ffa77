"""What is a task? The one interface that the data store, the trainer and the tables know.

A task says where its examples come from, how they are encoded under a protocol, and which reference lines a model has to
beat. One file a task; `conf/task/<name>.yaml` names the class in `_target_` and carries every constructor argument.
"""

import abc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lra.errors import ConfigError, LraError
from lra.sources.locate import Progress, signature

SPLITS = ("train", "val", "test")


class Example(NamedTuple):
    """One encoded example, without padding.

    `inputs` are integers (length,), or (length, F) where a position has several values; for a pair, two such arrays.
    `label` is the class, or an array (T,) of classes where the task asks for several.
    """

    inputs: np.ndarray | tuple[np.ndarray, np.ndarray]
    label: int | np.ndarray


class Task(abc.ABC):
    """A classification task over integer sequences.

    Subclasses set the attributes below in `__init__` and read the protocol there: `inputs` ("lra2020" or "s4") decides
    the encoding, `validation` ("train" or "test") where validation comes from when the publisher gives none, `shuffle`
    whether what the task cuts into splits is shuffled before. `data_root` is the folder of the publishers' files; a
    task that generates its data ignores it.
    """

    name: str
    inputs: str  # the encoding, as part of the packed store's name
    num_classes: int
    seq_len: int  # L: the padded length a model sees
    vocab: (
        tuple[str, ...] | None
    )  # id -> token, fixed and sorted, 0 is padding; None where the inputs are values
    dual: bool = False  # two sequences an example, as in Retrieval
    num_features: int = 1  # F: values a position, 3 in a colour picture
    num_targets: int = 1  # T: classes to predict, one at each of the last T positions
    value_dtype: np.dtype = np.dtype(
        "u1"
    )  # of values; ids take the smallest type that holds the vocabulary
    picture_shape: tuple[int, int] | None = (
        None  # (height, width) where the sequence is a picture, row by row
    )
    same: Mapping[
        str, str
    ] = {}  # splits that are another one under a second name, such as {"val": "test"}
    shortage: str = ""  # what may be the reason where the sources hold too few examples
    allow_partial: bool = False  # set by the store: read what is there of incomplete sources
    source: str = "generated"  # which data this is: "generated" or "release"; stored in each record
    reader_version: int = 1  # raise it when the same sources give other examples

    @abc.abstractmethod
    def examples(self, split: str) -> Iterator[Example]:
        """All examples of `split` in their fixed order.

        Raises:
            DataError: a source file is missing or malformed; the message names file, row and remedy.
        """

    @abc.abstractmethod
    def split_sizes(self) -> Mapping[str, int] | None:
        """Examples a split where they are known beforehand (so that a short file is refused), else None."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """The settings that change the bytes of the packed store, as JSON values; part of the store's key."""

    @property
    def num_tokens(self) -> int | None:
        """V: ids that the model embeds; None where it takes the values themselves."""
        return None if self.vocab is None else len(self.vocab)

    def fetch(self, *, download: bool, on_progress: Progress) -> None:
        """Make the source files be there: unpack their archive, download it where asked. Nothing for a generator.

        Raises:
            DataError: they are nowhere; the message says which file to get from where and where to put it.
        """

    def source_files(self) -> Sequence[Path]:
        """Files whose names, sizes and times identify the sources; empty for a generator. Quick: reads none of them.

        Raises:
            DataError: they are not there.
        """
        return []

    def source_signature(self) -> list[Any]:
        """JSON values that change with the sources, empty for a generator; the other part of the store's key."""
        return list(signature(self.source_files()))

    def source_hashes(self) -> list[dict[str, str]]:
        """`name` and `sha256` of what was read, for the manifest; asked after `examples` of every split ran out."""
        return [{"name": path.name, "sha256": file_hash(path)} for path in self.source_files()]

    def notes(self) -> list[str]:
        """Known defects met in the sources and what was done about them; asked after `examples` ran out."""
        return []

    def packed(self) -> None:
        """The store is complete: what was kept for an interrupted preparation can go."""

    def decode(self, inputs: jax.Array) -> jax.Array:
        """Stored integers (B, ..., L[, F]) -> what the model's encoder takes, on the device.

        Ids (B, ..., L) here; a task of values gives floats (B, ..., L, F).
        """
        return inputs.astype(jnp.int32)

    def to_text(self, inputs: np.ndarray) -> str:
        """One stored example without its padding, readable by a person."""
        if self.vocab is None:
            return " ".join(map(str, inputs.tolist()))
        return " ".join(self.vocab[i] for i in inputs)

    def export(self, splits: Mapping[str, Any], folder: Path) -> Path:
        """Write packed splits into `folder` as the publishers' files, which the task's reader takes back."""
        raise LraError(f"{self.name} has no file format of its own to export to")

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """What examples differ in, by which `lra diagnose` breaks accuracy down: integers or strings (n,) by name.

        Here the label, and the lengths where they differ. A task adds what it knows of its examples.

        Args:
            split: packed examples with `inputs (n, L)`, `lengths (n,)` and `labels (n,)`, as in a store.
        """
        lengths, labels = np.asarray(split.lengths), np.asarray(split.labels)
        found = {"label": labels} if labels.ndim == 1 else {}
        if (lengths == self.seq_len).all():
            return found
        names = ("length of the first", "length of the second") if self.dual else ("length",)
        return found | dict(zip(names, lengths.reshape(len(lengths), -1).T, strict=True))

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """Test accuracies (fractions) of shortcuts; every task has `majority`, the most frequent train label.

        Args:
            splits: packed splits by name, with `inputs (n, L)`, `lengths (n,)` and `labels (n,)`.
        """
        counts = np.bincount(np.asarray(splits["train"].labels).ravel(), minlength=self.num_classes)
        return {"majority": float(np.mean(np.asarray(splits["test"].labels) == counts.argmax()))}


def check_option(key: str, found: Any, allowed: Sequence[str]) -> None:
    """Raises: ConfigError, if `found` is none of the options."""
    if found not in allowed:
        raise ConfigError(f"{key}={found} is unknown; expected {' or '.join(allowed)}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1 (int64) from `seed` alone, on every machine and NumPy version (raw Philox words)."""
    return np.argsort(
        np.random.Philox(key=np.array([seed, count], np.uint64)).random_raw(count), kind="stable"
    )
