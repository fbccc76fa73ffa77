"""How does a file reach the disk whole, and what does a user hear when it cannot?"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lra.errors import LraError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path, key: str = "output", kind: type[LraError] = LraError) -> Iterator[None]:
    """An OSError inside the block becomes a `kind` of one line: the place, its room left, the `key` that moves it."""
    try:
        yield
    except OSError as error:
        room = (
            f" ({_free_space(path)} free); make room there or"
            if error.errno in FULL
            else "; mend that or"
        )
        raise kind(
            f"{error.filename or path}: {error.strerror or error}{room} set another {key}, what was written before is intact"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that every reader, and the disk after a crash, has the old content or the new, whole.

    Raises:
        LraError: the disk is full or refuses; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_all(descriptor: int, content: bytes) -> None:
    """`os.write`, which may stop halfway, until nothing is left."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, on systems and file systems that know how."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _free_space(path: Path) -> str:
    existing = next((p for p in (path, *path.parents) if p.is_dir()), Path("."))
    try:
        return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB"
    except OSError:
        return "unknown space"
