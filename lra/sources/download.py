"""How do a publisher's files get onto this disk?

They are there, or lie there in an archive, or are fetched when asked:

    folder = obtain(Source("IMDB reviews", "aclImdb", ("train/pos", "test/neg"), (IMDB.filename,), IMDB), data_root)

A download has its name only once it is whole and, where size and hash are known, the publisher's; what breaks off leaves
a part that the next attempt continues.
"""

import hashlib
import http.client
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lra.errors import DataError
from lra.files import disk_errors, sync_folder
from lra.sources.archives import extract
from lra.sources.locate import NESTING, Progress, Remote, Source, find_archive, locate

CHUNK = 2**20  # bytes read at once
CONTENT_RANGE = re.compile(
    r"bytes (?:(\d+)-\d+|\*)/(\d+)"
)  # of a part that is sent, or of a part that is not there


def obtain(
    source: Source,
    data_root: str | Path,
    *,
    download: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """The folder with the source's files: located, else unpacked from an archive that is there, else fetched.

    Raises:
        DataError: nothing was found and `download` is false, the archive that is there has another hash than the
            publisher's, or fetching or unpacking failed.
    """
    found = locate(source, data_root)
    if found is not None:
        return found
    archive = find_archive(source, data_root)
    if archive is not None and source.remote:
        _refuse_other(archive, source.remote)
    if archive is None and download and source.remote:
        archive = fetch_file(source.remote, data_root, on_progress)
    if archive is None:
        raise _missing(source, data_root)
    return extract(archive, source, data_root, on_progress)


def _refuse_other(archive: Path, remote: Remote) -> None:
    """Raises: DataError, if an archive that lies there has not the hash that its publisher's is known to have."""
    if remote.sha256 is None:
        return
    with disk_errors(archive, "data.root", DataError):
        found = _sha256(archive)
    if found != remote.sha256:
        size = (
            f"expected {remote.sha256} of {remote.size:,}"
            if remote.size
            else f"expected {remote.sha256}"
        )
        raise DataError(
            f"{archive}: SHA-256 {found} of {archive.stat().st_size:,} bytes, {size}; cut off or another file: remove it "
            f"and fetch {remote.url}, or, if you trust it, unpack it there yourself"
        )


def _missing(source: Source, data_root: str | Path) -> DataError:
    remedy = "bring one of the two there"
    if source.remote:
        remedy = (
            f"data.download=true (or `lra data prepare NAME --download`) fetches {source.remote} from "
            f"{source.remote.url}, or bring it there yourself"
        )
    return DataError(
        f"{source.title}: not found under {data_root}, neither a folder {source.folder} with "
        f"{', '.join(source.contains)} (down to {NESTING} folders deep) nor an archive {' or '.join(source.archives)}; "
        f"{remedy}"
    )


def fetch_file(
    remote: Remote, folder: str | Path, on_progress: Progress | None = None, timeout: float = 10.0
) -> Path:
    """Fetch a file into `folder`, going on from `<name>.part` of an earlier attempt; returns its path.

    A file of the right size that is already there is taken as it is. What has another size or hash is removed.

    Args:
        timeout: seconds until the server has to answer, and then between two pieces of the file.
    Raises:
        DataError: no answer, broken off, not the expected file, or the disk is full.
        KeyboardInterrupt: its message says what is kept.
    """
    from filelock import FileLock

    folder = Path(folder)
    target, part = folder / remote.filename, folder / f"{remote.filename}.part"
    with disk_errors(part, "data.root", DataError):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{remote.filename}.lock"):
            if target.is_file() and remote.size in (None, target.stat().st_size):
                return target
            _complete(part, remote, on_progress or (lambda what, done, total: None), timeout)
            _check(part, remote)
            part.replace(target)
            sync_folder(folder)
    return target


def _complete(part: Path, remote: Remote, on_progress: Progress, timeout: float) -> None:
    """Fetch what `part` lacks, all of it where the server cannot go on from there."""
    done = part.stat().st_size if part.exists() else 0
    if done and done == remote.size:
        return
    with _answer(remote, done, part.parent, timeout) as response:
        first, total = _extent(response)
        if done and first not in (0, done):  # it has no such part
            if total == done:
                return
            part.unlink()
            return _complete(part, remote, on_progress, timeout)
        if total is not None and remote.size not in (None, total):
            raise DataError(
                f"{remote.url}: the server offers {total:,} bytes, expected {remote.size:,}; is it a login page, or was "
                "the file replaced? Nothing was fetched"
            )
        _receive(response, part, first or 0, total, remote, on_progress)


class _BrokenOff(Exception):
    """The connection, as opposed to the disk, failed."""


def _receive(
    response: Any, part: Path, first: int, total: int | None, remote: Remote, on_progress: Progress
) -> None:
    done = first
    try:
        with open(part, "ab" if first else "wb") as file:
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                on_progress(f"fetching {remote.filename}", done, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and done < total:
            raise _BrokenOff("the connection was closed")
    except (_BrokenOff, KeyboardInterrupt) as error:
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError
        of = f" of {total:,}" if total else ""
        raise kind(
            f"{remote.url}: {str(error) or 'interrupted'} after {done:,}{of} bytes; they are kept in {part}, and the "
            "same command goes on from there"
        ) from error


def _read(response: Any) -> bytes:
    try:
        return response.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(str(error) or type(error).__name__) from error


def _answer(remote: Remote, first: int, folder: Path, timeout: float) -> Any:
    """The server's answer to a request for the bytes from `first` on, with its status and headers.

    Asked from a thread, since neither the look-up of a name nor the attempts at all of a host's addresses heed a
    timeout.

    Raises:
        DataError: there is none, or it is an error; a refused range (416) is an answer.
    """
    headers = {"User-Agent": "lra-jax"} | ({"Range": f"bytes={first}-"} if first else {})
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(
                urllib.request.urlopen(
                    urllib.request.Request(remote.url, headers=headers), timeout=timeout
                )
            )
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {timeout:g} s")
    if isinstance(answer, urllib.error.HTTPError):
        if answer.code == 416 and first:
            return answer
        answer.close()
    if isinstance(answer, Exception):
        reason = (
            answer
            if isinstance(answer, urllib.error.HTTPError)
            else getattr(answer, "reason", answer)
        )
        raise DataError(
            f"cannot fetch {remote.url}: {reason}; fetch {remote} from there on another machine and put it into {folder}"
        ) from answer
    return answer


def _extent(response: Any) -> tuple[int | None, int | None]:
    """The first byte that an answer brings, None where it refuses, and the size of the whole file where it says so."""
    if response.status in (206, 416):
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        first, total = found.groups() if found else (None, None)
        return None if first is None else int(first), None if total is None else int(total)
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _check(part: Path, remote: Remote) -> None:
    """Raises DataError, and removes the file, where size or hash are not the publisher's."""
    size = part.stat().st_size
    found = None if remote.sha256 is None else _sha256(part)
    if remote.size in (None, size) and found == remote.sha256:
        return
    part.unlink()
    raise DataError(
        f"{remote.url}: fetched {size:,} bytes with SHA-256 {found}, expected {remote.size or size:,} with "
        f"{remote.sha256}; removed. Try again, or fetch {remote} on another network and put it into {part.parent}"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
