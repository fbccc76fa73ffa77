"""A publisher's files are found in any layout."""

import dataclasses
import os

import pytest
from publisher_files import PAIRS, PATHS, TEXTS, make

from lra.errors import DataError
from lra.sources import locate as locate_module
from lra.sources.locate import CIFAR10, IMDB, find_archive, locate, locate_all, signature


@pytest.mark.parametrize(
    "prefix", ["", "aclImdb", "a/aclImdb", "a/b/c/d/aclImdb", "called otherwise"]
)
def test_locate_at_any_nesting(tmp_path, prefix):
    make(tmp_path / prefix, "train/pos/", "test/neg/")
    assert locate(TEXTS, tmp_path) == tmp_path / prefix
    assert locate(TEXTS, str(tmp_path)) == tmp_path / prefix


@pytest.mark.parametrize(
    "present", ["x/", "aclImdb/train/pos/", "aclImdb/test/neg/", ".hidden/train/pos/"]
)
def test_locate_nothing(tmp_path, present):
    make(tmp_path, present, ".hidden/test/neg/")
    assert locate(TEXTS, tmp_path) is None
    assert locate(TEXTS, tmp_path / "nowhere") is None


def test_locate_too_deep(tmp_path):
    make(tmp_path / "a/b/c/d/e/aclImdb", "train/pos/", "test/neg/")
    assert locate(TEXTS, tmp_path) is None
    assert locate(TEXTS, tmp_path / "a") == tmp_path / "a/b/c/d/e/aclImdb"


def test_inner_copy_of_the_release_is_preferred(tmp_path):
    copies = [
        f"{prefix}{PATHS.folder}"
        for prefix in ("lra_release/lra_release/", "lra_release/", "", "z/")
    ]
    for copy in copies:
        make(tmp_path / copy, "imgs/", "metadata/")
    assert locate_all(PATHS, tmp_path) == [tmp_path / copy for copy in copies]


@pytest.mark.parametrize("inside", ["", "pathfinder128", "pathfinder128/curv_contour_length_14"])
def test_data_root_inside_the_source(tmp_path, monkeypatch, inside):
    place = make(tmp_path / PATHS.folder, "imgs/", "metadata/")
    assert locate(PATHS, tmp_path / inside) == place
    monkeypatch.chdir(tmp_path / inside)
    assert locate(PATHS, ".").resolve() == place


def test_pathfinder_needs_its_path(tmp_path):
    for folder in (
        "pathfinder32/curv_contour_length_14",
        "pathfinder128/curv_baseline",
        "curv_contour_length_14",
    ):
        make(tmp_path / folder, "imgs/", "metadata/")
    assert locate(PATHS, tmp_path) is None


def test_the_publishers_name_is_preferred(tmp_path):
    for folder in ("Aardvark", "z/aclImdb"):
        make(tmp_path / folder, "train/pos/", "test/neg/")
    assert locate_all(TEXTS, tmp_path) == [tmp_path / "z/aclImdb", tmp_path / "Aardvark"]


def test_links_are_followed_but_not_counted_twice(tmp_path):
    elsewhere = make(tmp_path / "disk/aclImdb", "train/pos/", "test/neg/")
    root = make(tmp_path / "root", "x/")
    (root / "x" / "link").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "itself").symlink_to(root / "itself")
    (root / "up").symlink_to(root)
    assert locate_all(TEXTS, root) == [root / "again"]


def test_pictures_and_texts_are_not_listed(tmp_path, monkeypatch):
    make(
        tmp_path / "aclImdb",
        *(f"{split}/{kind}/x/" for split in ("train", "test") for kind in ("pos", "neg", "unsup")),
    )
    make(tmp_path / PATHS.folder, "imgs/0/", "metadata/0/")
    make(tmp_path, "packed/x/", "tfds/x/", ".cache/x/")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder.name) or scandir(folder))
    assert locate(TEXTS, tmp_path)
    assert locate(PATHS, tmp_path)
    assert find_archive(TEXTS, tmp_path) is None
    assert set(listed) == {tmp_path.name, "aclImdb", "train", "test", *PATHS.folder.split("/")}


def test_a_folder_full_of_files_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(locate_module, "MAX_ENTRIES", 5)
    make(tmp_path / "full", *(f"{i}/" for i in range(20)))
    assert len(list(locate_module._folders(tmp_path, 2))) == 2 + 5


def test_archive_names(tmp_path):
    endings = [".gz", ".tar.gz", ".tgz", ".tar", "", ".gz.1", " (1).gz", ".tar (2).gz", "(1).tgz"]
    wanted = [f"lra_release{ending}" for ending in endings]
    for name in wanted:
        folder = make(
            tmp_path / name.replace(" ", "_"),
            f"a/b/{name}",
            "lra_release.gz.part",
            "lra_release2.gz",
            "z/x",
        )
        assert find_archive(PAIRS, folder) == folder / "a/b" / name
    folder = make(tmp_path / "all", *wanted)
    assert find_archive(PAIRS, folder).name == "lra_release.gz"
    folder = make(tmp_path / "none", "lra_release/x", "a/b/c/lra_release.gz", "xlra_release.gz")
    assert find_archive(PAIRS, folder) is None


def test_a_tasks_own_archive_comes_before_the_whole_release(tmp_path):
    source = dataclasses.replace(PAIRS, archives=("tsv_data.tar.gz", "lra_release.gz"))
    folder = make(tmp_path, "lra_release.gz", "a/tsv_data (1).tgz", "a/b/tsv_data.tar.gz")
    assert find_archive(source, folder) == folder / "a/b/tsv_data.tar.gz"
    (folder / "a/b/tsv_data.tar.gz").unlink()
    assert find_archive(source, folder) == folder / "a/tsv_data (1).tgz"


def test_signature(tmp_path):
    paths = [make(tmp_path, "a") / "a", make(tmp_path, "bb") / "bb"]
    os.utime(paths[1], ns=(5, 7))
    found = signature(paths)
    assert found[1] == ["bb", 2, 7]
    assert found[0][:2] == ["a", 1]
    with pytest.raises(DataError, match="gone"):
        signature([*paths, tmp_path / "gone"])


def test_imdb_is_the_file_that_tfds_checks():
    import importlib.util
    from pathlib import Path

    tfds = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    _, size, sha256, name = (tfds / "datasets/imdb_reviews/checksums.tsv").read_text().split()
    assert (name, int(size), sha256) == (IMDB.filename, IMDB.size, IMDB.sha256)
    assert str(CIFAR10) == "cifar-10-python.tar.gz (170 MB)"
