"""A file is downloaded whole or not at all, and an interrupted download is resumed."""

import dataclasses
import errno
import hashlib
import http.server
import os
import socket
import threading
import time

import pytest
from deadline import deadline
from publisher_files import PAIRS, PATHS, TEXTS, TWICE, files_in, make_archive

from lra.errors import DataError
from lra.sources import download
from lra.sources.download import fetch_file, obtain
from lra.sources.locate import LRA_RELEASE, Remote, Source

CONTENT = bytes(range(256)) * 40


@pytest.mark.parametrize("name", ["file.gz", "file.gz.part"])
def test_pipe_in_place_of_the_download(tmp_path, name):
    os.mkfifo(tmp_path / name)
    remote = Remote("http://127.0.0.1:9/file.gz", "file.gz", None, None)
    with deadline(5), pytest.raises(DataError, match=f"{name}: .*a pipe"):
        fetch_file(remote, tmp_path)


class Server:
    """Serves CONTENT on a local port in the way of `mode`; `ranges` records the requests."""

    def __init__(self):
        self.mode, self.ranges, self.content = "range", [], CONTENT
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.ranges.append(self.headers.get("Range"))
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/file.gz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        asked = request.headers.get("Range")
        first = int(asked[len("bytes=") : -1]) if asked and self.mode != "no range" else 0
        total = len(self.content)
        if self.mode == "not found":
            return request.send_error(404)
        if first >= total:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{total}")
            return request.end_headers()
        request.send_response(206 if first else 200)
        if first:
            request.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if self.mode != "no length":
            request.send_header("Content-Length", str(total - first))
        request.end_headers()
        body = self.content[first:]
        request.wfile.write(body[: len(body) // 2] if self.mode == "drop" else body)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def remote(server, **changes):
    digest = hashlib.sha256(CONTENT).hexdigest()
    return Remote(server.url, "file.gz", len(CONTENT), digest)._replace(**changes)


@pytest.mark.parametrize("mode", ["range", "no range", "no length"])
@pytest.mark.parametrize("known", [{}, {"size": None, "sha256": None}])
def test_fetch_file(tmp_path, server, mode, known):
    server.mode = mode
    seen = []
    path = fetch_file(
        remote(server, **known), tmp_path / "new", lambda *progress: seen.append(progress)
    )
    assert path == tmp_path / "new/file.gz"
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == ["new", "new/file.gz"]
    assert seen[-1] == (
        "fetching file.gz",
        len(CONTENT),
        None if mode == "no length" else len(CONTENT),
    )
    fetch_file(remote(server, **known), tmp_path / "new")
    assert server.ranges == [None]  # a complete file is not fetched again


@pytest.mark.parametrize(
    ("mode", "part", "ranges"),
    [
        ("range", CONTENT[:1000], ["bytes=1000-"]),
        ("no range", CONTENT[:1000], ["bytes=1000-"]),
        ("range", CONTENT + b"more", [f"bytes={len(CONTENT) + 4}-", None]),
        ("range", b"", [None]),
    ],
)
@pytest.mark.parametrize("known", [{}, {"size": None, "sha256": None}])
def test_a_download_is_resumed(tmp_path, server, mode, part, ranges, known):
    server.mode = mode
    (tmp_path / "file.gz.part").write_bytes(part)
    assert fetch_file(remote(server, **known), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ranges
    assert files_in(tmp_path) == ["file.gz"]


def test_a_complete_part_is_only_checked(tmp_path, server):
    for known, ranges in (({}, []), ({"size": None}, [f"bytes={len(CONTENT)}-"])):
        server.ranges.clear()
        (tmp_path / "file.gz.part").write_bytes(CONTENT)
        assert fetch_file(remote(server, **known), tmp_path).read_bytes() == CONTENT
        assert server.ranges == ranges
        (tmp_path / "file.gz").unlink()


def test_a_file_of_another_size_is_replaced(tmp_path, server):
    (tmp_path / "file.gz").write_bytes(b"cut off")
    assert fetch_file(remote(server), tmp_path).read_bytes() == CONTENT


def test_dropped_connection_keeps_the_part(tmp_path, server, monkeypatch):
    server.mode = "drop"
    monkeypatch.setattr(download, "CHUNK", 1024)
    with pytest.raises(
        DataError, match=r"after 5,120 of 10,240 bytes; they are kept in .*file.gz.part"
    ):
        fetch_file(remote(server), tmp_path)
    assert (tmp_path / "file.gz.part").read_bytes() == CONTENT[:5120]
    server.mode = "range"
    assert fetch_file(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5120-"]


def test_ctrl_c_keeps_the_part(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1024)

    def interrupt(what, done, total):
        if done >= 2048:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="kept in .*file.gz.part"):
        fetch_file(remote(server), tmp_path, interrupt)
    part = (tmp_path / "file.gz.part").read_bytes()
    assert len(part) >= 2048
    assert CONTENT.startswith(part)
    assert not (tmp_path / "file.gz").exists()


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT + b"x", b"<html>log in</html>"])
@pytest.mark.parametrize("mode", ["range", "no length"])
def test_another_file_is_not_kept(tmp_path, server, content, mode):
    server.content, server.mode = content, mode
    expected = remote(server)
    with pytest.raises(DataError) as caught:
        fetch_file(expected, tmp_path)
    if mode == "range" and len(content) != len(CONTENT):
        assert f"offers {len(content):,} bytes, expected 10,240" in str(caught.value)
    else:
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
        assert expected.sha256 in str(caught.value)
    assert files_in(tmp_path) == []


def check_unreachable(remote, folder, timeout):
    before = time.monotonic()
    with pytest.raises(DataError) as caught:
        fetch_file(remote, folder, timeout=timeout)
    assert time.monotonic() - before < 15
    for told in (remote.url, remote.filename, "8.2 GB", str(folder)):
        assert told in str(caught.value)
    assert files_in(folder) == []
    return str(caught.value)


def test_unreachable(tmp_path, server):
    listening = socket.create_server(("127.0.0.1", 0))  # connections are accepted, but not answered
    port = listening.getsockname()[1]
    check_unreachable(LRA_RELEASE._replace(url=f"http://127.0.0.1:{port}/x"), tmp_path, 0.5)
    listening.close()
    assert "refused" in check_unreachable(
        LRA_RELEASE._replace(url=f"http://127.0.0.1:{port}/x"), tmp_path, 5.0
    )
    check_unreachable(LRA_RELEASE._replace(url="http://no-such-name.invalid/x"), tmp_path, 5.0)
    server.mode = "not found"
    assert "404" in check_unreachable(LRA_RELEASE._replace(url=server.url), tmp_path, 5.0)


def test_a_look_up_that_hangs(tmp_path, server, monkeypatch):
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(30)
        raise socket.gaierror("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    check_unreachable(LRA_RELEASE, tmp_path, 0.3)
    release.set()


def test_a_part_survives_a_lost_network(tmp_path):
    (tmp_path / "file.gz.part").write_bytes(b"half")
    with pytest.raises(DataError, match="cannot fetch"):
        fetch_file(Remote("http://127.0.0.1:9/x", "file.gz", 8, None), tmp_path)
    assert (tmp_path / "file.gz.part").read_bytes() == b"half"


def test_disk_full_while_fetching(tmp_path, server, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device .* free.*data.root"):
        fetch_file(remote(server), tmp_path)


def test_two_callers_fetch_once(tmp_path, server):
    paths = []

    def call():
        paths.append(fetch_file(remote(server), tmp_path, lambda *progress: time.sleep(0.1)))

    started = [threading.Thread(target=call) for _ in range(2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(30)
    assert paths == [tmp_path / "file.gz"] * 2
    assert server.ranges == [None]
    assert files_in(tmp_path) == ["file.gz"]


# --- Obtaining ---


def test_obtain_fetches_and_unpacks_when_asked(tmp_path, server):
    server.content = make_archive(tmp_path / "made", TWICE).read_bytes()
    (tmp_path / "made").unlink()
    source = Source(
        "AAN pairs",
        "tsv_data",
        ("pairs.train.tsv",),
        ("file.gz",),
        Remote(server.url, "file.gz", None, None),
    )
    with pytest.raises(DataError, match="not found"):
        obtain(source, tmp_path)
    assert server.ranges == []
    seen = []
    folder = obtain(
        source, tmp_path, download=True, on_progress=lambda what, done, total: seen.append(what)
    )
    assert (folder / "pairs.train.tsv").read_text() == "inner"
    assert {"fetching file.gz", "unpacking file.gz"} == set(seen)
    assert obtain(source, tmp_path, download=True) == folder
    assert len(server.ranges) == 1


def test_an_archive_with_another_hash_is_refused(tmp_path):
    archive = make_archive(tmp_path / "tsv.tar.gz", TWICE)
    digest, size = hashlib.sha256(archive.read_bytes()).hexdigest(), archive.stat().st_size
    for known in (
        {"size": size, "sha256": "0" * 64},
        {"size": size + 1, "sha256": "0" * 64},
        {"sha256": "0" * 64},
    ):
        remote = Remote("http://127.0.0.1:9/x", "tsv.tar.gz", None, None)._replace(**known)
        with pytest.raises(DataError, match="remove it .*unpack it there yourself") as caught:
            obtain(
                dataclasses.replace(PAIRS, archives=("tsv.tar.gz",), remote=remote),
                tmp_path,
                download=True,
            )
        for told in (str(archive), digest, "0" * 64, f"{size:,} bytes", remote.url):
            assert told in str(caught.value)
        assert files_in(tmp_path) == ["tsv.tar.gz"]
    remote = Remote("http://127.0.0.1:9/x", "tsv.tar.gz", size, digest)
    folder = obtain(dataclasses.replace(PAIRS, archives=("tsv.tar.gz",), remote=remote), tmp_path)
    assert (folder / "pairs.train.tsv").read_text() == "inner"


@pytest.mark.parametrize("source", [TEXTS, PAIRS, PATHS])
def test_what_is_missing_is_said_in_one_line(tmp_path, source):
    with pytest.raises(DataError) as caught:
        obtain(source, tmp_path)
    told = (
        source.title,
        source.folder,
        *source.contains,
        *source.archives,
        str(tmp_path),
        source.remote.url,
    )
    for words in (*told, "data.download=true", "lra data prepare NAME --download"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("Long Range Arena release" in str(caught.value)) == (source is not TEXTS)


def test_missing_without_a_remote(tmp_path):
    source = Source("Mine", "mine", ("x",), ("mine.tar",))
    with pytest.raises(DataError, match="put one of the two") as caught:
        obtain(source, tmp_path, download=True)
    assert "data.download" not in str(caught.value)
