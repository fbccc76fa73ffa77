"""Checks a packed store: value ranges and hashes at the start of a run, more in `lra data verify`.

Ranges of ids, lengths and labels are checked at every start: JAX clamps an index outside of an
array, so that a damaged store would train without an error. Hashes cost a pass over all bytes.
`.<store>.verified.json` beside a large store remembers the files whose hashes were right.
"""

import collections
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from lra.data.packed import ARRAYS, Store, damaged, describe_split, read_manifest
from lra.errors import DataError, LraError
from lra.files import read_regular_file, write_atomically
from lra.sources.locate import Progress, ignore_progress
from lra.tasks.base import SPLITS, Task

Verify = Literal["always", "auto", "never"]
SMALL_BYTES = 2**25  # stores up to this size are hashed at every start, in 0.1 to 0.3 s
VALUES_PER_BLOCK = 2**22


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; the counts have keys such as "train/test"."""

    problems: tuple[str, ...]  # empty for a valid store
    overlaps: Mapping[str, int]  # rows of test whose inputs also occur in train
    documents: Mapping[str, int]  # of pairs: rows of test with a document that occurs in train


def check_store(
    store: Store, verify: Verify = "auto", on_progress: Progress = ignore_progress
) -> None:
    """Raises DataError if an id, a length or a label is out of range, or a hash is wrong.

    Args:
        verify: "always" and "never" are for the hashes; "auto" computes those of a large store once
            for each state (size, modification time, inode) of its files.
    """
    _raise_first(store, (x for name in _files(store) for x in _range_problems(store, name)))
    if verify == "never":
        return
    states = _states(store.path, _files(store))
    if verify == "auto" and _is_large(states) and _remembered(store.path) == states:
        return
    if not _is_large(states):
        on_progress = ignore_progress
    entries = (_entry_problems(store, name, on_progress) for name in _files(store))
    _raise_first(store, itertools.chain.from_iterable(entries))
    _save(store.path, states)


def remember(path: Path) -> None:
    """Remember the state of the files of a store whose hashes are known to be right."""
    splits = read_manifest(path)["splits"]
    _save(path, _states(path, [name for name in splits if "same_as" not in splits[name]]))


def verify(store: Store) -> Verification:
    """Recompute hashes, counts, label balance and lengths; count examples that splits share."""
    problems = []
    for name in _files(store):
        problems += _range_problems(store, name) or _entry_problems(store, name)
    distinct = {name: store.splits[name] for name in _files(store)}
    rows = {name: [_digests(split.inputs, split.lengths)] for name, split in distinct.items()}
    sides = {
        name: [_digests(split.inputs[:, side], split.lengths[:, side]) for side in (0, 1)]
        for name, split in (distinct if store.manifest["dual"] else {}).items()
    }
    return Verification(tuple(problems), _shared(rows), _shared(sides))


def _files(store: Store) -> list[str]:
    """The splits that have files of their own."""
    return [name for name, entry in store.manifest["splits"].items() if "same_as" not in entry]


def _raise_first(store: Store, problems: Iterator[str]) -> None:
    for problem in problems:
        raise damaged(store.path, store.manifest["task"], problem)


def _range_problems(store: Store, name: str) -> list[str]:
    """Ids, lengths and labels of a split that the manifest's settings do not admit."""
    manifest, split = store.manifest, store.splits[name]
    sizes = {"lengths": manifest["seq_len"] + 1, "labels": manifest["num_classes"]}
    if manifest["vocab"] is not None:
        sizes["inputs"] = len(manifest["vocab"])
    problems = []
    for array, size in sizes.items():
        found = _first_outside(getattr(split, array), size)
        if found is not None:
            row, value = found
            problems.append(f"{name}.{array}.npy, row {row}: {value}, expected 0 to {size - 1}")
    return problems


def _first_outside(array: Integer[np.ndarray, "n *row"], size: int) -> tuple[int, int] | None:
    """(row, value) of the first value outside of 0..size-1, or None."""
    limits = np.iinfo(array.dtype)
    if limits.min >= 0 and limits.max < size:
        return None
    rows = max(1, VALUES_PER_BLOCK // max(1, array[:1].size))
    for first in range(0, len(array), rows):
        block = np.asarray(array[first : first + rows])
        # an unsigned integer has no minimum to compute, which halves the time
        if block.size and (block.max() >= size or (limits.min < 0 and block.min() < 0)):
            outside = (block < 0) | (block >= size)
            place = np.unravel_index(outside.argmax(), block.shape)
            return first + int(place[0]), int(block[place])
    return None


def _entry_problems(store: Store, name: str, on_progress: Progress = ignore_progress) -> list[str]:
    """Differences between the manifest and a split whose values are in range."""
    entry = store.manifest["splits"][name]
    on_rows = partial(on_progress, f"(checking {name})")
    found = describe_split(store.splits[name], store.manifest["num_classes"], on_rows)
    return [
        f"{name}: {what} is {value}, the manifest says {entry[what]}"
        for what, value in found.items()
        if value != entry[what]
    ]


def _states(path: Path, splits: list[str]) -> dict[str, list[int]]:
    """[size, modification time in ns, inode] of each file of a store."""
    files = ["manifest.json", *(f"{name}.{array}.npy" for name in splits for array in ARRAYS)]
    stats = {file: (path / file).stat() for file in files}
    return {file: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for file, stat in stats.items()}


def _is_large(states: Mapping[str, list[int]]) -> bool:
    return sum(state[0] for state in states.values()) > SMALL_BYTES


def _memory(path: Path) -> Path:
    folder = path.resolve()  # a link's own name would be remembered apart
    return folder.with_name(f".{folder.name}.verified.json")


def _remembered(path: Path) -> Any:
    try:
        return json.loads(read_regular_file(_memory(path), 2**16))
    except (OSError, ValueError, RecursionError):
        return None


def _save(path: Path, states: dict[str, list[int]]) -> None:
    """Remember states of a large store; a folder that cannot be written costs the next start."""
    if _is_large(states) and _remembered(path) != states:
        with suppress(LraError):
            write_atomically(_memory(path), json.dumps(states).encode())


def _shared(digests: Mapping[str, list[list[bytes]]]) -> dict[str, int]:
    """For each two splits, the rows of the second with a digest that the first has too."""
    counts = {}
    for one, other in itertools.combinations(digests, 2):
        known = set(itertools.chain.from_iterable(digests[one]))
        rows = zip(*digests[other], strict=True)
        counts[f"{one}/{other}"] = sum(not known.isdisjoint(row) for row in rows)
    return counts


def changed_sources(task: Task, store: Store) -> list[str]:
    """The names of sources that have changed since, by reading them again; none if missing."""
    try:
        if not task.source_files():
            return []
    except DataError:  # missing
        return []
    task.allow_partial = store.manifest["partial"]
    for name in SPLITS:
        if name not in task.same:
            collections.deque(task.examples(name), maxlen=0)
    found, made = (
        {entry["name"]: entry["sha256"] for entry in entries}
        for entries in (task.source_hashes(), store.manifest["source_files"])
    )
    return sorted(name for name in found.keys() | made.keys() if found.get(name) != made.get(name))


def _digests(inputs: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    return [
        hashlib.blake2b(
            np.ascontiguousarray(row).data, digest_size=16, key=length.tobytes()
        ).digest()
        for row, length in zip(inputs, lengths, strict=True)
    ]
