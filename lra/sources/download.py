"""Finds, unpacks or downloads a publisher's files.

`pooch` verifies the hash of a download and gives it its final name. The downloader in this module
adds what pooch lacks: an interrupted download stays as `<name>.part` and is resumed, and a server
that does not answer ends the command within seconds.
"""

import os
import queue
import threading
from pathlib import Path
from typing import Any

from lra.errors import DataError
from lra.files import disk_errors
from lra.sources.archives import extract
from lra.sources.locate import (
    NESTING,
    Progress,
    Remote,
    Source,
    file_hash,
    find_archive,
    ignore_progress,
    locate,
)

CHUNK = 2**18  # bytes per read and per progress report


def obtain(
    source: Source,
    data_root: str | Path,
    *,
    download: bool = False,
    on_progress: Progress = ignore_progress,
) -> Path:
    """The folder with the source's files: found on disk, unpacked from an archive, or downloaded.

    Raises DataError if nothing is found and `download` is false, the archive on disk does not have
    the published hash, or the download or the unpacking fails.
    """
    if (found := locate(source, data_root)) is not None:
        return found
    try:
        archive = find_archive(source, data_root)
        if archive is not None:
            _check_hash(archive, source.remote)
        elif download and source.remote:
            archive = fetch_file(source.remote, data_root, on_progress)
        else:
            remedy = "put one of the two there"
            if source.remote:
                remedy = (
                    "data.download=true (or `lra data prepare NAME --download`) fetches "
                    f"{source.remote} from {source.remote.url}, or put it there yourself"
                )
            raise DataError(
                f"{source.title}: not found under {data_root}, neither a folder {source.folder} "
                f"with {', '.join(source.contains)} (at most {NESTING} folders deep) nor an "
                f"archive {' or '.join(source.archives)}; {remedy}"
            )
        return extract(archive, source, data_root, on_progress)
    except DataError as error:
        if not source.alternative:
            raise
        raise DataError(f"{error}; or {source.alternative}") from error


def _check_hash(archive: Path, remote: Remote | None) -> None:
    if remote is None or remote.sha256 is None:
        return
    with disk_errors(archive, "data.root", DataError):
        found = file_hash(archive)
    if found != remote.sha256:
        size = f" of {remote.size:,}" if remote.size else ""
        raise DataError(
            f"{archive}: SHA-256 {found} of {archive.stat().st_size:,} bytes, expected "
            f"{remote.sha256}{size}; it is truncated or another file: remove it and fetch "
            f"{remote.url}, or, if you trust it, unpack it there yourself"
        )


def fetch_file(
    remote: Remote,
    folder: str | Path,
    on_progress: Progress = ignore_progress,
    timeout: float = 10.0,
) -> Path:
    """Download a file into `folder` and return its path; resumes `<name>.part` if it exists.

    An existing file with the published hash (with any content if none is published) is kept.

    Args:
        timeout: seconds until the server has to answer, and between two chunks of the file.
    Raises:
        DataError: no answer, a dropped connection, another file than expected, or a full disk.
        KeyboardInterrupt: the message names the file that is kept.
    """
    import pooch
    from filelock import FileLock

    folder = Path(folder)
    target, part = folder / remote.filename, folder / f"{remote.filename}.part"
    pooch.get_logger().setLevel("WARNING")

    def download(url: str, output_file: str, _: Any) -> None:  # pooch checks what this leaves
        _complete(part, remote, on_progress, timeout)
        part.replace(output_file)

    with disk_errors(part, "data.root", DataError):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{remote.filename}.lock"):
            for file in (target, part):
                if file.exists() and not file.is_file():
                    raise DataError(f"{file}: a folder, a pipe or a device; remove it")
            try:
                pooch.retrieve(
                    remote.url, remote.sha256, remote.filename, folder, downloader=download
                )
            except ValueError as error:  # pooch has removed the file
                raise DataError(
                    f"{remote.url}: {error} Try again, or fetch {remote} on another network and "
                    f"put it into {folder}"
                ) from error
    return target


def _complete(part: Path, remote: Remote, on_progress: Progress, timeout: float) -> None:
    """Download the missing end of `part`, or all of it if the server cannot resume."""
    import requests

    done = part.stat().st_size if part.exists() else 0
    if done and done == remote.size:
        return
    with _request(remote, done, part.parent, timeout) as response:
        if response.status_code == 416:  # the server has no bytes after `done`
            if response.headers.get("Content-Range") != f"bytes */{done}":
                part.unlink()
                _complete(part, remote, on_progress, timeout)
            return
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if response.status_code == 206 and done and not resumes:  # another range than requested
            part.unlink()
            return _complete(part, remote, on_progress, timeout)
        if response.status_code != 206:
            done = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        if total is not None and remote.size not in (None, total):
            raise DataError(
                f"{remote.url}: the server offers {total:,} bytes, expected {remote.size:,}; is "
                "it a login page, or was the file replaced? Nothing was fetched"
            )
        try:
            with open(part, "ab" if done else "wb") as file:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    on_progress(f"fetching {remote.filename}", done, total)
                file.flush()
                os.fsync(file.fileno())
            if total is not None and done < total:
                raise requests.ConnectionError("the connection was closed")
        except (requests.RequestException, KeyboardInterrupt) as error:
            kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError
            of = f" of {total:,}" if total else ""
            raise kind(
                f"{remote.url}: {str(error) or 'interrupted'} after {done:,}{of} bytes; they are "
                f"kept in {part}, and the same command resumes there"
            ) from error


def _request(remote: Remote, first: int, folder: Path, timeout: float) -> Any:
    """The server's response to a request for the bytes from `first` on; 416 is a response.

    A thread sends the request, because a timeout of `requests` covers neither the look-up of the
    name nor the sum over all addresses of a host.
    """
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={first}-"} if first else {})
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def send() -> None:
        try:
            answer = requests.get(remote.url, headers=headers, stream=True, timeout=timeout)
            if not answer.ok and not (first and answer.status_code == 416):
                answer.close()
                answer.raise_for_status()
            answers.put(answer)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=send, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {timeout:g} s")
    if isinstance(answer, Exception):
        reason = getattr(answer.args[0] if answer.args else None, "reason", answer)
        raise DataError(
            f"cannot fetch {remote.url}: {reason}; fetch {remote} from there on another machine "
            f"and put it into {folder}"
        ) from answer
    return answer
