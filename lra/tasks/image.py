"""Image and sCIFAR: the class of a CIFAR-10 photograph (32x32), in grey or in colour.

Source: Krizhevsky 2009. Grey is the Image task of the Long Range Arena (Tay et al. 2020, arXiv
2011.04006). Papers that report sCIFAR (LRU 2303.06349, STU 2312.06837) use colour, which is
easier: the two are different tasks.

Grey values: S4 and its followers convert with Pillow (ITU-R 601-2), rounded. The original code
converts with `tf.image.rgb_to_grayscale`, whose weights are rounded to four digits, and scales
back to bytes by 255.5, rounded down. The two differ by one in about a quarter of all colours, so
lra2020 has a store of its own. Both are computed in integers. Pillow's is exact; TensorFlow's
float32 differs from the exact value for about 240 of the 2^24 colours.

Validation: CIFAR has none, so 5,000 training pictures are used: under lra2020 the last of the files
(the original reads TFDS's copy, whose records are in another order: the same rule, other pictures),
otherwise a seeded random tenth (S4 draws with PyTorch's generator: the same share, other pictures).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lra.errors import DataError
from lra.sources.locate import CIFAR10, Source
from lra.sources.pickles import restricted_pickle
from lra.sources.tfds_reader import read_tfds
from lra.tasks.base import Example
from lra.tasks.pictures import PictureTask, cut, decode_png

SHAPE = (32, 32)
NUM_CLASSES = 10
# label_names of the publisher's batches.meta
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIZES = {"train": 45_000, "val": 5_000, "test": 10_000}
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
PICTURES_PER_BLOCK = 1000  # converted to grey at once; bounds the memory

Pictures = tuple[UInt8[np.ndarray, "n 1024 3"], Int[np.ndarray, " n"]]


def grey_as_pillow(rgb: UInt8[np.ndarray, "n L 3"]) -> UInt8[np.ndarray, "n L"]:
    """Pillow's conversion to mode "L": weights 0.299, 0.587 and 0.114 in 16 bits, rounded."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).astype(np.uint8)


def grey_as_tensorflow(rgb: UInt8[np.ndarray, "n L 3"]) -> UInt8[np.ndarray, "n L"]:
    """`tf.image.rgb_to_grayscale` of x / 255 (weights 0.2989, 0.587, 0.114) * 255.5, floored."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return ((2989 * red + 5870 * green + 1140 * blue) * 511 // 5_100_000).astype(np.uint8)


class Cifar10(PictureTask):
    """CIFAR-10 from the publisher's Python batches or, if they are missing, from TFDS's `cifar10`.

    Args:
        colour: three values per pixel instead of one.
        data_seed: of the random tenth that is validation; independent of a run's seed.
        pool: see `PictureTask`; squares of grey values, or of each colour.
    """

    source = "release"
    num_classes, classes = NUM_CLASSES, CLASSES
    tfds_name = "cifar10"
    publisher = Source(
        "CIFAR-10",
        "cifar-10-batches-py",
        (*FILES["train"], *FILES["test"]),
        (CIFAR10.filename,),
        CIFAR10,
    )

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        colour: bool,
        mean: float | int | Sequence[float | int],
        std: float | int | Sequence[float | int],
        data_seed: int,
        pool: int = 1,
    ):
        super().__init__(protocol, data_root, name, SHAPE, 3 if colour else 1, mean, std, pool)
        self.colour, self.data_seed = colour, data_seed
        self.grey = "tensorflow" if protocol["inputs"] == "lra2020" else "pillow"

    def examples(self, split: str) -> Iterator[Example]:
        rgb, labels = self._read("test" if split == "test" else "train")
        if split != "test":
            seed = self.data_seed if self.shuffle else None
            kept = cut(len(labels), {name: SIZES[name] for name in ("train", "val")}, seed)[split]
            rgb, labels = rgb[kept], labels[kept]
        yield from map(Example, self.pooled(self._pixels(rgb)), labels.tolist())

    def split_sizes(self) -> Mapping[str, int]:
        return SIZES

    def unused_arguments(self) -> Sequence[str]:
        return (*super().unused_arguments(), *(() if self.shuffle else ("data_seed",)))

    def fingerprint(self) -> dict[str, Any]:
        grey = None if self.colour else self.grey
        return {"data_seed": None} | super().fingerprint() | {"grey": grey}

    def notes(self) -> list[str]:
        self.source_folder()
        if self.source == "release":
            return []
        return ["read from TFDS's cifar10: its order gives other pictures to train and val"]

    def _pixels(self, rgb: UInt8[np.ndarray, "n L 3"]) -> UInt8[np.ndarray, "n *pixels"]:
        if self.colour:
            return rgb
        convert = grey_as_tensorflow if self.grey == "tensorflow" else grey_as_pillow
        starts = range(0, len(rgb), PICTURES_PER_BLOCK)
        return np.concatenate([convert(rgb[i : i + PICTURES_PER_BLOCK]) for i in starts])

    def _read(self, part: str) -> Pictures:
        folder = self.source_folder()
        if self.source == "tfds":
            return read_prepared(folder, part)
        rgb, labels = zip(*(read_batch(folder / name) for name in FILES[part]), strict=True)
        return np.concatenate(rgb), np.concatenate(labels)


def read_batch(path: Path) -> Pictures:
    """Read a publisher's file, {b"data": planar RGB, b"labels": list}; DataError if malformed."""
    content = restricted_pickle(path)
    data: Any = content.get(b"data")
    labels, values = content.get(b"labels"), SHAPE[0] * SHAPE[1] * 3
    is_array = isinstance(data, np.ndarray)
    if not is_array or data.dtype != np.uint8 or data.shape[1:] != (values,):
        found = f"{data.dtype} {data.shape}" if is_array else type(data).__name__
        raise DataError(
            f"{path}: b'data' is {found}, expected uint8 (rows, {values}); fetch it again"
        )
    if not isinstance(labels, list) or len(labels) != len(data):
        found = f"{len(labels)} long" if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise DataError(
            f"{path}: b'labels' is {found}, expected a list of {len(data)}, one per row; fetch it "
            "again"
        )
    for row, label in enumerate(labels):
        check_label(label, f"{path}, row {row}")
    rgb = data.reshape(-1, 3, SHAPE[0] * SHAPE[1]).transpose(0, 2, 1)
    return rgb, np.array(labels, np.int64)


def read_prepared(folder: Path, part: str) -> Pictures:
    """Read PNG `image` and `label` of each record of TFDS; raises DataError if one is malformed."""
    pictures, labels = [], []
    for record, example in enumerate(read_tfds(folder, part)):
        where = f"{folder}, {part}, record {record}"
        content = example.get("image")
        if not isinstance(content, bytes):
            raise DataError(
                f"{where}: has {', '.join(sorted(example))}, expected image and label; is it "
                "cifar10?"
            )
        pictures.append(decode_png(content, SHAPE, "RGB", where).reshape(-1, 3))
        labels.append(check_label(example.get("label"), where))
    pixels = np.array(pictures, np.uint8).reshape(-1, SHAPE[0] * SHAPE[1], 3)
    return pixels, np.array(labels, np.int64)


def check_label(label: Any, where: str) -> int:
    """`label` if it is a class; otherwise raises DataError."""
    if not isinstance(label, int) or not 0 <= label < NUM_CLASSES:
        raise DataError(f"{where}: label {label!r}, expected 0..{NUM_CLASSES - 1}; fetch it again")
    return label
