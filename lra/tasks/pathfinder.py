"""Pathfinder and Path-X: whether two marked ends are joined by one dashed path.

A picture has two long dashed paths among short distractors. Source: Linsley et al. 2018 (arXiv
1805.08315) and Kim et al. 2020; Pathfinder (32x32) and Path-X (128x128) of the Long Range Arena
(Tay et al. 2020, arXiv 2011.04006) are the hard level, paths of 14 dashes.

The pictures are generated from a seed (`lra.tasks.pathfinder_generator`), or read from the folders
of the release,

    pathfinder32/curv_contour_length_14/metadata/<batch>.npy, .../imgs/<batch>/sample_<k>.png

with one row of metadata per picture: folder, file, number, LABEL, continuity, contour length,
distractor length, paddle length, paddle thickness, margin, number of contrasts. The rows are plain
text in the release and a binary array of strings from the upstream generator.

Splits: generated pictures are independent, so consecutive blocks of one stream serve every
protocol. The release is cut 80/10/10: in the order of its files under lra2020 (the original's TFDS
builder stores them in another order), otherwise by a seeded permutation (S4 draws with PyTorch's
generator: the same shares, other pictures).
"""

import collections
import contextlib
import hashlib
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import joblib
import numpy as np
from jaxtyping import UInt8

from lra.errors import DataError, LraError
from lra.sources.locate import LRA_RELEASE, Source, locate_all, open_source, read_source
from lra.tasks.base import (
    SPLITS,
    Example,
    check_at_least,
    check_data_seed,
    check_option,
    check_sizes,
)
from lra.tasks.parallel import parallel_map
from lra.tasks.pathfinder_generator import draw, settings
from lra.tasks.pictures import PictureTask, cut, decode_png

LEVELS = {
    "easy": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}
EMPTY = (32, "easy", "imgs/0/sample_172.png")  # an empty file of the release
PICTURES_PER_CHUNK = 500  # generated per file; an interruption loses at most this per process
PICTURES_PER_BATCH = 1000  # per folder of the release
CALL_BYTES = 2**22  # of pictures that one parallel call reads from the release
CALLS = 64  # parallel calls whose results are in memory
REMEDY = "unpack the release again, or data.allow_partial=true leaves such pictures out"

Pictures = tuple[UInt8[np.ndarray, "n H W"], UInt8[np.ndarray, " n"]]


class Batch(NamedTuple):
    """The rows of one metadata file."""

    path: Path
    files: list[str]  # of the pictures, relative to the level's folder
    labels: UInt8[np.ndarray, " n"]


def read_metadata(path: Path) -> Batch:
    """Read metadata, text or a binary array of strings; raises DataError if it is malformed."""
    files, labels = [], []
    for number, row in enumerate(_rows(path, read_source(path))):
        if len(row) < 4 or row[3] not in ("0", "1"):
            found = f"label {row[3]!r} in column 3" if len(row) > 3 else f"{len(row)} columns"
            raise DataError(
                f"{path}, row {number}: {found}, expected folder, file, number, label (0 or 1), ..."
            )
        file = PurePosixPath(row[0], row[1])
        if file.is_absolute() or ".." in file.parts or not str(file).isprintable():
            raise DataError(f"{path}, row {number}: {str(file)!r} is no file of this folder")
        files.append(f"{row[0]}/{row[1]}")
        labels.append(int(row[3]))
    return Batch(path, files, np.array(labels, np.uint8))


def refuse_repeats(batches: Sequence[Batch]) -> None:
    """Raises DataError if metadata names a picture twice, because two splits could share it."""
    seen: dict[str, str] = {}
    for batch in batches:
        for row, file in enumerate(batch.files):
            if file in seen:
                raise DataError(
                    f"{batch.path}, row {row}: {file} again, after {seen[file]}; unpack the "
                    "release again"
                )
            seen[file] = f"{batch.path.name}, row {row}"


def without_missing(folder: Path, batch: Batch) -> Batch:
    """`batch` without pictures whose files are missing or empty; lists each folder once."""
    found = set()
    for name in {file.rpartition("/")[0] for file in batch.files}:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder / name) as entries:
            found |= {f"{name}/{entry.name}" for entry in entries if entry.stat().st_size}
    return select(batch, found.__contains__)


def select(batch: Batch, is_kept: Callable[[str], bool]) -> Batch:
    """The pictures of `batch` for whose file `is_kept` is true."""
    kept = [i for i, file in enumerate(batch.files) if is_kept(file)]
    return Batch(batch.path, [batch.files[i] for i in kept], batch.labels[kept])


