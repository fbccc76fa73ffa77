"""Where do a run's examples come from, and are they still what they were?

A packed store is one folder: for each split an integer array of padded inputs (memory-mapped), their lengths and their
labels, and a manifest that says what is in it and what it was made from. The folder's name carries a hash of everything
that changes its bytes, so another setting is another store and old data is never reused by mistake.

    <data_root>/packed/<task>-<inputs>-<key>/{train,val,test}.{inputs,lengths,labels}.npy, manifest.json

A store is built in a temporary folder beside its place and renamed when complete: there is no half store.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Integer, UInt

from lra.errors import DataError
from lra.files import disk_errors, sync_folder
from lra.tasks import SPLITS, Example, Task

STORE_VERSION = 1  # raise it when the same task gives other bytes here
ARRAYS = ("inputs", "lengths", "labels")
ROWS_PER_WRITE = 1024

Progress = Callable[[str, int, int | None], None]  # split, examples done, examples in all where known


@dataclass(frozen=True)
class Split:
    """The examples of one split; pairs have a second axis of 2 in `inputs` and `lengths`."""

    inputs: Integer[np.ndarray, "n *pair L"]  # memory-mapped, padded with 0
    lengths: Int[np.ndarray, "n *pair"]
    labels: UInt[np.ndarray, " n"] | Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Store:
    path: Path
    manifest: Mapping[str, Any]
    splits: Mapping[str, Split]


@dataclass(frozen=True)
class Report:
    """What `verify` found: `problems` is empty for a sound store; `overlaps` counts examples shared by two splits."""

    problems: tuple[str, ...]
    overlaps: Mapping[str, int]  # "train/test": rows of test whose inputs also occur in train


# --- Names ---------------------------------------------------------------------------------------------------------


def store_key(task: Task) -> str:
    """SHA-256 of everything that changes the bytes of the store, as hexadecimal digits."""
    identity = {
        "store_version": STORE_VERSION,
        "reader_version": task.reader_version,
        "task": task.name,
        "vocab": task.vocab,
        "seq_len": task.seq_len,
        "fingerprint": task.fingerprint(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def store_path(task: Task, data_root: str | Path) -> Path:
    """Where the store of `task` is, or would be."""
    return Path(data_root) / "packed" / f"{task.name}-{task.inputs}-{store_key(task)[:12]}"


# --- Building ------------------------------------------------------------------------------------------------------


def prepare(task: Task, data_root: str | Path, *, on_progress: Progress | None = None) -> Store:
    """Open the packed store of `task`, building it first where it is missing.

    Several processes may call this at once: one builds, the others wait for it. A build that fails or is interrupted
    leaves nothing behind; what a killed one left is swept away by the next.

    Raises:
        DataError: the sources are missing or malformed, the store cannot be written, or it is damaged.
    """
    path = store_path(task, data_root)
    if not path.exists():
        with disk_errors(path, "data.root", DataError):
            _build_alone(task, path, on_progress or (lambda split, done, total: None))
    return open_store(path)


def _build_alone(task: Task, path: Path, on_progress: Progress) -> None:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        if path.exists():  # built while we waited
            return
        for stale in path.parent.glob(f".{path.name}.building-*"):  # of a killed process: only the lock's holder builds
            shutil.rmtree(stale, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=f".{path.name}.building-", dir=path.parent))
        try:
            _build(task, building, on_progress)
            building.chmod(0o755)  # mkdtemp's folder is for its owner only
            building.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def _build(task: Task, folder: Path, on_progress: Progress) -> None:
    counts = task.split_sizes() or {}
    # A task without validation examples would have them carved from train here, before packing, under its fingerprint.
    splits = {name: _pack(task, name, folder, counts.get(name), on_progress) for name in SPLITS}
    manifest = {
        "task": task.name,
        "inputs": task.inputs,
        "source": task.source,
        "seq_len": task.seq_len,
        "num_classes": task.num_classes,
        "dual": task.dual,
        "vocab": task.vocab,
        "splits": splits,
        "source_files": [{"name": path.name, "sha256": _file_hash(path)} for path in task.source_files()],
        "fingerprint": task.fingerprint(),
        "key": store_key(task),
        "versions": {"store": STORE_VERSION, "reader": task.reader_version, "numpy": np.__version__},
    }
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")
        _sync_file(file)
    sync_folder(folder)


def _pack(task: Task, name: str, folder: Path, expected: int | None, on_progress: Progress) -> dict[str, Any]:
    """Write the three arrays of one split in one pass; returns its entry in the manifest."""
    dtype, row_shape = inputs_dtype(task), inputs_shape(task)
    lengths: list[np.ndarray] = []
    labels: list[int] = []
    examples = iter(task.examples(name))
    with open(folder / f"{name}.inputs.npy", "wb") as file:
        _write_header(file, dtype, (0, *row_shape))
        while batch := list(itertools.islice(examples, ROWS_PER_WRITE)):
            padded = np.zeros((len(batch), *row_shape), dtype)
            lengths.extend(fill(row, example, task) for row, example in zip(padded, batch, strict=True))
            file.write(padded.data)
            labels.extend(example.label for example in batch)
            on_progress(name, len(labels), expected)
        if expected is not None and len(labels) != expected:
            raise DataError(f"{task.name}: {len(labels)} examples in {name}, expected {expected}")
        _write_header(file, dtype, (len(labels), *row_shape))
        _sync_file(file)
    _write_array(folder / f"{name}.lengths.npy", np.array(lengths, "<i4").reshape(len(labels), *row_shape[:-1]))
    _write_array(folder / f"{name}.labels.npy", np.array(labels, "<u1" if task.num_classes <= 256 else "<i4"))
    return _describe(_open_split(folder, name), task.num_classes) | {"bytes": _file_sizes(folder, name)}


def inputs_shape(task: Task) -> tuple[int, ...]:
    """Of one packed example: (L,), or (2, L) for pairs."""
    return (2, task.seq_len) if task.dual else (task.seq_len,)


def inputs_dtype(task: Task) -> np.dtype:
    """The smallest type that holds the vocabulary; the reader's own where inputs are values."""
    if task.vocab is None:
        return np.asarray(next(iter(task.examples("train"))).inputs).dtype.newbyteorder("<")
    return np.dtype("<u1" if len(task.vocab) <= 2**8 else "<u2" if len(task.vocab) <= 2**16 else "<i4")


