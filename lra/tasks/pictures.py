"""What do all picture tasks share? A picture is a sequence of its pixels, row after row from the top left.

Grey pictures are stored as uint8 (H*W,), colour pictures as (H*W, 3). Every length is H*W: pixel 0 is a value, black,
and never padding. So there is no vocabulary under any protocol, and the stored bytes are the same whatever the model is
given: under lra2020 the grey values as ids 0..255 to embed, else one or three standardised numbers a pixel.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from lra.errors import ConfigError, DataError
from lra.tasks.base import Task, check_option, shuffled
from lra.tasks.linear_baseline import linear_accuracy

SHADES = " .:-=+*#%@"
TEXT_WIDTH = 64
BLOCK_BYTES = 2**26  # of pictures whose means are taken at once


class PictureTask(Task):
    """A task of pictures of one size.

    Args:
        protocol: mapping with `inputs` and `shuffle`. "lra2020" embeds grey values; it has no colour task, so there
            colour pictures are values as in "s4".
        shape: height and width.
        num_features: 1 for grey, 3 for colour pictures.
        mean, std: of a pixel in units of 0..255, one number or one of each feature; values become (x - mean) / std.
            They are applied to what is read from the store and change no byte of it.
    Raises:
        ConfigError: a value cannot be used.
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
    ):
        check_option("protocol.inputs", protocol["inputs"], ("lra2020", "s4"))
        self.name, self.data_root, self.shuffle = name, Path(data_root), protocol["shuffle"]
        self.picture_shape, self.num_features = shape, num_features
        self.seq_len = shape[0] * shape[1]
        self.embeds = protocol["inputs"] == "lra2020" and num_features == 1
        self.mean = _one_each("task.mean", mean, num_features)
        self.std = _one_each("task.std", std, num_features)
        if (self.std <= 0).any():
            raise ConfigError(f"task.std={std}: expected numbers above 0")

    @property
    def num_tokens(self) -> int | None:
        """256 where the grey values are embedded, else None."""
        return 256 if self.embeds else None

    def decode(self, inputs: jax.Array) -> jax.Array:
        """Stored pixels (B, L) or (B, L, 3) -> ids (B, L) int32 where they are embedded, else values (B, L, F) float32."""
        if self.embeds:
            return inputs.astype(jnp.int32)
        pixels = inputs if self.num_features > 1 else inputs[..., None]
        return (pixels.astype(jnp.float32) - self.mean) / self.std

    def to_text(self, inputs: np.ndarray) -> str:
        """The picture in ten shades, 64 characters wide; the brightest pixel of those that share a character."""
        height, width = self.picture_shape
        grey = np.asarray(inputs).reshape(height, width, self.num_features).mean(axis=2)
        wide = max(1, TEXT_WIDTH // width)  # characters a pixel
        across = max(1, width // TEXT_WIDTH)  # and pixels a character,
        down = max(1, 2 * width // TEXT_WIDTH)  # which is twice as high as wide
        grey = grey.reshape(height // down, down, width // across, across).max(axis=(1, 3))
        rows = (grey * len(SHADES) / 256).astype(int).repeat(wide, axis=1)
        return "\n".join("".join(SHADES[shade] for shade in row) for row in rows)

    def factors(self, split: Any) -> dict[str, np.ndarray]:
        """Also `brightness`, the mean over all pixels and colours in whole units of 0..255."""
        mean = mean_pixels(split.inputs, self.num_features).mean(axis=1)
        return super().factors(split) | {"brightness": np.rint(mean).astype(np.int64)}

    def reference_lines(self, splits: Mapping[str, Any]) -> dict[str, float]:
        """`majority`, and `mean_pixel`: a linear model that sees how bright the picture is (each colour of it)."""
        train, test = (
            (mean_pixels(splits[name].inputs, self.num_features), np.asarray(splits[name].labels))
            for name in ("train", "test")
        )
        return super().reference_lines(splits) | {
            "mean_pixel": linear_accuracy(train, test, self.num_classes)
        }


def _one_each(key: str, found: Any, num_features: int) -> Float32[np.ndarray, "1 1 F"]:
    """One number for each feature, with axes for batch and length: (1, 1, F), or (1, 1, 1) for one of all."""
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
    """The mean pixel of each picture, feature by feature; reads a memory-mapped array in blocks."""
    rows = max(1, BLOCK_BYTES // max(1, inputs[:1].nbytes))
    blocks = [
        np.asarray(inputs[first : first + rows])
        .reshape(-1, inputs[0].size // num_features, num_features)
        .mean(axis=1)
        for first in range(0, len(inputs), rows)
    ]
    return np.concatenate(blocks)


def cut(count: int, sizes: Mapping[str, int], seed: int | None) -> dict[str, Int[np.ndarray, " k"]]:
    """Which of `count` pictures belong to each split: their numbers, ascending.

    The splits follow each other in the order of the files or, with a seed, in that of a seeded permutation. Where
    `count` is not the sum of `sizes`, the parts keep their proportion and the first takes the remainder.
    """
    whole = sum(sizes.values())
    parts = {name: (count * size + whole // 2) // whole for name, size in sizes.items()}
    parts[next(iter(parts))] += count - sum(parts.values())
    order = np.arange(count) if seed is None else shuffled(count, seed)
    bounds = np.cumsum(list(parts.values()))[:-1]
    return {name: np.sort(part) for name, part in zip(parts, np.split(order, bounds), strict=True)}


def decode_png(
    content: bytes, shape: tuple[int, int], mode: str, where: str
) -> UInt8[np.ndarray, "*picture"]:
    """A PNG's pixels (H, W) in mode "L", (H, W, 3) in mode "RGB", each 8 bits; other modes are converted by Pillow.

    Raises:
        DataError: not a PNG of this size, naming `where` it is from.
    """
    import struct
    import zlib

    from PIL import Image

    height, width = shape
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG",))
        if picture.size != (width, height) or picture.mode.startswith("I"):
            found = f"a PNG of {picture.width}x{picture.height} in mode {picture.mode}"
            raise DataError(
                f"{where}: {found}, expected {width}x{height} and 8 bits; take the files of that size"
            )
        return np.asarray(picture.convert(mode))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        what = f"{type(error).__name__}: {error}" if content else "the file is empty"
        raise DataError(f"{where}: not a readable PNG ({what}); fetch it again") from error
