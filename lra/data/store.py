"""The packed store: the examples of a task as memory-mapped arrays with a manifest.

A store is one folder. The manifest describes the content and its origin. The folder's name contains
a hash of the settings that change its bytes and one of the source files (their names, sizes and
times). So other settings or other files have another store, and stale data is never reused. If the
source files are missing, the store made from them is used.

    <data_root>/packed/<task>-<inputs>-<settings>[-<sources>][-partial]/
        {train,val,test}.{inputs,lengths,labels}.npy, manifest.json

A store is built in a temporary folder and renamed when complete, so no incomplete store exists.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from jaxtyping import Int, Integer

from lra.data.packed import (
    ARRAYS,
    STORE_VERSION,
    Split,
    Store,
    damaged,
    describe_split,
    open_split,
    open_store,
    read_manifest,
    rows_per_block,
)
from lra.data.verify import Verify, check_store, remember
from lra.errors import DataError, LraError
from lra.files import disk_errors, sync_folder, write_atomically
from lra.sources.locate import Progress, ignore_progress
from lra.tasks.base import SPLITS, Example, Task

LOCK_SECONDS = 5.0  # between two messages while another process builds the store
PARTIAL = "-partial"  # suffix of the name of a store with too few examples


def settings_key(task: Task) -> str:
    """SHA-256 of the settings that change the bytes of the store, as hexadecimal digits."""
    return _digest(
        {
            "store_version": STORE_VERSION,
            "reader_version": task.reader_version,
            "task": task.name,
            "vocab": task.vocab,
            "seq_len": task.seq_len,
            "same": dict(task.same),
            "fingerprint": task.fingerprint(),
        }
    )


def store_name(task: Task) -> str:
    """Name of the store's folder; raises DataError if the source files are missing."""
    sources = task.source_signature()
    return settings_name(task) + (f"-{_digest(sources)[:8]}" if sources else "")


def store_path(task: Task, data_root: str | Path) -> Path:
    """The path of the store of `task`, whether or not it exists.

    If the source files are missing, this is the newest store with the task's settings, and without
    any such store DataError is raised.
    """
    packed = Path(data_root) / "packed"
    try:
        return packed / store_name(task)
    except DataError:
        stores = packed.glob(f"{settings_name(task)}-*")
        complete = [path for path in stores if not path.name.endswith(PARTIAL)]
        if not complete:
            raise
        return max(complete, key=lambda path: path.stat().st_mtime)


def prepared_path(task: Task, data_root: str | Path) -> Path:
    """`store_path`, or the partial store if only that exists."""
    path = store_path(task, data_root)
    partial = path.with_name(path.name + PARTIAL)
    return partial if partial.exists() and not path.exists() else path


def settings_name(task: Task) -> str:
    """The part of the store's name that does not depend on the source files."""
    return f"{task.name}-{task.inputs}-{settings_key(task)[:12]}"


def _digest(value: Any) -> str:
    content = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def prepare(
    task: Task,
    data_root: str | Path,
    *,
    download: bool = False,
    allow_partial: bool = False,
    verify: Verify = "auto",
    on_progress: Progress = ignore_progress,
) -> Store:
    """Open and check the packed store of `task`; builds it first if it does not exist.

    Concurrent calls are safe: one process builds, the others wait. A build that fails or is
    interrupted leaves nothing behind; the next build removes what a killed one left.

    Args:
        download: download the publisher's files if they are missing.
        allow_partial: accept too few examples; such a store has another name and is marked.
        verify: when the hashes are checked (`lra.data.verify.check_store`).
    Raises:
        DataError: the sources are missing or malformed, or the store is damaged or not writable.
    """
    task.allow_partial = allow_partial
    try:
        path = store_path(task, data_root)
    except DataError:
        task.fetch(download=download, on_progress=on_progress)
        path = store_path(task, data_root)
    partial = path.with_name(path.name + PARTIAL)
    if not path.exists() and partial.exists():
        if not allow_partial:
            raise DataError(
                f"{task.name}: only a partial store is prepared, {partial}; "
                "data.allow_partial=true (lra data: --allow-partial) uses it"
            )
        path = partial
    if not path.exists():
        with disk_errors(path, "data.root", DataError):
            path = _build_locked(task, path, partial if allow_partial else None, on_progress)
    store = open_store(path, task.name)
    _check_task(store, task)
    check_store(store, verify, on_progress)
    return _with_reference_lines(task, store, on_progress)