def _rows(path: Path, content: bytes) -> list[list[str]]:
    if not content.startswith(b"\x93NUMPY"):
        try:
            return [line.split() for line in content.decode("ascii").splitlines()]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: neither text nor a NumPy array (byte {error.start}); fetch it again"
            ) from error
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        if array.ndim == 2 and array.dtype.kind in "SU":
            return array.astype("U").tolist()
    except Exception as error:  # NumPy raises almost anything for a damaged header
        convert = "numpy.savetxt(PATH, numpy.load(PATH, allow_pickle=True), fmt='%s')"
        raise DataError(
            f"{path}: cannot be read ({error}). Pickled objects can run code and are not loaded: "
            f"if you trust the file, convert it to text with {convert}; otherwise fetch it again"
        ) from error
    raise DataError(
        f"{path}: {array.dtype} {array.shape}, expected rows of strings, one per picture"
    )


def read_pictures(
    folder: Path, files: list[str], size: int
) -> tuple[UInt8[np.ndarray, "n H W"], str]:
    """Read PNG files, with the SHA-256 of all together; raises DataError if one is not valid."""
    pictures, digest = np.empty((len(files), size, size), np.uint8), hashlib.sha256()
    for place, file in zip(pictures, files, strict=True):
        if not (folder / file).exists():
            raise DataError(f"{folder / file}: missing, but metadata names it; {REMEDY}")
        content = read_source(folder / file)
        if not content:
            raise DataError(f"{folder / file}: the file is empty; {REMEDY}")
        digest.update(content)
        place[:] = decode_png(content, (size, size), "L", str(folder / file))
    return pictures, digest.hexdigest()


def save_chunk(folder: Path, first: int, last: int, size: int, level: str, seed: int) -> Path:
    """The file with pictures first..last-1 of a seed; draws them unless a valid file exists."""
    path = folder / f"{first:08d}-{last:08d}.npz"
    if load_chunk(path, last - first, size) is None:
        images, labels = draw(first, last, size, level, seed)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, images=images, labels=labels)
        temporary.replace(path)
    return path


def load_chunk(path: Path, count: int, size: int) -> Pictures | None:
    """The content of a file of `save_chunk`, or None if it is missing or damaged."""
    try:
        with open_source(path) as file, np.load(file, allow_pickle=False) as chunk:
            images, labels = chunk["images"], chunk["labels"]
    except Exception:  # of a missing file, or almost anything of a damaged one
        return None
    is_valid = images.shape == (count, size, size) and labels.shape == (count,)
    return (images, labels) if is_valid and images.dtype == labels.dtype == np.uint8 else None


