"""The files of a packed store: the schema of its manifest, and its arrays, opened and checked.

A store may be damaged or come from elsewhere. What does not fit the schema, or is not an array of
integers of the size that the manifest states, ends in a DataError. `lra.data.verify` checks values
and hashes.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from jaxtyping import Int, Integer
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lra.errors import DataError, first_problem
from lra.sources.locate import read_source
from lra.tasks.base import NAME

STORE_VERSION = 2  # increase it if the same task gives other bytes
ARRAYS = ("inputs", "lengths", "labels")
BYTES_PER_BLOCK = 2**22
MAX_MANIFEST_BYTES = 2**26

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Lengths(TypedDict):
    min: Count
    mean: Number
    max: Count


class Bytes(TypedDict):
    inputs: Count
    lengths: Count
    labels: Count


class SplitEntry(TypedDict):
    count: Count
    labels: list[Count]  # examples of each class
    lengths: Lengths
    sha256: Digest  # of the arrays' contents
    bytes: Bytes  # of the files
    same_as: NotRequired[str]  # the split whose files these are


class SplitEntries(TypedDict):
    train: SplitEntry
    val: SplitEntry
    test: SplitEntry


class SourceFile(TypedDict):
    name: str
    sha256: str


class Versions(TypedDict):
    store: int
    reader: int
    numpy: str
    reference: NotRequired[int]  # of the reference lines; absent for 1


class Manifest(TypedDict):
    """manifest.json."""

    task: Annotated[str, Field(pattern=f"^{NAME}$")]
    inputs: str
    source: str
    seq_len: Annotated[int, Field(ge=1)]
    num_classes: Annotated[int, Field(ge=1)]
    dual: bool
    vocab: list[str] | None
    partial: bool
    splits: SplitEntries
    reference: dict[str, Fraction]
    notes: list[str]
    source_files: list[SourceFile]
    fingerprint: dict[str, Any]
    key: Digest
    versions: Versions


MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Split:
    """The examples of one split; for pairs, `inputs` and `lengths` have a second axis of 2."""

    inputs: Integer[np.ndarray, "n *pair_L_F"]  # memory-mapped, padded with 0
    lengths: Int[np.ndarray, "n *pair"]
    labels: Integer[np.ndarray, "n *targets"]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Int[np.ndarray, " B"]) -> "Split":
        """These rows, copied into memory."""
        # a plain ndarray view, because memmap's own indexing is slower
        return Split(self.inputs.view(np.ndarray)[rows], self.lengths[rows], self.labels[rows])


@dataclass(frozen=True)
class Store:
    """An opened store; `manifest` is a `Manifest`."""

    path: Path
    manifest: Mapping[str, Any]
    splits: Mapping[str, Split]


def open_store(path: str | Path, task: str = "NAME") -> Store:
    """Open a packed store; its values and hashes are not checked.

    Raises DataError if a file is missing, has another size or holds something else than expected.
    `task` is the name in messages while the manifest is not known to be sound.
    """
    path = Path(path)
    manifest = read_manifest(path, task)
    # one object for equal splits, so that its examples are held once
    files = {name: entry.get("same_as", name) for name, entry in manifest["splits"].items()}
    for name, entry in manifest["splits"].items():
        if files[name] != name and entry != (
            manifest["splits"].get(files[name], {}) | {"same_as": files[name]}
        ):
            what = f"manifest.json: {name} is the same as {files[name]!r}, but described otherwise"
            raise damaged(path, manifest["task"], what)
        for array, expected in entry["bytes"].items():
            file = path / f"{files[name]}.{array}.npy"
            is_file = os.path.isfile(file)  # false also where the folder may not be searched
            found = os.path.getsize(file) if is_file else 0
            if found != expected or not is_file:
                what = f"{file.name} has {found} bytes, expected {expected}"
                raise damaged(path, manifest["task"], what)
    opened = {}
    for name in set(files.values()):
        try:
            opened[name] = open_split(path, name)
            _check_shapes(opened[name], manifest, name)
        except Exception as error:  # NumPy raises almost anything for a damaged header
            raise damaged(path, manifest["task"], f"{name}: {error}") from error
    return Store(path, manifest, {name: opened[other] for name, other in files.items()})


def open_split(folder: Path, name: str) -> Split:
    """The arrays of one split; raises ValueError unless they hold integers for the same rows."""
    arrays = {}
    for array in ARRAYS:
        # a map of more than the file is an error; reading would first allocate what the header says
        mapped = np.lib.format.open_memmap(folder / f"{name}.{array}.npy", mode="r")
        if mapped.dtype.kind not in "iu" or mapped.ndim == 0:
            raise ValueError(f"{array} is {mapped.dtype} {mapped.shape}, expected integers")
        arrays[array] = mapped if array == "inputs" else np.array(mapped)
    if len({len(found) for found in arrays.values()}) > 1 or arrays["lengths"].dtype.kind != "i":
        shapes = ", ".join(f"{array} {x.dtype} {x.shape}" for array, x in arrays.items())
        raise ValueError(f"arrays of different examples: {shapes}")
    return Split(**arrays)


def _check_shapes(split: Split, manifest: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if the arrays' shapes are not those of the manifest."""
    count, pair = manifest["splits"][name]["count"], (2,) * manifest["dual"]
    expected = (count, *pair, manifest["seq_len"])
    if split.inputs.shape[: len(expected)] != expected or split.lengths.shape != (count, *pair):
        raise ValueError(
            f"inputs {split.inputs.shape} and lengths {split.lengths.shape}, expected {expected} "
            f"and {expected[:-1]}"
        )


