"""Publishers' files as the tests make them: three sources, folders of files, and archives."""

import io
import tarfile

from lra.sources.locate import IMDB, LRA_RELEASE, Source

TEXTS = Source("IMDB reviews", "aclImdb", ("train/pos", "test/neg"), (IMDB.filename,), IMDB)
PAIRS = Source("AAN pairs", "tsv_data", ("pairs.train.tsv",), ("lra_release.gz",), LRA_RELEASE)
PATHS = Source(
    "Path-X",
    "pathfinder128/curv_contour_length_14",
    ("imgs", "metadata"),
    ("lra_release.gz",),
    LRA_RELEASE,
)

TWICE = {
    "lra_release/tsv_data/pairs.train.tsv": b"outer",
    "lra_release/lra_release/tsv_data/pairs.train.tsv": b"inner",
    "lra_release/lra_release/tsv_data/deep/x": b"x",
    "lra_release/lra_release/listops-1000/basic_train.tsv": b"other",
}


def make(folder, *names):
    """Files below `folder`; a name that ends in / is a folder."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(name)
    return folder


def make_archive(path, members, mode="w:gz"):
    """A tar of `members`: name -> content, or a TarInfo of a link or device."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def files_in(folder):
    """All files and folders below `folder` but the empty lock files."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock"
    )