def _with_reference_lines(task: Task, store: Store, on_progress: Progress) -> Store:
    """A store with the reference lines of today, computed again if an older version made them.

    Only the manifest changes: the name of the store and its hashes do not depend on these lines.
    """
    versions = store.manifest["versions"]
    if versions.get("reference", 1) >= task.reference_version or not store.manifest["reference"]:
        return store
    on_progress("reference lines", 0, None)
    manifest = {
        **store.manifest,
        "reference": _reference_lines(task, store.splits),
        "versions": {**versions, "reference": task.reference_version},
    }
    with contextlib.suppress(LraError):  # a folder of another user: computed again each time
        write_atomically(store.path / "manifest.json", _manifest_text(manifest))
    return Store(store.path, manifest, store.splits)


def _reference_lines(task: Task, splits: Mapping[str, Split]) -> dict[str, float]:
    """The reference lines of a task; raises DataError unless they are fractions."""
    lines = task.reference_lines(splits)
    for name, accuracy in lines.items():
        if not 0 <= accuracy <= 1:
            raise DataError(
                f"{task.name}: reference_lines gives {name}={accuracy}, expected a fraction in "
                "[0, 1]"
            )
    return lines


def _check_task(store: Store, task: Task) -> None:
    """Raises DataError if the manifest or the arrays are not those of `task`."""
    same = {name: entry.get("same_as") for name, entry in store.manifest["splits"].items()}
    expected = {
        "task": task.name,
        "inputs": task.inputs,
        "seq_len": task.seq_len,
        "num_classes": task.num_classes,
        "dual": task.dual,
        "vocab": None if task.vocab is None else list(task.vocab),
        "key": settings_key(task),
    }
    wrong = [key for key, value in expected.items() if store.manifest[key] != value]
    if same != {name: task.same.get(name) for name in SPLITS}:
        wrong.append("splits")
    if wrong:
        what = f"manifest.json describes another task: {', '.join(wrong)}"
        raise damaged(store.path, task.name, what)
    for name, split in store.splits.items():
        for array, (dtype, row_shape) in array_types(task).items():
            found = getattr(split, array)
            if (found.dtype, found.shape[1:]) != (dtype, row_shape):
                what = f"{name}.{array}.npy holds {found.dtype} {found.shape}, expected {dtype}"
                raise damaged(store.path, task.name, f"{what} {(len(split), *row_shape)}")


