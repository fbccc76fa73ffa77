"""An archive is unpacked whole or not at all, and a malicious one escapes nowhere."""

import errno
import os
import tarfile
import threading
import time

import numpy as np
import pytest
from deadline import deadline
from publisher_files import PAIRS, TWICE, files_in, make, make_archive

from lra.errors import DataError
from lra.sources.archives import extract
from lra.sources.download import obtain
from lra.sources.locate import IMDB, Source, locate


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return {name: info}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_extract_only_what_is_needed(tmp_path, monkeypatch, mode):
    archive = make_archive(tmp_path / "lra_release (1).gz", TWICE, mode)
    written, makefile = [], tarfile.TarFile.makefile
    monkeypatch.setattr(
        tarfile.TarFile, "makefile", lambda *args: written.append(args[1].name) or makefile(*args)
    )
    seen = []
    folder = extract(archive, PAIRS, tmp_path, lambda *progress: seen.append(progress))
    assert folder == tmp_path / "extracted/lra_release/lra_release/lra_release/tsv_data"
    assert (folder / "pairs.train.tsv").read_text() == "inner"
    assert files_in(folder) == ["deep", "deep/x", "pairs.train.tsv"]
    assert written == [name for name in TWICE if "tsv_data" in name]
    parents = [folder.parents[i] for i in range(3)]
    assert [len(list(parent.iterdir())) for parent in parents] == [1, 1, 1]
    assert seen[-1] == (
        "unpacking lra_release (1).gz",
        archive.stat().st_size,
        archive.stat().st_size,
    )
    assert locate(PAIRS, tmp_path) == folder
    assert folder.stat().st_mode & 0o777 == (tmp_path / "extracted").stat().st_mode & 0o777


def test_two_tasks_from_one_archive(tmp_path):
    archive = make_archive(tmp_path / "lra_release.gz", TWICE)
    listops = Source("ListOps", "listops-1000", ("basic_train.tsv",), ("lra_release.gz",))
    assert obtain(PAIRS, tmp_path).name == "tsv_data"
    folder = extract(archive, listops, tmp_path)
    assert (folder / "basic_train.tsv").read_text() == "other"
    assert locate(PAIRS, tmp_path).parent == folder.parent
    archive.unlink()
    assert obtain(listops, tmp_path) == folder


def test_an_incomplete_folder_is_unpacked_anew(tmp_path):
    archive = make_archive(tmp_path / "lra_release.gz", TWICE)
    folder = extract(archive, PAIRS, tmp_path)
    (folder / "pairs.train.tsv").unlink()
    assert obtain(PAIRS, tmp_path) == folder
    assert (folder / "pairs.train.tsv").read_text() == "inner"


@pytest.mark.parametrize(
    ("member", "named"),
    [
        ({"tsv_data/../../../escaped": b"x"}, "escaped.*outside its folder"),
        (special("tsv_data/link", tarfile.SYMTYPE, "/etc"), "link"),
        (special("tsv_data/link", tarfile.SYMTYPE, "../../.."), "link"),
        (special("tsv_data/link", tarfile.LNKTYPE, "/etc/passwd"), "link"),
        (special("tsv_data/link", tarfile.SYMTYPE, "pairs.train.tsv"), "link"),
        (special("tsv_data/pipe", tarfile.FIFOTYPE), "pipe"),
        (special("tsv_data/null", tarfile.CHRTYPE), "null"),
    ],
)
def test_nothing_is_written_outside(tmp_path, member, named):
    root = make(tmp_path / "root/", "x/")
    archive = make_archive(root / "lra_release.gz", {"tsv_data/pairs.train.tsv": b"x", **member})
    with pytest.raises(DataError, match=named):
        extract(archive, PAIRS, root)
    assert files_in(tmp_path) == ["root", "root/extracted", "root/lra_release.gz", "root/x"]


@pytest.mark.parametrize("name", ["other/../../escaped", "/tsv_data/escaped"])
def test_other_paths_outside_are_skipped_or_moved_inside(tmp_path, name):
    root = make(tmp_path / "root/", "x/")
    members = {"tsv_data/pairs.train.tsv": b"x", name: b"x"}
    folder = extract(make_archive(root / "lra_release.gz", members), PAIRS, root)
    assert folder == root / "extracted/lra_release/tsv_data"
    assert [path.parent for path in tmp_path.rglob("escaped")] in ([], [folder])