def read_manifest(path: Path, task: str = "NAME") -> dict[str, Any]:
    """The manifest of a store; raises DataError if it is missing or does not fit the schema."""
    file = path / "manifest.json"
    if not os.path.exists(file):
        raise damaged(path, task, "no packed store (no manifest.json)")
    try:
        manifest = MANIFEST.validate_json(read_source(file, MAX_MANIFEST_BYTES), strict=True)
    except ValidationError as error:
        reason = f"manifest.json cannot be read: {first_problem(error)}"
        raise damaged(path, task, reason) from error
    version = manifest["versions"]["store"]
    if version != STORE_VERSION:
        what = f"store version {version}, expected {STORE_VERSION}"
        raise damaged(path, manifest["task"], what)
    return dict(manifest)


def damaged(path: Path, task: str, what: str) -> DataError:
    """The error of a damaged store; `path` may be a link to it."""
    return DataError(
        f"{path}: {what}; delete the folder {path.resolve()} and run `lra data prepare {task}` "
        "with the same settings"
    )


def rows_per_block(dtype: np.dtype, row_shape: tuple[int, ...]) -> int:
    """Number of rows per read or write: bounds the memory and the time between reports."""
    row_bytes = dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
    return int(np.clip(BYTES_PER_BLOCK // max(1, row_bytes), 1, 1024))


def describe_split(
    split: Split, num_classes: int, on_rows: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """The description of a split in the manifest, which `verify` computes again.

    Labels are >= 0. `on_rows(done, total)` is called after each block of inputs.
    """
    digest = hashlib.sha256()
    for array in (split.inputs, split.lengths, split.labels):
        rows = rows_per_block(array.dtype, array.shape[1:])
        for first in range(0, len(array), rows):
            digest.update(np.ascontiguousarray(array[first : first + rows]).data)
            if array is split.inputs:
                on_rows(min(first + rows, len(array)), len(array))
    lengths = split.lengths if len(split) else np.zeros(1, np.int32)
    return {
        "count": len(split),
        "labels": np.bincount(split.labels.ravel(), minlength=num_classes).tolist(),
        "lengths": {
            "min": int(lengths.min()),
            "mean": round(float(lengths.mean()), 3),
            "max": int(lengths.max()),
        },
        "sha256": digest.hexdigest(),
    }
