"""What is a task? The one interface that the data store, the trainer and the tables know.

A task says where its examples come from, how they are encoded under a protocol, and which reference lines a model has to
beat. One file a task; `conf/task/<name>.yaml` names the class in `_target_` and carries every constructor argument.
"""

import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lra.errors import LraError

SPLITS = ("train", "val", "test")


class Example(NamedTuple):
    """One encoded example: `inputs` (length,) integers without padding (for a pair: two such arrays) and the class."""

    inputs: np.ndarray | tuple[np.ndarray, np.ndarray]
    label: int


class Task(abc.ABC):
    """A classification task over integer sequences.

    Subclasses set the attributes below in `__init__` and read `protocol.inputs` ("lra2020" or "s4") to decide the
    encoding. `data_root` is the folder of the publishers' files; a task that generates its data ignores it.
    """

    name: str
    inputs: str  # the protocol's encoding, `protocol.inputs`; part of the packed store's name
    num_classes: int
    seq_len: int  # L: the padded length a model sees
    vocab: tuple[str, ...] | None  # id -> token, fixed and sorted; None where the inputs are values, not ids
    dual: bool = False  # two sequences an example, as in Retrieval
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
        """Everything that changes the bytes of the packed store, as JSON values; the store's key is its hash."""

    def source_files(self) -> list[Path]:
        """Publishers' files the reader opens; their hashes go into the store's manifest. Empty for a generator."""
        return []

    def decode(self, inputs: jax.Array) -> jax.Array:
        """Stored integers (B, L) -> what the model's encoder takes, on the device: ids here, floats for images."""
        return inputs.astype(jnp.int32)

    def to_text(self, inputs: np.ndarray) -> str:
        """One stored example, readable by a person."""
        if self.vocab is None:
            return " ".join(map(str, inputs))
        return " ".join(self.vocab[i] for i in inputs)

    def export(self, splits: Mapping[str, Any], folder: Path) -> Path:
        """Write packed splits into `folder` as the publishers' files, which the task's reader takes back."""
        raise LraError(f"{self.name} has no file format of its own to export to")

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """Test accuracies (fractions) of shortcuts; every task has `majority`, the most frequent train label.

        Args:
            splits: packed splits by name, with `inputs (n, L)`, `lengths (n,)` and `labels (n,)`.
        """
        counts = np.bincount(np.asarray(splits["train"].labels), minlength=self.num_classes)
        return {"majority": float(np.mean(np.asarray(splits["test"].labels) == counts.argmax()))}
