"""Atomic file writes, and one-line errors for disks that refuse them."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lra.errors import LraError


@contextmanager
def disk_errors(path: Path, key: str = "output", kind: type[LraError] = LraError) -> Iterator[None]:
    """Turns an OSError into one line of `kind`: file, free space and the `key` that moves it."""
    try:
        yield
    except OSError as error:
        advice = "; correct the path"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            folder = next((p for p in (path, *path.parents) if p.is_dir()), Path())
            free = shutil.disk_usage(folder).free / 2**20
            advice = f" ({free:,.0f} MiB free); make room there"
        raise kind(
            f"{error.filename or path}: {error.strerror or error}{advice} or set another {key}, "
            "earlier files are intact"
        ) from error


def read_regular_file(path: Path, limit: int | None = None) -> bytes:
    """The content of a file; OSError for a pipe or device, on which a read could wait forever.

    Args:
        limit: largest size in bytes; OSError for a larger file.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if limit is not None and status.st_size > limit:
            raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes", str(path))
        return file.read()


def _open_without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file atomically; after a crash or LraError it has its old content."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors(path):
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a rename in `folder` to disk, if the system and the file system support it."""
    if os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