def test_modes_of_members_are_reset(tmp_path):
    info = tarfile.TarInfo("tsv_data/run")
    info.mode = 0o6777
    archive = make_archive(
        tmp_path / "lra_release.gz", {"tsv_data/pairs.train.tsv": b"x", "tsv_data/run": info}
    )
    assert (extract(archive, PAIRS, tmp_path) / "run").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize(
    "damage", ["half", "between members", "last bytes", "middle", "empty", "login page"]
)
def test_damaged_archive(tmp_path, mode, damage):
    # compressible, so that the middle is not a plain copy
    noise = np.random.default_rng(0).bytes(50_000).hex().encode()
    members = {"tsv_data/pairs.train.tsv": b"x", "tsv_data/noise": noise, "tsv_data/more": noise}
    archive = make_archive(tmp_path / IMDB.filename, members, mode)
    content = archive.read_bytes()
    middle = len(content) // 2
    if mode == "w" and damage in ("middle", "last bytes"):
        middle = content.rindex(b"tsv_data/more")  # a plain tar has checksums of headers only
    archive.write_bytes(
        {
            "half": content[:middle],
            "between members": content[:1024],
            "last bytes": content[:-5] if mode != "w" else content[: middle + 100],
            "middle": content[:middle] + b"\xff" * 50 + content[middle + 50 :],
            "empty": b"",
            "login page": b"<html>please log in</html>",
        }[damage]
    )
    source = Source("AAN pairs", "tsv_data", ("pairs.train.tsv",), (IMDB.filename,), IMDB)
    with pytest.raises(DataError, match="damaged, truncated or no tar") as caught:
        extract(archive, source, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for told in (
        str(archive),
        f"{archive.stat().st_size:,} bytes",
        "expected 84,125,825",
        IMDB.url,
    ):
        assert told in message
    assert files_in(tmp_path) == [archive.name, "extracted"]


def test_damaged_checksum_behind_the_last_member(tmp_path):
    archive = make_archive(tmp_path / "lra_release.gz", TWICE)
    content = bytearray(archive.read_bytes())
    content[-6] ^= 255  # of the CRC-32 at the end of a gzip file
    archive.write_bytes(content)
    with pytest.raises(DataError, match="damaged.*CRC check failed"):
        extract(archive, PAIRS, tmp_path)


def test_a_name_that_is_none(tmp_path):
    info = tarfile.TarInfo("x")
    info.pax_headers = {"path": "tsv_data/a\0b"}
    archive = make_archive(
        tmp_path / "lra_release.gz", {"tsv_data/pairs.train.tsv": b"x", "x": info}
    )
    with pytest.raises(DataError, match="null"):
        extract(archive, PAIRS, tmp_path)


def test_member_deeper_than_the_limit(tmp_path):
    deep = "tsv_data/" + "d/" * 2000 + "x"
    archive = make_archive(tmp_path / "lra_release.gz", {deep: b"x"})
    with pytest.raises(DataError, match="2,002 folders deep, more than the limit of 64") as caught:
        extract(archive, PAIRS, tmp_path)
    assert len(str(caught.value)) < 500
    assert files_in(tmp_path) == ["extracted", "lra_release.gz"]


def test_headers_that_nest_without_an_end(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4
    block = info.tobuf(tarfile.GNU_FORMAT) + b"name" + bytes(508)
    archive = tmp_path / "lra_release.gz"
    archive.write_bytes(block * 3000 + bytes(1024))
    with pytest.raises(DataError, match="damaged, truncated or no tar archive"):
        extract(archive, PAIRS, tmp_path)


def test_pipe_in_place_of_the_archive(tmp_path):
    os.mkfifo(tmp_path / "lra_release.gz")
    with deadline(5), pytest.raises(DataError, match="is not a regular file"):
        extract(tmp_path / "lra_release.gz", PAIRS, tmp_path)


def test_archive_of_something_else(tmp_path):
    archive = make_archive(
        tmp_path / "lra_release.gz", {"cats/1.png": b"", "dogs/1.png": b"", "tsv_data/x": b""}
    )
    with pytest.raises(
        DataError,
        match="no folder tsv_data with pairs.train.tsv in it; it holds cats, dogs, tsv_data",
    ):
        extract(archive, PAIRS, tmp_path)
    assert files_in(tmp_path) == ["extracted", "lra_release.gz"]


def test_ctrl_c_while_unpacking_leaves_nothing(tmp_path):
    archive = make_archive(tmp_path / "lra_release.gz", TWICE)

    def interrupt(*progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(archive, PAIRS, tmp_path, interrupt)
    assert files_in(tmp_path) == ["extracted", "lra_release.gz"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    archive = make_archive(tmp_path / "lra_release.gz", TWICE)
    make(tmp_path / "extracted", ".lra_release.extracting-abc/tsv_data/pairs.train.tsv")
    extract(archive, PAIRS, tmp_path)
    assert not list((tmp_path / "extracted").glob(".*extracting*"))


def test_disk_full_while_unpacking(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "lra_release.gz", TWICE)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(tarfile.TarFile, "makefile", full)
    with pytest.raises(DataError, match="No space left on device .* free.*data.root"):
        extract(archive, PAIRS, tmp_path)
    assert files_in(tmp_path) == ["extracted", "lra_release.gz"]


def test_two_callers_unpack_once(tmp_path):
    make_archive(tmp_path / "lra_release.gz", TWICE)
    folders, unpacking = [], set()

    def slowly(*progress):
        unpacking.add(threading.current_thread())
        time.sleep(0.1)

    def call():
        folders.append(obtain(PAIRS, tmp_path, on_progress=slowly))

    started = [threading.Thread(target=call) for _ in range(2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(30)
    assert folders == [locate(PAIRS, tmp_path)] * 2
    assert len(unpacking) == 1