def _build_locked(task: Task, path: Path, partial: Path | None, on_progress: Progress) -> Path:
    """Build under a lock; returns `partial` if given and examples are missing, else `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.building-"
    with _acquire(FileLock(path.parent / f".{path.name}.lock"), on_progress):
        for built in (path, partial):
            if built is not None and built.exists():  # built by another process during the wait
                return built
        for stale in path.parent.glob(f"{prefix}*"):  # of a killed process
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=path.parent, ignore_cleanup_errors=True
        ) as name:
            building = Path(name)
            is_partial = _build(task, building, partial is not None, on_progress)
            building.chmod(0o755)  # it is readable by its owner only
            built = partial if partial is not None and is_partial else path
            _move_or_link(building, built)
            sync_folder(path.parent)
    if not built.is_symlink():  # the manifest describes the bytes that are in the files now
        remember(built)
    task.packed()
    return built


def _acquire(lock: FileLock, on_progress: Progress) -> AbstractContextManager:
    """A context manager that releases the acquired lock; reports while another process holds it."""
    while True:
        try:
            return lock.acquire(timeout=LOCK_SECONDS)
        except TimeoutError:
            on_progress("(another process prepares it: waiting)", 0, None)


def _move_or_link(building: Path, path: Path) -> None:
    """Move a complete store to `path`, or link `path` to a store with the same content.

    Copied source files have other times, and so another name for the same content.
    """
    if path.is_symlink():  # to a deleted store
        path.unlink()
    content = _content(building)
    for other in sorted(path.parent.glob(f"{path.name.rsplit('-', 1)[0]}-*")):
        if not other.is_symlink() and _content(other) == content:
            path.symlink_to(other.name)
            return
    building.rename(path)


def _content(path: Path) -> Any:
    """A value that is equal for stores of the same content; None if there is no valid store."""
    try:
        manifest = read_manifest(path)
    except DataError:
        return None
    parts = {name: (entry["sha256"], entry["count"]) for name, entry in manifest["splits"].items()}
    return manifest["key"], manifest["partial"], parts


def _build(task: Task, folder: Path, allow_partial: bool, on_progress: Progress) -> bool:
    """Write all splits and the manifest into `folder`; returns whether examples are missing."""
    counts = task.split_sizes() or {}
    entries = {
        name: _write_split(task, name, folder, allow_partial, on_progress)
        for name in SPLITS
        if name not in task.same
    }
    for name, other in task.same.items():
        entries[name] = entries[other] | {"same_as": other}
    is_partial = any(entries[name]["count"] < count for name, count in counts.items())
    splits = {name: open_split(folder, entries[name].get("same_as", name)) for name in SPLITS}
    has_rows = len(splits["train"]) and len(splits["test"])
    manifest = {
        "task": task.name,
        "inputs": task.inputs,
        "source": task.source,
        "seq_len": task.seq_len,
        "num_classes": task.num_classes,
        "dual": task.dual,
        "vocab": task.vocab,
        "partial": is_partial,
        "splits": {name: entries[name] for name in SPLITS},
        "reference": _reference_lines(task, splits) if has_rows else {},
        "notes": task.notes(),
        "source_files": task.source_hashes(),
        "fingerprint": task.fingerprint(),
        "key": settings_key(task),
        "versions": {
            "store": STORE_VERSION,
            "reader": task.reader_version,
            "reference": task.reference_version,
            "numpy": np.__version__,
        },
    }
    with open(folder / "manifest.json", "wb") as file:
        file.write(_manifest_text(manifest))
        _sync_file(file)
    sync_folder(folder)
    return is_partial


def _manifest_text(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode() + b"\n"


def _write_split(
    task: Task, name: str, folder: Path, allow_partial: bool, on_progress: Progress
) -> dict[str, Any]:
    """Write the three arrays of one split in one pass; returns its entry in the manifest."""
    dtype, row_shape = array_types(task)["inputs"]
    expected = (task.split_sizes() or {}).get(name)
    lengths: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    examples, rows = iter(task.examples(name)), rows_per_block(dtype, row_shape)
    count = 0
    with open(folder / f"{name}.inputs.npy", "wb") as file:
        _write_header(file, dtype, (0, *row_shape))
        while batch := list(itertools.islice(examples, rows)):
            packed = pack(task, batch)
            file.write(packed.inputs.data)
            lengths.append(packed.lengths)
            labels.append(packed.labels)
            count += len(batch)
            on_progress(name, count, expected)
        check_count(task, name, count, allow_partial)
        _write_header(file, dtype, (count, *row_shape))
        _sync_file(file)
    empty = pack(task, [])
    arrays = {
        "lengths": np.concatenate([empty.lengths, *lengths]),
        "labels": np.concatenate([empty.labels, *labels]),
    }
    for array, values in arrays.items():
        with open(folder / f"{name}.{array}.npy", "wb") as file:
            np.save(file, values, allow_pickle=False)
            _sync_file(file)
    sizes = {array: (folder / f"{name}.{array}.npy").stat().st_size for array in ARRAYS}
    return describe_split(open_split(folder, name), task.num_classes) | {"bytes": sizes}


def pack(task: Task, examples: Sequence[Example]) -> Split:
    """These examples as the store holds them; the errors are those of `pad_into`."""
    types, count = array_types(task), len(examples)
    dtype, row_shape = types.pop("inputs")
    inputs = np.zeros((count, *row_shape), dtype)
    found = {
        "lengths": list(map(pad_into, inputs, examples, itertools.repeat(task))),
        "labels": [example.label for example in examples],
    }
    arrays = {
        array: np.array(found[array], dtype).reshape(count, *row_shape)
        for array, (dtype, row_shape) in types.items()
    }
    return Split(inputs, **arrays)


def check_count(task: Task, name: str, found: int, allow_partial: bool = False) -> None:
    """Raises DataError if the sources held another number of examples than expected."""
    expected = (task.split_sizes() or {}).get(name)
    if expected is None or found == expected or (allow_partial and 0 < found < expected):
        return
    files = task.source_files()
    folder = f" of {os.path.commonpath([file.parent for file in files])}" if files else ""
    shortage = f"; {task.shortage}" if task.shortage and found < expected else ""
    remedy = "; data.allow_partial=true (lra data: --allow-partial) takes what is there"
    raise DataError(
        f"{task.name}: {found:,} examples in {name}{folder}, expected {expected:,}{shortage}"
        f"{remedy if 0 < found < expected else ''}"
    )


def inputs_shape(task: Task) -> tuple[int, ...]:
    """Shape of one packed example: (L,), (2, L) for pairs, with a last axis F if F > 1."""
    return (2,) * task.dual + (task.seq_len,) + (task.num_features,) * (task.num_features > 1)


def array_types(task: Task) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The dtype of each array of a split, and the shape of one row."""
    targets = (task.num_targets,) * (task.num_targets > 1)
    return {
        "inputs": (inputs_dtype(task), inputs_shape(task)),
        "lengths": (np.dtype("<i4"), (2,) * task.dual),
        "labels": (np.dtype("<u1" if task.num_classes <= 256 else "<i4"), targets),
    }


