"""Describes a publisher's files and finds them on disk.

People keep the same files in many layouts. A folder is therefore recognized by its name and its
content at any of a few nesting levels, an archive by its name with whatever a browser made of it.
Nothing is written: `lra.sources.archives` unpacks and `lra.sources.download` downloads.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lra.errors import DataError
from lra.files import read_regular_file, regular_file

NESTING = 4  # maximum number of folders between the data root and a publisher's folder
ARCHIVE_NESTING = 2
# pictures, texts and the harness's own data
BULK = frozenset(("imgs", "metadata", "pos", "neg", "unsup", "packed", "tfds"))
MAX_ENTRIES = 10_000  # entries read per folder; a larger folder holds pictures or texts
MAX_FOLDERS = 5_000  # folders per level, so that a home folder as data root is not searched whole

# .tar.gz and the like with what browsers and wget add: `x (1).gz`, `x.tar (1).gz`, `x.gz.1`
ARCHIVE_SUFFIX = re.compile(
    r"(\.tar)?( ?\(\d+\))?(\.tar|\.tgz|\.txz|(\.tar)?\.(gz|xz|bz2))?(\.\d+)?$"
)

# called with what is done, the amount done, and the total amount if it is known
Progress = Callable[[str, int, int | None], None]


def ignore_progress(what: str, done: int, total: int | None) -> None:
    """The default of every `on_progress` argument."""


class Remote(NamedTuple):
    """A file that its publisher serves."""

    url: str
    filename: str
    size: int | None  # bytes, if published
    sha256: str | None  # hexadecimal, if published
    about: str = ""  # a note for the user, such as the size

    def __str__(self) -> str:
        size = f"{self.size / 1e6:,.0f} MB" if self.size else ""
        about = ", ".join(filter(None, (size, self.about))) or "of unknown size"
        return f"{self.filename} ({about})"


# Sizes and hashes: IMDB from TFDS 4.9.10, datasets/imdb_reviews/checksums.tsv; CIFAR-10 from
# Keras, cifar10.py (TFDS reads another form of it).
IMDB = Remote(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    "aclImdb_v1.tar.gz",
    84_125_825,
    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
)
CIFAR10 = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "cifar-10-python.tar.gz",
    170_498_071,
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
LRA_RELEASE = Remote(
    "https://storage.googleapis.com/long-range-arena/lra_release.gz",
    "lra_release.gz",
    None,
    None,
    "8.2 GB, the Long Range Arena release, a tar.gz despite its name",
)


@dataclass(frozen=True)
class Source:
    """A publisher's files as one task needs them.

    A folder of another name is accepted if it has all of `contains`, unless `folder` has several
    components: a level of Pathfinder has the same content at every size and difficulty, so there
    the whole path has to match.
    """

    title: str  # "IMDB reviews"
    folder: str  # the publisher's name: "aclImdb", "pathfinder32/curv_contour_length_14"
    contains: tuple[str, ...]  # what has to exist in it: ("train/pos", "test/neg")
    archives: tuple[str, ...]  # usual names of the archive: ("aclImdb_v1.tar.gz",)
    remote: Remote | None = None
    alternative: str = ""  # ends the error if the files cannot be obtained


def locate(source: Source, data_root: str | Path) -> Path | None:
    """The first folder of `locate_all`, or None."""
    return next(iter(locate_all(source, data_root)), None)


def locate_all(source: Source, data_root: str | Path) -> list[Path]:
    """Every folder under `data_root` (itself included) with the source's files, the best first.

    The Long Range Arena release unpacks to `lra_release/lra_release/` beside a partial outer copy,
    so the path with most `lra_release` in it comes first; then the publisher's own name, the
    smallest depth and the alphabet decide.
    """
    root = Path(data_root)
    name = PurePosixPath(source.folder).parts
    found: dict[Path, tuple[tuple, Path]] = {}  # keyed by the path without links
    for folder, _ in _folders(root, NESTING + len(name)):
        # absolute, because a data root of "." or "x/.." has a name too
        has_name = Path(os.path.abspath(folder)).parts[-len(name) :] == name
        if (has_name or len(name) == 1) and all((folder / x).exists() for x in source.contains):
            parts = folder.relative_to(root).parts
            rank = (-parts.count("lra_release"), not has_name, len(parts), parts)
            found.setdefault(folder.resolve(), (rank, folder))
    return [folder for _, folder in sorted(found.values())]


def find_archive(source: Source, data_root: str | Path) -> Path | None:
    """An archive with one of the source's names and any archive suffix or none, else None.

    The name that `source.archives` lists first (the smallest archive) wins, then an exact name.
    """
    stems = [archive_stem(name) for name in source.archives]
    ranked = [
        (stems.index(archive_stem(name)), name not in source.archives, len(folder.parts), path)
        for folder, names in _folders(Path(data_root), ARCHIVE_NESTING)
        for name in names
        if archive_stem(name) in stems and (path := folder / name).is_file()
    ]
    return min(ranked)[-1] if ranked else None


def archive_stem(name: str) -> str:
    """The name of an archive without its suffixes."""
    return ARCHIVE_SUFFIX.sub("", name, count=1)


def _folders(root: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """`root` and the folders below it, breadth first, each with the names of its entries."""
    level = [root]
    for _ in range(depth + 1):
        below: list[Path] = []
        for folder in level[:MAX_FOLDERS]:
            try:
                with os.scandir(folder) as entries:
                    listed = list(itertools.islice(entries, MAX_ENTRIES))
            except OSError:  # missing, not a folder, or not readable
                continue
            yield folder, [entry.name for entry in listed]
            below += [
                folder / entry.name
                for entry in listed
                # os.path.isdir, because entry.is_dir() raises for a link to itself
                if not (entry.name in BULK or entry.name.startswith("."))
                and (
                    entry.is_dir(follow_symlinks=False)
                    or (entry.is_symlink() and os.path.isdir(entry.path))
                )
            ]
        level = below


def open_source(path: Path) -> BufferedReader:
    """Open a file that is not trusted; raises DataError unless it is regular and can be read."""
    with _one_line(path):
        return open(path, "rb", opener=regular_file)


def read_source(path: Path, limit: int | None = None) -> bytes:
    """The content of a file, with the errors of `open_source`; DataError above `limit` bytes."""
    with _one_line(path):
        return read_regular_file(path, limit)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a file that can be read") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content as hexadecimal digits."""
    with open_source(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signature(paths: Iterable[Path]) -> list[list[str | int]]:
    """[name, bytes, modification time in ns] of each file; raises DataError if one is missing."""
    try:
        stats = [(path.name, path.stat()) for path in paths]
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}; its folder is incomplete, fetch it again"
        ) from error
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
