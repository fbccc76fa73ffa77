"""Base class and helpers of the picture tasks.

A picture is the sequence of its pixels, row by row from the top left. Grey pictures are stored as
uint8 (H*W,), colour pictures as (H*W, 3). Every length is H*W, because 0 is a value (black) and not
padding; so there is no vocabulary. The stored bytes do not depend on the model's input: under
lra2020 grey values as ids 0..255 to embed, otherwise one or three standardized numbers per pixel.
"""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from lra.errors import ConfigError, DataError
from lra.tasks.base import ENCODINGS, Task, check_at_least, check_option, permutation
from lra.tasks.linear_baseline import linear_accuracy

SHADES = " .:-=+*#%@"
TEXT_WIDTH = 64
POOLED_AT_ONCE = 1000  # pictures; bounds the memory
BLOCK_BYTES = 2**26  # of pictures that `mean_pixels` reads at once


class PictureTask(Task):
    """A task of pictures of one size.

    The encoding "lra2020" embeds grey values; it has no colour task, so colour pictures are values
    as in "s4".

    Args:
        shape: height and width of the publisher's or generator's pictures.
        num_features: 1 for grey, 3 for colour pictures.
        mean, std: of a pixel in units of 0..255, one number or one per feature; the model's input
            is (x - mean) / std.
        pool: side of the squares of pixels whose rounded means are the pixels of the task; 1 keeps
            the pictures as they are.
    """

    inputs = "pixels"
    vocab = None
    picture_shape: tuple[int, int]

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        shape: tuple[int, int],
        num_features: int,
        mean: float | int | Sequence[float | int],
        std: float | int | Sequence[float | int],
        pool: int = 1,
    ):
        check_option("protocol.inputs", protocol["inputs"], ENCODINGS)
        self.name, self.data_root, self.shuffle = name, Path(data_root), protocol["shuffle"]
        check_at_least("task.pool", pool, 1)
        if any(side % pool for side in shape):
            raise ConfigError(f"task.pool={pool} does not divide {shape[0]}x{shape[1]} pixels")
        self.drawn_shape, self.pool = shape, pool
        self.picture_shape, self.num_features = (shape[0] // pool, shape[1] // pool), num_features
        self.seq_len = self.picture_shape[0] * self.picture_shape[1]
        self.embeds = protocol["inputs"] == "lra2020" and num_features == 1
        self.mean = _per_feature("task.mean", mean, num_features)
        self.std = _per_feature("task.std", std, num_features)
        if (self.std <= 0).any():
            raise ConfigError(f"task.std={std}: expected numbers above 0")

    def unused_arguments(self) -> Sequence[str]:
        # without pooling, stores have the names that they had before this argument existed
        return ("mean", "std", *(() if self.pool > 1 else ("pool",)))

    @property
    def num_tokens(self) -> int | None:
        return 256 if self.embeds else None

    def decode(self, inputs: jax.Array) -> jax.Array:
        """Map stored pixels (B, L[, 3]) to ids (B, L) int32 or values (B, L, F) float32."""
        if self.embeds:
            return inputs.astype(jnp.int32)
        pixels = inputs if self.num_features > 1 else inputs[..., None]
        return (pixels.astype(jnp.float32) - self.mean) / self.std

    def pooled(self, pictures: UInt8[np.ndarray, "n *drawn"]) -> UInt8[np.ndarray, "n *pixels"]:
        """Flat pictures of the task, from pictures of the publisher's or generator's size."""
        count, size = len(pictures), self.pool
        (height, width), features = self.picture_shape, self.num_features
        flat = (count, height * width, features) if features > 1 else (count, height * width)
        if size == 1:
            return pictures.reshape(flat)
        found = np.empty((count, height, width, features), np.uint8)
        for first in range(0, count, POOLED_AT_ONCE):
            part = pictures[first : first + POOLED_AT_ONCE]
            squares = part.reshape(-1, height, size, width, size, features)
            sums = squares.sum((2, 4), dtype=np.uint32)
            found[first : first + POOLED_AT_ONCE] = (sums + size**2 // 2) // size**2
        return found.reshape(flat)

    def parse(self, example: Any) -> UInt8[np.ndarray, "*pixels"]:
        """The pixels of a picture: an array (H, W), or (H, W, 3) in colour, of integers 0..255."""
        pixels = np.asarray(example)
        shape = (*self.picture_shape, *(self.num_features,)[: self.num_features > 1])
        is_valid = pixels.shape == shape and np.issubdtype(pixels.dtype, np.integer)
        if not is_valid or pixels.min() < 0 or pixels.max() > 255:
            raise DataError(
                f"{self.name}: found an array {pixels.shape} of {pixels.dtype}; expected {shape} "
                "of whole numbers from 0 to 255"
            )
        return pixels.astype(np.uint8).reshape(self.seq_len, *shape[2:])

    def to_text(self, inputs: np.ndarray) -> str:
        """The picture in ten shades, 64 characters wide; a character shows its brightest pixel."""
        height, width = self.picture_shape
        grey = np.asarray(inputs).reshape(height, width, self.num_features).mean(axis=2)
        wide = max(1, TEXT_WIDTH // width)  # characters per pixel
        across = max(1, width // TEXT_WIDTH)  # pixels per character, horizontally
        down = max(1, 2 * width // TEXT_WIDTH)  # a character is twice as high as wide
        grey = grey.reshape(height // down, down, width // across, across).max(axis=(1, 3))
        rows = (grey * len(SHADES) / 256).astype(int).repeat(wide, axis=1)
        return "\n".join("".join(SHADES[shade] for shade in row) for row in rows)

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Adds `brightness`, the mean of all pixels and colours, rounded to 0..255."""
        mean = mean_pixels(split.inputs, self.num_features).mean(axis=1)
        return super().factors(split) | {"brightness": np.rint(mean).astype(np.int64)}

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and `mean_pixel`: a linear model of the mean of each colour."""
        train, test = (
            (mean_pixels(splits[name].inputs, self.num_features), np.asarray(splits[name].labels))
            for name in ("train", "test")
        )
        accuracy = linear_accuracy(train, test, self.num_classes)
        return super().reference_lines(splits) | {"mean_pixel": accuracy}


def _per_feature(key: str, found: Any, num_features: int) -> Float32[np.ndarray, "1 1 F"]:
    """`found` with axes for batch and length: (1, 1, F), or (1, 1, 1) for a single number."""
    try:
        values = np.asarray(found, np.float32).reshape(1, 1, -1)
    except (TypeError, ValueError):
        values = np.zeros((1, 1, 0), np.float32)
    if values.shape[2] not in (1, num_features) or not np.isfinite(values).all():
        raise ConfigError(
            f"{key}={found}: expected a number{', or three in brackets' * (num_features == 3)}"
        )
    return values


def mean_pixels(
    inputs: UInt8[np.ndarray, "n *pixels"], num_features: int
) -> Float[np.ndarray, "n {num_features}"]:
    """The mean pixel of each picture per feature; reads a memory-mapped array in blocks."""
    rows = max(1, BLOCK_BYTES // max(1, inputs[:1].nbytes))
    blocks = [
        np.asarray(inputs[first : first + rows])
        .reshape(-1, inputs[0].size // num_features, num_features)
        .mean(axis=1)
        for first in range(0, len(inputs), rows)
    ]
    return np.concatenate(blocks)


def cut(count: int, sizes: Mapping[str, int], seed: int | None) -> dict[str, Int[np.ndarray, " k"]]:
    """Cut `count` pictures into splits: the indices of each split, ascending.

    The splits are consecutive parts of the files' order or, with a seed, of a seeded permutation.
    If `count` is not the sum of `sizes`, the parts keep their proportions and the first one takes
    the remainder.
    """
    whole = sum(sizes.values())
    parts = {name: (count * size + whole // 2) // whole for name, size in sizes.items()}
    parts[next(iter(parts))] += count - sum(parts.values())
    order = np.arange(count) if seed is None else permutation(count, seed)
    bounds = np.cumsum(list(parts.values()))[:-1]
    return {name: np.sort(part) for name, part in zip(parts, np.split(order, bounds), strict=True)}


def decode_png(
    content: bytes, shape: tuple[int, int], mode: str, where: str
) -> UInt8[np.ndarray, "*picture"]:
    """Pixels of a PNG, 8 bits each: (H, W) in mode "L", (H, W, 3) in mode "RGB".

    Raises DataError, which names the origin `where`, if it is not a PNG of this size.
    """
    from PIL.PngImagePlugin import PngImageFile

    height, width = shape
    try:
        # reads the header alone; the limit on its size is the next line, not Pillow's
        picture = PngImageFile(io.BytesIO(content))
        if picture.size != (width, height) or picture.mode.startswith("I"):
            found = f"a PNG of {picture.width}x{picture.height} in mode {picture.mode}"
            raise DataError(
                f"{where}: {found}, expected {width}x{height} and 8 bits; take the files of that "
                "size"
            )
        return np.asarray(picture.convert(mode))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        what = f"{type(error).__name__}: {error}" if content else "the file is empty"
        raise DataError(f"{where}: not a readable PNG ({what}); fetch it again") from error
