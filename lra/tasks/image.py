"""Which of ten objects is in a 32x32 photograph, read pixel by pixel? CIFAR-10, grey ("image") or in colour ("scifar").

Source: Krizhevsky 2009. Grey is the Image task of the Long Range Arena (Tay et al. 2020, arXiv 2011.04006); papers that
report sCIFAR (LRU 2303.06349, STU 2312.06837) use colour, which is easier: the two are different tasks.

Grey values. S4 and its followers convert with Pillow (ITU-R 601-2), rounded; the original code converts with
`tf.image.rgb_to_grayscale`, whose weights are rounded to four digits and whose way back to bytes, times 255.5, rounds
down. The two differ by one in about a quarter of all colours, so lra2020 has a store of its own. Both are computed in
integers. Pillow's is exact; TensorFlow computes in float32 and differs from the exact value in some 240 of the 2^24.

Validation. CIFAR has none, so 5,000 training pictures serve: the last of the files under lra2020 (which reads TFDS's
copy, whose records are in another order: the same rule, other pictures), a seeded random tenth else (S4 draws with
PyTorch's generator: the same share, other pictures).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lra.errors import DataError
from lra.sources.download import obtain
from lra.sources.locate import CIFAR10, Progress, Source, locate
from lra.sources.pickles import restricted_pickle
from lra.sources.tfds_reader import find_tfds, read_tfds
from lra.tasks.base import Example
from lra.tasks.pictures import PictureTask, cut, decode_png

SHAPE = (32, 32)
NUM_CLASSES = 10
SIZES = {"train": 45_000, "val": 5_000, "test": 10_000}
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
PUBLISHER = Source(
    "CIFAR-10",
    "cifar-10-batches-py",
    (*FILES["train"], *FILES["test"]),
    ("cifar-10-python.tar.gz",),
    CIFAR10,
)

Pictures = tuple[UInt8[np.ndarray, "n 1024 3"], Int[np.ndarray, " n"]]


def grey_as_pillow(rgb: UInt8[np.ndarray, "n L 3"]) -> UInt8[np.ndarray, "n L"]:
    """Pillow's conversion to mode "L": weights 0.299, 0.587 and 0.114 in 16 bits, rounded to nearest."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).astype(np.uint8)