def fill(row: Integer[np.ndarray, "*pair L"], example: Example, task: Task) -> Int[np.ndarray, "*pair"]:
    """Copy an example into the zeros of `row`, from the left; returns its length, or the two of a pair.

    Raises:
        DataError: the example does not fit.
        ValueError: an id or the label is outside its range, a fault of the reader.
    """
    sequences = example.inputs if isinstance(example.inputs, tuple) else (example.inputs,)
    for place, sequence in zip(row.reshape(-1, task.seq_len), sequences, strict=True):
        if len(sequence) > task.seq_len:
            raise DataError(f"{task.name}: an example has length {len(sequence)}; raise task.seq_len={task.seq_len}")
        if task.vocab is not None and len(sequence) and not 0 <= sequence.min() <= sequence.max() < len(task.vocab):
            raise ValueError(f"{task.name}: an id outside the vocabulary of {len(task.vocab)}")
        place[: len(sequence)] = sequence
    if not 0 <= example.label < task.num_classes:
        raise ValueError(f"{task.name}: label {example.label} outside 0..{task.num_classes - 1}")
    return np.array([len(sequence) for sequence in sequences], np.int32).reshape(row.shape[:-1])


# --- Files ---------------------------------------------------------------------------------------------------------


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """An .npy header at the start of the file; NumPy pads it so that the number of rows can be filled in afterwards."""
    file.seek(0)
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


def _write_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        _sync_file(file)


def _sync_file(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _file_sizes(folder: Path, name: str) -> dict[str, int]:
    return {array: (folder / f"{name}.{array}.npy").stat().st_size for array in ARRAYS}


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_split(folder: Path, name: str) -> Split:
    inputs_path = folder / f"{name}.inputs.npy"
    lengths, labels = (np.load(folder / f"{name}.{array}.npy", allow_pickle=False) for array in ARRAYS[1:])
    inputs = np.load(
        inputs_path, mmap_mode="r" if len(labels) else None, allow_pickle=False
    )  # nothing cannot be mapped
    return Split(inputs, lengths, labels)


# --- Opening and checking ------------------------------------------------------------------------------------------


def open_store(path: str | Path) -> Store:
    """Open a packed store; compares file sizes, not contents (that is `verify`).

    Raises:
        DataError: a file is missing or has another size than the manifest says, or the manifest cannot be read.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, entry in manifest["splits"].items():
        for array, expected in entry["bytes"].items():
            file = path / f"{name}.{array}.npy"
            found = file.stat().st_size if file.is_file() else 0
            if found != expected:
                raise _damaged(path, manifest["task"], f"{file.name} has {found} bytes, expected {expected}")
    try:
        splits = {name: _open_split(path, name) for name in manifest["splits"]}
    except ValueError as error:
        raise _damaged(path, manifest["task"], str(error)) from error
    return Store(path, manifest, splits)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is no packed store (no manifest.json); run `lra data prepare NAME`") from None
    except ValueError as error:
        raise _damaged(path, "NAME", f"manifest.json cannot be read: {error}") from error
    if manifest["versions"]["store"] != STORE_VERSION:
        raise _damaged(
            path, manifest["task"], f"store version {manifest['versions']['store']}, expected {STORE_VERSION}"
        )
    return manifest


def _damaged(path: Path, task: str, what: str) -> DataError:
    return DataError(f"{path}: {what}; delete the folder and run `lra data prepare {task}`")


def _describe(split: Split, num_classes: int) -> dict[str, Any]:
    """What the manifest says of a split and `verify` computes again."""
    digest = hashlib.sha256()
    for array in (split.inputs, split.lengths, split.labels):
        for first in range(0, len(array), ROWS_PER_WRITE):
            digest.update(np.ascontiguousarray(array[first : first + ROWS_PER_WRITE]).data)
    lengths = split.lengths if len(split) else np.zeros(1, np.int32)
    return {
        "count": len(split),
        "labels": np.bincount(split.labels, minlength=num_classes).tolist(),
        "lengths": {"min": int(lengths.min()), "mean": round(float(lengths.mean()), 3), "max": int(lengths.max())},
        "sha256": digest.hexdigest(),
    }


def verify(store: Store) -> Report:
    """Recompute hashes, counts, label balance and lengths, and look for examples that two splits share."""
    problems = []
    for name, split in store.splits.items():
        entry = store.manifest["splits"][name]
        for what, found in _describe(split, store.manifest["num_classes"]).items():
            if found != entry[what]:
                problems.append(f"{name}: {what} is {found}, the manifest says {entry[what]}")
    digests = {name: _row_digests(split) for name, split in store.splits.items()}
    overlaps = {}
    for one, other in itertools.combinations(digests, 2):
        known = set(digests[one])
        overlaps[f"{one}/{other}"] = sum(digest in known for digest in digests[other])
    return Report(tuple(problems), overlaps)


def _row_digests(split: Split) -> list[bytes]:
    return [
        hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16, key=length.tobytes()).digest()
        for row, length in zip(split.inputs, split.lengths, strict=True)
    ]
