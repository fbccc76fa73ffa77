"""Which files does a publisher give, and where on this disk are they?

People keep the same files in many layouts, so they are looked for by what they are called and what they hold, in any
nesting of a few folders; an archive of them, by its name with whatever a browser has made of it. Nothing is written
here: `lra.sources.archives` unpacks, `lra.sources.download` fetches.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lra.errors import DataError

NESTING = 4  # so many folders may lie between the data root and a publisher's folder
ARCHIVE_NESTING = 2
BULK = frozenset(
    ("imgs", "metadata", "pos", "neg", "unsup", "packed", "tfds")
)  # pictures and texts, or our own
MAX_ENTRIES = (
    10_000  # of one folder that are looked at: with more it is full of pictures or texts too
)
MAX_FOLDERS = 5_000  # of one depth: a data root that is a home folder is not searched to the end

# .tar.gz and the like with what browsers and wget add, as in `x (1).gz`, `x.tar (1).gz`, `x.gz.1`
ARCHIVE_SUFFIX = re.compile(
    r"(\.tar)?( ?\(\d+\))?(\.tar|\.tgz|\.txz|(\.tar)?\.(gz|xz|bz2))?(\.\d+)?$"
)

Progress = Callable[
    [str, int, int | None], None
]  # what, how much is done, how much in all where known


class Remote(NamedTuple):
    """A file that its publisher serves; `size` in bytes and `sha256` where they are known."""

    url: str
    filename: str
    size: int | None
    sha256: str | None
    about: str = ""  # what a person should know before fetching it

    def __str__(self) -> str:
        size = f"{self.size / 1e6:,.0f} MB" if self.size else ""
        return (
            f"{self.filename} ({', '.join(filter(None, (size, self.about))) or 'of unknown size'})"
        )


# Size and hash: TFDS 4.9.10, datasets/imdb_reviews/checksums.tsv; of CIFAR-10 (TFDS reads another form): Keras, cifar10.py
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

    A folder of another name is taken too where it has all of `contains`, unless `folder` has several components: what
    a level of Pathfinder contains looks the same at every size and difficulty, so there the path has to end so.
    """

    title: str  # "IMDB reviews"
    folder: str  # as the publisher calls it: "aclImdb", "pathfinder32/curv_contour_length_14"
    contains: tuple[str, ...]  # what has to exist in it: ("train/pos", "test/neg")
    archives: tuple[str, ...]  # names under which people keep the archive: ("aclImdb_v1.tar.gz",)
    remote: Remote | None = None


def locate(source: Source, data_root: str | Path) -> Path | None:
    """The folder with the source's files, or None; the first of `locate_all`."""
    return next(iter(locate_all(source, data_root)), None)


def located(source: Source, data_root: str | Path, task_name: str) -> Path:
    """`locate` for a task that is about to read: where it finds nothing, the error names the command that helps.

    Raises:
        DataError: the source's files are not there.
    """
    folder = locate(source, data_root)
    if folder is None:
        raise DataError(
            f"{source.title}: not found under {data_root}; run `lra data prepare {task_name}`"
        )
    return folder


def locate_all(source: Source, data_root: str | Path) -> list[Path]:
    """Every folder that holds the source's files, from `data_root` itself downwards, the one to use first.

    The Long Range Arena release unpacks to `lra_release/lra_release/` beside a partial outer copy, so the path with
    most `lra_release` in it comes first; then the publisher's own name, the shallowest and the name decide.
    """
    root = Path(data_root)
    called = PurePosixPath(source.folder).parts
    found: dict[Path, tuple[tuple, Path]] = {}  # by what it is behind links
    for folder, _ in _folders(root, NESTING + len(called)):
        # a data root of "." or "x/.." has a name too
        is_called_so = Path(os.path.abspath(folder)).parts[-len(called) :] == called
        if (is_called_so or len(called) == 1) and all(
            (folder / name).exists() for name in source.contains
        ):
            parts = folder.relative_to(root).parts
            rank = (-parts.count("lra_release"), not is_called_so, len(parts), parts)
            found.setdefault(folder.resolve(), (rank, folder))
    return [folder for _, folder in sorted(found.values())]


def find_archive(source: Source, data_root: str | Path) -> Path | None:
    """An archive under one of the source's names, with any of an archive's suffixes or none.

    Of several the first name's, which is the smaller archive; then an exact name comes first.
    """
    stems = [archive_stem(name) for name in source.archives]
    named = [
        folder / name
        for folder, names in _folders(Path(data_root), ARCHIVE_NESTING)
        for name in names
        if archive_stem(name) in stems
    ]
    files = [path for path in named if path.is_file()]

    def rank(path: Path) -> tuple:
        return (
            stems.index(archive_stem(path.name)),
            path.name not in source.archives,
            len(path.parts),
            path,
        )

    return min(files, key=rank, default=None)


def archive_stem(name: str) -> str:
    """The name of an archive without any of an archive's suffixes."""
    return ARCHIVE_SUFFIX.sub("", name, count=1)


def _folders(root: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """`root` and the folders below it, level by level, each with the names in it; no file is looked at."""
    level = [root]
    for _ in range(depth + 1):
        below: list[Path] = []
        for folder in level[:MAX_FOLDERS]:
            try:
                with os.scandir(folder) as entries:
                    listed = list(itertools.islice(entries, MAX_ENTRIES))
            except OSError:  # not there, not a folder, or not for us to read
                continue
            yield folder, [entry.name for entry in listed]
            below += [folder / entry.name for entry in listed if _worth_a_look(entry)]
        level = below


def _worth_a_look(entry: os.DirEntry) -> bool:
    if entry.name in BULK or entry.name.startswith("."):
        return False
    # entry.is_dir() alone raises for a link to itself
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def signature(paths: Iterable[Path]) -> list[list[str | int]]:
    """[name, bytes, modification time in ns] of each file: whether the sources changed, without reading them.

    Raises:
        DataError: a file is not there.
    """
    try:
        stats = [(path.name, path.stat()) for path in paths]
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}; its folder is incomplete, fetch it again"
        ) from error
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