def inputs_dtype(task: Task) -> np.dtype:
    """The smallest type that holds the vocabulary, or the task's type of values."""
    if task.vocab is None:
        return task.value_dtype.newbyteorder("<")
    size = len(task.vocab)
    return np.dtype("<u1" if size <= 2**8 else "<u2" if size <= 2**16 else "<i4")


def pad_into(
    row: Integer[np.ndarray, "*pair_L_F"], example: Example, task: Task
) -> Int[np.ndarray, "*pair"]:
    """Copy an example to the start of `row`, which is zero; returns its length (two for a pair).

    Raises DataError if the example is too long, ValueError if an id or label is out of range.
    """
    sequences = example.inputs if isinstance(example.inputs, tuple) else (example.inputs,)
    for place, sequence in zip(row if task.dual else [row], sequences, strict=True):
        if len(sequence) > task.seq_len:
            raise DataError(
                f"{task.name}: an example has length {len(sequence)}; raise "
                f"task.seq_len={task.seq_len}"
            )
        if (
            task.vocab is not None
            and len(sequence)
            and not 0 <= sequence.min() <= sequence.max() < len(task.vocab)
        ):
            raise ValueError(f"{task.name}: an id outside the vocabulary of {len(task.vocab)}")
        place[: len(sequence)] = sequence
    if not 0 <= np.min(example.label) <= np.max(example.label) < task.num_classes:
        raise ValueError(f"{task.name}: label {example.label} outside 0..{task.num_classes - 1}")
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    return lengths if task.dual else lengths.reshape(())


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Write an .npy header; NumPy pads it, so that the final number of rows can overwrite it."""
    file.seek(0)
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _sync_file(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