def grey_as_tensorflow(rgb: UInt8[np.ndarray, "n L 3"]) -> UInt8[np.ndarray, "n L"]:
    """`tf.image.rgb_to_grayscale`: weights 0.2989, 0.587 and 0.114, of x / 255, then times 255.5, rounded down."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return ((2989 * red + 5870 * green + 1140 * blue) * 511 // 5_100_000).astype(
        np.uint8
    )  # 255.5 / 255 = 511 / 510


class Cifar10(PictureTask):
    """CIFAR-10 from the publisher's Python batches or, where these are not there, from TFDS's prepared `cifar10`.

    Args:
        protocol: mapping with `inputs`, which decides the grey values, and `shuffle`, whether validation is a random
            tenth of the training files or their end.
        data_root: where the files are looked for.
        colour: three values a pixel instead of one.
        mean, std: of a pixel in units of 0..255, one number or one a colour.
        data_seed: of the random tenth; independent of a run's seed.
    """

    source = "release"  # or "tfds", once that folder was found in place of the publisher's
    num_classes = NUM_CLASSES

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        colour: bool,
        mean: float | int | Sequence[float | int],
        std: float | int | Sequence[float | int],
        data_seed: int,
    ):
        super().__init__(protocol, data_root, name, SHAPE, 3 if colour else 1, mean, std)
        self.colour, self.data_seed = colour, data_seed
        self.grey = "tensorflow" if protocol["inputs"] == "lra2020" else "pillow"

    def examples(self, split: str) -> Iterator[Example]:
        """All pictures of `split`, in the order of the files."""
        rgb, labels = self._read("test" if split == "test" else "train")
        if split != "test":
            seed = self.data_seed if self.shuffle else None
            kept = cut(len(labels), {name: SIZES[name] for name in ("train", "val")}, seed)[split]
            rgb, labels = rgb[kept], labels[kept]
        for pixels, label in zip(self._pixels(rgb), labels.tolist(), strict=True):
            yield Example(pixels, label)

    def _pixels(self, rgb: UInt8[np.ndarray, "n L 3"]) -> UInt8[np.ndarray, "n *pixels"]:
        if self.colour:
            return rgb
        convert = grey_as_tensorflow if self.grey == "tensorflow" else grey_as_pillow
        blocks = [
            convert(rgb[first : first + 1000]) for first in range(0, len(rgb), 1000)
        ]  # bounds the memory
        return np.concatenate(blocks)

    def _read(self, part: str) -> Pictures:
        kind, folder = self._folder
        if kind == "tfds":
            return read_prepared(folder, part)
        parts = [read_batch(folder / name) for name in FILES[part]]
        return np.concatenate([rgb for rgb, _ in parts]), np.concatenate(
            [labels for _, labels in parts]
        )

    @cached_property
    def _folder(self) -> tuple[str, Path]:
        """Of the batches, or of TFDS; sets `source`. Raises: DataError, if neither is there."""
        if found := locate(PUBLISHER, self.data_root):
            return "batches", found
        if found := find_tfds(self.data_root, "cifar10"):
            self.source = "tfds"
            return "tfds", found
        raise DataError(
            f"CIFAR-10: neither {PUBLISHER.folder} nor TFDS's cifar10 is under {self.data_root}"
        )

    def fetch(self, *, download: bool, on_progress: Progress) -> None:
        obtain(PUBLISHER, self.data_root, download=download, on_progress=on_progress)

    def source_files(self) -> list[Path]:
        kind, folder = self._folder
        if kind == "batches":
            return [folder / name for name in (*FILES["train"], *FILES["test"])]
        return sorted(path for path in folder.iterdir() if path.is_file())

    def notes(self) -> list[str]:
        if self._folder[0] == "batches":
            return []
        return [
            "read from TFDS's cifar10, in its order: train and val differ from the publisher's files'"
        ]

    def split_sizes(self) -> Mapping[str, int]:
        return SIZES

    def fingerprint(self) -> dict[str, Any]:
        seed = self.data_seed if self.shuffle else None
        return {
            "colour": self.colour,
            "grey": None if self.colour else self.grey,
            "data_seed": seed,
        }


def read_batch(path: Path) -> Pictures:
    """Pictures and labels of one of the publisher's files, a pickled {b"data": planar RGB, b"labels": list, ...}.

    Raises:
        DataError: naming the file, and the row where one is at fault.
    """
    content = restricted_pickle(path)
    data, labels = content.get(b"data"), content.get(b"labels")
    values = SHAPE[0] * SHAPE[1] * 3
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != values
    ):
        found = (
            f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        )
        raise DataError(
            f"{path}: b'data' is {found}, expected uint8 (rows, {values}); fetch it again"
        )
    if not isinstance(labels, list) or len(labels) != len(data):
        found = f"{len(labels)} long" if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise DataError(
            f"{path}: b'labels' is {found}, expected a list of {len(data)}, one a row; fetch it again"
        )
    for row, label in enumerate(labels):
        check_label(label, f"{path}, row {row}")
    rgb = data.reshape(-1, 3, SHAPE[0] * SHAPE[1]).transpose(0, 2, 1)
    return rgb, np.array(labels, np.int64)


def read_prepared(folder: Path, part: str) -> Pictures:
    """Pictures and labels of one split that TFDS has prepared, whose records have a PNG `image` and a `label`.

    Raises:
        DataError: naming the folder, the split and the record.
    """
    pictures, labels = [], []
    for record, example in enumerate(read_tfds(folder, part)):
        where = f"{folder}, {part}, record {record}"
        content = example.get("image")
        if not isinstance(content, bytes):
            raise DataError(
                f"{where}: has {', '.join(sorted(example))}, expected image and label; is it cifar10?"
            )
        pictures.append(decode_png(content, SHAPE, "RGB", where).reshape(-1, 3))
        labels.append(check_label(example.get("label"), where))
    return np.array(pictures, np.uint8).reshape(-1, SHAPE[0] * SHAPE[1], 3), np.array(
        labels, np.int64
    )


def check_label(label: Any, where: str) -> int:
    """Raises: DataError, if `label` is no class."""
    if not isinstance(label, int) or not 0 <= label < NUM_CLASSES:
        raise DataError(f"{where}: label {label!r}, expected 0..{NUM_CLASSES - 1}; fetch it again")
    return label
