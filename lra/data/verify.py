"""Recomputes what a packed store's manifest says, and counts examples shared by two splits."""

import collections
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lra.data.store import Store, _describe
from lra.errors import DataError
from lra.tasks.base import SPLITS, Task


@dataclass(frozen=True)
class Report:
    """What `verify` found: `problems` is empty for a sound store.

    `overlaps` counts, for "train/test", the rows of test whose inputs also occur in train; for a task of pairs
    `documents` counts the rows of test of which one document or both occur in train.
    """

    problems: tuple[str, ...]
    overlaps: Mapping[str, int]
    documents: Mapping[str, int]


def verify(store: Store) -> Report:
    """Recompute hashes, counts, label balance and lengths, and look for examples that two splits share."""
    problems = []
    distinct = {
        name: split
        for name, split in store.splits.items()
        if "same_as" not in store.manifest["splits"][name]
    }
    for name, split in distinct.items():
        entry = store.manifest["splits"][name]
        for what, found in _describe(split, store.manifest["num_classes"]).items():
            if found != entry[what]:
                problems.append(f"{name}: {what} is {found}, the manifest says {entry[what]}")
    overlaps, documents = {}, {}
    rows = {name: _digests(split.inputs, split.lengths) for name, split in distinct.items()}
    for one, other in itertools.combinations(rows, 2):
        known = set(rows[one])
        overlaps[f"{one}/{other}"] = sum(digest in known for digest in rows[other])
    if store.manifest["dual"]:
        sides = {
            name: [_digests(split.inputs[:, side], split.lengths[:, side]) for side in (0, 1)]
            for name, split in distinct.items()
        }
        for one, other in itertools.combinations(sides, 2):
            known = {digest for side in sides[one] for digest in side}
            documents[f"{one}/{other}"] = sum(
                u in known or v in known for u, v in zip(*sides[other], strict=True)
            )
    return Report(tuple(problems), overlaps, documents)


def changed_sources(task: Task, store: Store) -> list[str]:
    """Read the sources again, where they still are: names of those that are not what the store was made of.

    Raises:
        DataError: they can no longer be read.
    """
    try:
        if not task.source_files():
            return []
    except DataError:  # gone
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
