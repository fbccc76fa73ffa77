"""The interface of a task, which is all that the data store, the trainer and the tables know of it.

Each task is one file; `conf/task/<name>.yaml` names the class in `_target_` and lists every
constructor argument.
"""

import abc
import contextlib
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lra.config.schema import MAX_EXAMPLES
from lra.errors import ConfigError, DataError, LraError
from lra.sources.download import obtain
from lra.sources.locate import Progress, Source, file_hash, locate, signature
from lra.sources.tfds_reader import find_tfds
from lra.tasks.random_words import random_stream

SPLITS = ("train", "val", "test")
ENCODINGS = ("lra2020", "s4")  # valid values of protocol.inputs
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"  # of a task: part of the names of files and folders


class Example(NamedTuple):
    """One encoded example, without padding.

    `inputs` are integers of shape (length,), or (length, F) with several values per position; a
    pair has two such arrays. `label` is a class, or an array (T,) of classes.
    """

    inputs: np.ndarray | tuple[np.ndarray, np.ndarray]
    label: int | np.ndarray


class Task(abc.ABC):
    """A classification task over integer sequences.

    Subclasses set the attributes below in the class or in `__init__`. `__init__` takes `protocol`
    and `data_root` from the harness and the other arguments from the YAML file; it raises
    ConfigError if a value is not valid. The protocol has the keys `inputs` ("lra2020" or "s4": the
    encoding), `validation` ("train" or "test": the origin of validation examples if the publisher
    provides none) and `shuffle` (whether one set of files is cut into splits in random order).
    `data_root` is the folder of the publishers' files.
    """

    name: str
    inputs: str  # the encoding, as part of the packed store's name
    num_classes: int
    classes: tuple[str, ...] | None = None  # name of each class; None if its number is its name
    seq_len: int  # L: the padded length that a model sees
    vocab: tuple[str, ...] | None  # token of each id, 0 is padding; None if the inputs are values
    dual: bool = False  # two sequences per example, as in Retrieval
    num_features: int = 1  # F: values per position, 3 in a colour picture
    num_targets: int = 1  # T: classes to predict, one at each of the last T positions
    value_dtype: np.dtype = np.dtype("u1")  # of values; ids take the smallest sufficient type
    picture_shape: tuple[int, int] | None = None  # (height, width) of a picture, stored row by row
    same: Mapping[str, str] = {}  # splits that equal another split, such as {"val": "test"}
    shortage: str = ""  # possible reason if the sources hold too few examples
    allow_partial: bool = False  # set by the store: accept incomplete sources
    source: str = "generated"  # "generated", "release" or "tfds"; stored in each record
    publisher: Source | None = None  # the files that `source_files` and `fetch` look for
    tfds_name: str | None = None  # dataset of TFDS that replaces missing publisher's files
    data_root: Path
    reader_version: int = 1  # increase it if the same sources and arguments give other examples
    reference_version: int = 1  # increase it if `reference_lines` gives other lines
    arguments: Mapping[str, Any]  # of the constructor, with defaults

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        task = super().__new__(cls)
        with contextlib.suppress(TypeError):  # `__init__` raises the same with a clearer message
            bound = inspect.signature(cls.__init__).bind(task, *args, **kwargs)
            bound.apply_defaults()
            task.arguments = dict(list(bound.arguments.items())[1:])
            if "name" in task.arguments:
                check_name(task.arguments["name"])
        return task

    @abc.abstractmethod
    def examples(self, split: str) -> Iterator[Example]:
        """All examples in a fixed order; raises DataError if a source is missing or malformed."""

    def first_examples(self, split: str, count: int) -> Iterator[Example]:
        """The first `count` of `examples(split)`; a task that can generate them makes no others."""
        return itertools.islice(self.examples(split), count)

    @abc.abstractmethod
    def split_sizes(self) -> Mapping[str, int] | None:
        """Number of examples per split if known in advance (another number is refused), or None."""

    def unused_arguments(self) -> Sequence[str]:
        """Constructor arguments that change no stored byte, given the other arguments."""
        return ()

    def fingerprint(self) -> dict[str, Any]:
        """The settings that change the stored bytes, as JSON values; part of the store's name.

        Contains every constructor argument that `unused_arguments` does not list. A task whose
        examples depend on the protocol adds the relevant settings of the protocol.
        """
        ignored = {"protocol", "data_root", "name", *self.unused_arguments()}
        found = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in getattr(self, "arguments", {}).items()
            if name not in ignored
        }
        return found | ({"seq_len": self.seq_len} if "seq_len" in found else {})

    @property
    def num_tokens(self) -> int | None:
        """V: number of ids that the model embeds; None if it takes the values themselves."""
        return None if self.vocab is None else len(self.vocab)

    def source_folder(self) -> Path:
        """The publisher's folder, else the one prepared by TFDS, else DataError; sets `source`."""
        source = self.publisher
        assert source is not None
        self.source = "release"
        if folder := locate(source, self.data_root):
            return folder
        if self.tfds_name and (folder := find_tfds(self.data_root, self.tfds_name)):
            self.source = "tfds"
            return folder
        or_else = f", or {source.alternative}" if source.alternative else ""
        raise DataError(
            f"{source.title}: no folder {source.folder} under {self.data_root}; run `lra data "
            f"prepare {self.name}`{or_else}"
        )

    def fetch(self, *, download: bool, on_progress: Progress) -> None:
        """Unpack the source files, which may be downloaded; raises DataError if there are none."""
        if self.publisher is not None:
            obtain(self.publisher, self.data_root, download=download, on_progress=on_progress)

    def source_files(self) -> Sequence[Path]:
        """Files or folders whose names, sizes and times identify the sources, else DataError."""
        if self.publisher is None:
            return []
        folder = self.source_folder()
        if self.source == "tfds":
            return sorted(path for path in folder.iterdir() if path.is_file())
        return [folder / name for name in self.publisher.contains]

    def source_signature(self) -> list[Any]:
        """JSON values that change with the source files; the other part of the store's name."""
        return list(signature(self.source_files()))

    def source_hashes(self) -> list[dict[str, str]]:
        """`name` and `sha256` of the sources; called after `examples` of each split was read."""
        return [{"name": path.name, "sha256": file_hash(path)} for path in self.source_files()]

    def notes(self) -> list[str]:
        """Known defects found in the sources; called after `examples` of each split was read."""
        return []

    def packed(self) -> None:
        """Called once the store is complete: delete what was kept to resume the preparation."""

    def decode(self, inputs: jax.Array) -> jax.Array:
        """Map stored integers (B, ..., L[, F]) to the model's input, on the device.

        The input is ids (B, ..., L) here; a task of values returns floats (B, ..., L, F).
        """
        return inputs.astype(jnp.int32)

    def label_text(self, label: Any) -> str:
        """A stored label, with the name of its class if the classes have names."""
        text = np.array2string(np.asarray(label))
        return text if self.classes is None else f"{text} ({self.classes[int(label)]})"

    def parse(self, example: Any) -> np.ndarray:
        """The stored form of one sequence of one's own, without padding; inverse of `to_text`.

        Takes tokens of `vocab` separated by blanks; a task with another form of text, or of
        pictures, overrides it.

        Raises:
            DataError: another form than that of the task.
        """
        ids = {token: i for i, token in enumerate(self.vocab or ())}
        words = str(example).split()
        if unknown := [word for word in words if word not in ids]:
            raise DataError(
                f"{self.name}: unknown token {unknown[0]!r}; expected some of "
                f"{' '.join(list(ids)[1:20])}{' ...' * (len(ids) > 20)}"
            )
        return np.array([ids[word] for word in words], np.int64)

    def encode(self, *examples: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and lengths of examples of one's own, as `model(inputs, lengths)` takes them.

        Args:
            examples: as `parse` takes them; for a task of pairs, tuples of two.

        Raises:
            DataError: an example has another form than those of the task, or is too long.
        """
        sides = 2 if self.dual else 1
        features = (self.num_features,) if self.num_features > 1 else ()
        inputs = np.zeros((len(examples), sides, self.seq_len, *features), np.int32)
        lengths = np.zeros(inputs.shape[:2], np.int32)
        for row, example in enumerate(examples):
            pair = example if self.dual else (example,)
            if not isinstance(pair, (tuple, list)) or len(pair) != sides:
                raise DataError(f"{self.name}: expected a tuple of two sequences for each example")
            for side, sequence in enumerate(pair):
                found = self.parse(sequence)
                least = self.seq_len if self.num_targets > 1 else 1
                if not least <= len(found) <= self.seq_len:
                    raise DataError(
                        f"{self.name}: a sequence of length {len(found)}; expected {least} to "
                        f"{self.seq_len}"
                    )
                inputs[row, side, : len(found)], lengths[row, side] = found, len(found)
        if not self.dual:
            inputs, lengths = inputs[:, 0], lengths[:, 0]
        return self.decode(jnp.asarray(inputs)), jnp.asarray(lengths)

    def to_text(self, inputs: np.ndarray) -> str:
        """One stored example without padding, as readable text."""
        if self.vocab is None:
            return " ".join(map(str, inputs.tolist()))
        return " ".join(self.vocab[i] for i in inputs)

    def export(self, splits: Mapping[str, Any], folder: Path) -> Path:
        """Write packed splits into `folder` in the publisher's format, which the task can read."""
        raise LraError(f"{self.name} has no file format of its own to export to")

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Properties of each example by which `lra diagnose` groups accuracy: name -> values (n,).

        The default is the label, and the length if it varies. A task adds its own. `split` is a
        `lra.data.store.Split`.
        """
        lengths, labels = np.asarray(split.lengths), np.asarray(split.labels)
        found = {"label": labels} if labels.ndim == 1 else {}
        if (lengths == self.seq_len).all():
            return found
        names = ("length of the first", "length of the second") if self.dual else ("length",)
        return found | dict(zip(names, lengths.reshape(len(lengths), -1).T, strict=True))

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """Test accuracies (fractions) of simple baselines that a model has to beat.

        `majority` predicts the most frequent label of train. A task adds its own. `splits` maps
        names to `lra.data.store.Split`s.
        """
        counts = np.bincount(np.asarray(splits["train"].labels).ravel(), minlength=self.num_classes)
        return {"majority": float(np.mean(np.asarray(splits["test"].labels) == counts.argmax()))}


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` can be part of a file's name."""
    if not re.fullmatch(NAME, str(name)):
        raise ConfigError(
            f"task.name={name!r}: expected letters, digits, _, - and . (not first), at most 64"
        )


def check_option(key: str, found: Any, allowed: Sequence[str]) -> None:
    """Raises ConfigError unless `found` is one of `allowed`."""
    if found not in allowed:
        raise ConfigError(f"{key}={found} is unknown; expected {' or '.join(allowed)}")


def check_at_least(key: str, found: int, least: int) -> None:
    """Raises ConfigError if `found` is less than `least`."""
    if found < least:
        raise ConfigError(f"{key}={found}: expected {least} or more")


def check_data_seed(seed: int) -> None:
    """Raises ConfigError unless `seed` fits the half of a Philox key."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"task.data_seed={seed} is outside 0..2^64-1")


def check_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """`sizes` in the order of `SPLITS`; raises ConfigError unless each is 1 to `MAX_EXAMPLES`."""
    if set(sizes) != set(SPLITS):
        raise ConfigError(
            f"task.sizes={dict(sizes)}: expected the number of examples of {', '.join(SPLITS)}"
        )
    for split in SPLITS:
        check_at_least(f"task.sizes.{split}", sizes[split], 1)
        if sizes[split] > MAX_EXAMPLES:
            raise ConfigError(
                f"task.sizes.{split}={sizes[split]}: expected at most {MAX_EXAMPLES:,}"
            )
    return {split: int(sizes[split]) for split in SPLITS}


def permutation(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1 (int64) that depends on `seed` alone, not on NumPy's version."""
    return np.argsort(random_stream(seed, count).random_raw(count), kind="stable")
