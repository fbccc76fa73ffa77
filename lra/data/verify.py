"""Compares a packed store with its manifest and counts examples shared by two splits."""

import collections
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lra.data.store import Store, describe_split
from lra.errors import DataError
from lra.tasks.base import SPLITS, Task


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; the counts have keys such as "train/test"."""

    problems: tuple[str, ...]  # empty for a valid store
    overlaps: Mapping[str, int]  # rows of test whose inputs also occur in train
    documents: Mapping[str, int]  # of pairs: rows of test with a document that occurs in train


def verify(store: Store) -> Verification:
    """Recompute hashes, counts, label balance and lengths; count examples that splits share."""
    entries, problems = store.manifest["splits"], []
    distinct = {
        name: split for name, split in store.splits.items() if "same_as" not in entries[name]
    }
    for name, split in distinct.items():
        entry = entries[name]
        for what, found in describe_split(split, store.manifest["num_classes"]).items():
            if found != entry[what]:
                problems.append(f"{name}: {what} is {found}, the manifest says {entry[what]}")
    rows = {name: [_digests(split.inputs, split.lengths)] for name, split in distinct.items()}
    sides = {
        name: [_digests(split.inputs[:, side], split.lengths[:, side]) for side in (0, 1)]
        for name, split in (distinct if store.manifest["dual"] else {}).items()
    }
    return Verification(tuple(problems), _shared(rows), _shared(sides))


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
