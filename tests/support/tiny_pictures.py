"""Writes tiny files in the publishers' formats of the picture tasks."""

import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image


class Python2Pickler(pickle._Pickler):
    """Writes bytes as strings of Python 2, with which CIFAR-10 was made."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        short = len(text) < 256
        size = bytes([len(text)]) if short else struct.pack("<i", len(text))
        self.write((pickle.SHORT_BINSTRING if short else pickle.BINSTRING) + size + text)
        self.memoize(text)

    dispatch[bytes] = save_string


def write_batch(path, content):
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)


def cifar(root, per_batch=10, seed=0):
    """Write CIFAR-10's six Python batches below `root`, `per_batch` random pictures each.

    Returns {"train": (rgb (n, 1024, 3), labels (n,)), "test": ...} in the order of the files.
    """
    rng = np.random.default_rng(seed)
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    written = {"train": [], "test": []}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rgb = rng.integers(0, 256, (per_batch, 1024, 3), np.uint8)
        labels = rng.integers(0, 10, per_batch)
        planar = np.ascontiguousarray(rgb.transpose(0, 2, 1)).reshape(per_batch, 3072)
        filenames = [f"picture_{i}.png".encode() for i in range(per_batch)]
        write_batch(
            folder / name,
            {
                b"batch_label": b"tiny",
                b"labels": labels.tolist(),
                b"data": planar,
                b"filenames": filenames,
            },
        )
        written["test" if name == "test_batch" else "train"].append((rgb, labels))
    return {
        split: tuple(np.concatenate(parts) for parts in zip(*files, strict=True))
        for split, files in written.items()
    }


LEVELS = {
    "easy": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}


def pathfinder(root, size=32, level="hard", count=60, per_batch=5, empty=False, seed=0):
    """Write the release's folders of one size and level below `root`: random grey pictures.

    Args:
        per_batch: pictures per metadata file.
        empty: empties the file of picture 172 of batch 0, as at the easy level of the release;
            needs a larger `per_batch`.
    Returns pictures (n, size, size) and labels (n,) in the order of the metadata.
    """
    rng = np.random.default_rng(seed)
    folder = Path(root) / f"pathfinder{size}" / LEVELS[level]
    (folder / "metadata").mkdir(parents=True)
    pictures = rng.integers(0, 256, (count, size, size), np.uint8)
    labels = rng.integers(0, 2, count)
    rows = {}
    for number in range(count):
        batch, k = divmod(number, per_batch)
        file = folder / "imgs" / str(batch) / f"sample_{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[number]).save(file)
        rows.setdefault(batch, []).append(
            f"imgs/{batch} sample_{k}.png {k} {labels[number]} 1.0 14 4 2 0.5 1 1\n"
        )
    for batch, lines in rows.items():
        (folder / "metadata" / f"{batch}.npy").write_text("".join(lines))
    if empty:
        (folder / "imgs" / "0" / "sample_172.png").write_bytes(b"")
    return pictures, labels