def chunk_ranges(first: int, last: int, step: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `step` pictures that make up first..last-1."""
    return [(start, min(start + step, last)) for start in range(first, last, step)]


def generate(n: int, size: int = 32, level: str = "hard", seed: int = 0) -> Pictures:
    """Pictures 0..n-1 and their labels (1: both dots are on one path), drawn on all cores.

    Picture i depends on size (32, 64, 128 or 256 pixels), level ("easy", "intermediate" or "hard"),
    seed and i alone. Raises ConfigError if a value is not valid.
    """
    settings(size, level)
    check_data_seed(seed)
    check_at_least("n", n, 0)
    images, labels = np.zeros((n, size, size), np.uint8), np.zeros(n, np.uint8)
    ranges = chunk_ranges(0, n, min(PICTURES_PER_CHUNK, 2**21 // size**2))
    calls = [(first, last, size, level, seed) for first, last in ranges]
    drawn = parallel_map(draw, calls, 2 * joblib.cpu_count())
    for (first, last), part in zip(ranges, drawn, strict=True):
        images[first:last], labels[first:last] = part
    return images, labels


class Pathfinder(PictureTask):
    """Pathfinder, generated or released, at one size and level.

    Args:
        source: "generated" or "release".
        size: height and width, 32, 64, 128 (Path-X) or 256 (Path-256).
        level: "easy", "intermediate" or "hard".
        sizes: pictures of train, val and test; a release has to hold their sum.
        data_seed: of the generator, or of the random order of the release; independent of a run's
            seed.
        pool: see `PictureTask`.
    """

    num_classes, classes = 2, ("separate", "connected")

    def __init__(
        self,
        protocol: Mapping[str, Any],
        data_root: str | Path,
        name: str,
        source: str,
        size: int,
        level: str,
        sizes: Mapping[str, int],
        data_seed: int,
        mean: float | int,
        std: float | int,
        pool: int = 1,
    ):
        check_option("task.source", source, ("generated", "release"))
        settings(size, level)  # raises if they are unknown
        check_data_seed(data_seed)
        super().__init__(protocol, data_root, name, (size, size), 1, mean, std, pool)
        self.source, self.size, self.level, self.data_seed = source, size, level, data_seed
        self.sizes = check_sizes(sizes)
        if source == "release":
            self.publisher = Source(
                f"Pathfinder {size}x{size}, {level}",
                f"pathfinder{size}/{LEVELS[level]}",
                ("imgs", "metadata"),
                (f"pathfinder{size}.tar.gz", LRA_RELEASE.filename),
                LRA_RELEASE,
                "task.source=generated draws such pictures instead",
            )
        self._hashes: dict[str, str] = {}  # of the pictures' files, filled while reading
        self._left_out = 0  # missing pictures of an incomplete release

    def examples(self, split: str) -> Iterator[Example]:
        parts = self._drawn(split) if self.source == "generated" else self._read(split)
        for pictures, labels in parts:
            yield from map(Example, self.pooled(pictures), labels.tolist())

    def first_examples(self, split: str, count: int) -> Iterator[Example]:
        if self.source == "release":
            return super().first_examples(split, count)
        begin, count = self._begin(split), min(count, self.sizes[split])
        pictures, labels = draw(begin, begin + count, self.size, self.level, self.data_seed)
        return map(Example, self.pooled(pictures), labels.tolist())

    def split_sizes(self) -> Mapping[str, int]:
        return self.sizes | ({"train": self.sizes["train"] - 1} if self._has_empty else {})

    def unused_arguments(self) -> Sequence[str]:
        uses_seed = self.source == "generated" or self.shuffle
        return (*super().unused_arguments(), *(() if uses_seed else ("data_seed",)))

    def fingerprint(self) -> dict[str, Any]:
        return {"data_seed": None} | super().fingerprint()

    @cached_property
    def _folders(self) -> list[Path]:
        """Every copy of the release's folder, the best first. Raises DataError if there is none."""
        assert self.publisher is not None
        return locate_all(self.publisher, self.data_root) or [self.source_folder()]

    @property
    def _has_empty(self) -> bool:
        """Whether the files are the release's easy level, with its one empty file."""
        if self.source == "release" and (self.size, self.level) == EMPTY[:2]:
            with contextlib.suppress(DataError, FileNotFoundError):
                return (self._folders[0] / EMPTY[2]).stat().st_size == 0
        return False

    def source_files(self) -> list[Path]:
        """The metadata files by batch number, without others such as upstream's `combined.npy`."""
        if self.source == "generated":
            return []
        folder = self._folders[0] / "metadata"
        files = [path for path in folder.glob("*.npy") if path.stem.isdecimal()]
        if not files:
            raise DataError(
                f"{folder}: no metadata files 0.npy, 1.npy, ...; unpack the release again"
            )
        return sorted(files, key=lambda path: int(path.stem))

    def source_signature(self) -> list[Any]:
        """That of the metadata files, and of a partial release the number of missing pictures."""
        found = super().source_signature()
        if self.allow_partial and self.source == "release":
            _ = self._batches  # counts them
            found += [f"{self._left_out} missing"] if self._left_out else []
        return found

    def source_hashes(self) -> list[dict[str, str]]:
        """One per metadata file, and one per split: a hash of the hashes of its picture files."""
        return super().source_hashes() + [
            {"name": f"pictures of {split}", "sha256": digest}
            for split, digest in self._hashes.items()
        ]

    def notes(self) -> list[str]:
        if self.source == "generated":
            return []
        used, *others = self._folders
        notes = [f"used {used} and left aside another copy, {other}" for other in others]
        if self._has_empty:
            notes.append(
                f"{used / EMPTY[2]} is empty, as in the release: left out, so train has one "
                "picture less"
            )
        if self._left_out:
            notes.append(
                f"{self._left_out:,} pictures that metadata names are missing or empty: left out"
            )
        return notes

    @cached_property
    def _batches(self) -> list[Batch]:
        """The rows of all metadata files; with `allow_partial`, only those that have a picture."""
        batches = [read_metadata(path) for path in self.source_files()]
        refuse_repeats(batches)
        if self._has_empty:
            batches = [select(batch, lambda file: file != EMPTY[2]) for batch in batches]
        if self.allow_partial:
            named = sum(len(batch.files) for batch in batches)
            batches = [without_missing(self._folders[0], batch) for batch in batches]
            self._left_out = named - sum(len(batch.files) for batch in batches)
        count, expected = sum(len(batch.files) for batch in batches), sum(self.sizes.values())
        if count > expected:
            raise DataError(
                f"{self._folders[0]}: {count:,} pictures, more than the {expected:,} of "
                f"task.sizes={self.sizes}"
            )
        return batches

    def _read(self, split: str) -> Iterator[Pictures]:
        """The pictures of `split` in the order of the files; reads no others."""
        files = [file for batch in self._batches for file in batch.files]
        labels = np.concatenate([batch.labels for batch in self._batches])
        rows = cut(len(files), self.sizes, self.data_seed if self.shuffle else None)[split]
        ends = np.cumsum([len(batch.files) for batch in self._batches])
        step = max(1, CALL_BYTES // self.seq_len)
        groups = [
            part[first : first + step]
            for part in np.split(rows, np.searchsorted(rows, ends[:-1]))  # of one metadata file
            for first in range(0, len(part), step)
        ]
        calls = [(self._folders[0], [files[row] for row in group], self.size) for group in groups]
        results = parallel_map(read_pictures, calls, CALLS)
        digest = hashlib.sha256()
        for group, (pictures, sha256) in zip(groups, results, strict=True):
            digest.update(sha256.encode())
            yield pictures, labels[group]
        self._hashes[split] = digest.hexdigest()

    @property
    def _finished(self) -> Path:
        """The folder of this store's finished chunks, which `packed` removes."""
        sizes = "-".join(map(str, self.sizes.values()))
        name = f"{self.size}-{self.level}-{self.data_seed}-{sizes}-v{self.reader_version}"
        return self.data_root / "generated" / name

    def _begin(self, split: str) -> int:
        """The number of the split's first picture in the stream of the seed."""
        # the last split is first, so that the others do not depend on train's size
        return sum(self.sizes[later] for later in SPLITS[SPLITS.index(split) + 1 :])

    def _drawn(self, split: str) -> Iterator[Pictures]:
        begin = self._begin(split)
        ranges = chunk_ranges(begin, begin + self.sizes[split], PICTURES_PER_CHUNK)
        drawn = (self.size, self.level, self.data_seed)
        calls = [(self._finished, first, last, *drawn) for first, last in ranges]
        paths = parallel_map(save_chunk, calls, 2 * joblib.cpu_count())
        for (first, last), path in zip(ranges, paths, strict=True):
            pictures = load_chunk(path, last - first, self.size)
            # None if another process has completed the same store and removed the chunks
            yield pictures or draw(first, last, *drawn)

    def packed(self) -> None:
        if self.source == "generated":
            shutil.rmtree(self._finished, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: chunks of another store
                self._finished.parent.rmdir()

    def export(self, splits: Mapping[str, Any], folder: Path) -> Path:
        """Write packed splits as the release's folders, train first, as lra2020 reads them.

        Raises LraError if the level's folder is not empty.
        """
        from PIL import Image

        level = Path(folder) / f"pathfinder{self.size}" / LEVELS[self.level]
        if level.exists() and any(level.iterdir()):
            raise LraError(f"{level} is not empty; choose an empty folder to export to")
        drawn = settings(self.size, self.level)
        margins = ",".join(map(str, drawn.margins))  # that of a single picture is not stored
        parameters = (
            f"{drawn.continuity} {drawn.contour_length} {drawn.distractor_length} "
            f"{drawn.paddle_length} {drawn.paddle_thickness} {margins} {drawn.contrasts}"
        )
        lines: dict[int, str] = collections.defaultdict(str)
        pictures = itertools.chain.from_iterable(
            zip(splits[split].inputs, splits[split].labels, strict=True) for split in SPLITS
        )
        for number, (pixels, label) in enumerate(pictures):
            batch, k = divmod(number, PICTURES_PER_BATCH)
            file = level / "imgs" / str(batch) / f"sample_{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels).reshape(self.picture_shape)).save(file)
            lines[batch] += f"imgs/{batch} {file.name} {k} {label} {parameters}\n"
        (level / "metadata").mkdir()
        for batch, rows in lines.items():
            (level / "metadata" / f"{batch}.npy").write_text(rows, encoding="ascii")
        return Path(folder)
