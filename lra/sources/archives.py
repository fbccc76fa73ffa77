"""Unpacks one folder of a publisher's tar archive without trusting the archive.

tarfile's `data` filter keeps every file inside its folder and resets its mode. Links and devices
are refused in addition. A damaged archive, a full disk or Ctrl-C leaves nothing behind.
"""

import glob
import lzma
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

from lra.errors import DataError
from lra.files import disk_errors, sync_folder
from lra.sources.locate import (
    Progress,
    Source,
    archive_stem,
    ignore_progress,
    locate,
    open_source,
)

CHUNK = 2**20  # bytes of the archive between two progress reports
MAX_DEPTH = 64  # folders of a member; tarfile makes them one inside the other, by recursion


def extract(
    archive: Path, source: Source, data_root: str | Path, on_progress: Progress = ignore_progress
) -> Path:
    """Unpack the source's folder into `<data_root>/extracted/<archive stem>/`; returns its path.

    If the archive holds the folder twice, the copy that `locate` prefers is kept. Concurrent calls
    are safe: one process unpacks, the others wait.

    Raises DataError if the archive is damaged, has no such folder, or holds a link or a path
    outside its folder, or if the disk is full.
    """
    from filelock import FileLock

    place = Path(data_root) / "extracted" / archive_stem(archive.name)
    prefix = f".{place.name}.extracting-"
    with disk_errors(place, "data.root", DataError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{place.name}.lock"):
            found = locate(source, place)
            if found is not None:  # another process unpacked it during the wait
                return found
            for stale in place.parent.glob(f"{glob.escape(prefix)}*"):  # of a killed process
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=prefix, dir=place.parent) as name:
                unpacking = Path(name)
                top_names = _unpack(archive, source, unpacking, on_progress)
                found = locate(source, unpacking)
                if found is None:
                    raise DataError(
                        f"{archive}: no folder {source.folder} with {', '.join(source.contains)} "
                        f"in it; it holds {', '.join(top_names) or 'nothing'}. Is this the archive "
                        f"of {source.title}?"
                    )
                target = place / found.relative_to(unpacking)
                shutil.rmtree(target, ignore_errors=True)  # incomplete: `locate` rejected it
                target.parent.mkdir(parents=True, exist_ok=True)
                found.rename(target)
                sync_folder(target.parent)
    return target


def _unpack(archive: Path, source: Source, folder: Path, on_progress: Progress) -> list[str]:
    """Write the members at or below `source.folder`; returns the archive's top-level names."""
    size, wanted = archive.stat().st_size, PurePosixPath(source.folder).parts
    top_names: dict[str, None] = {}
    shown = -CHUNK
    try:
        with (
            open_source(archive) as file,
            tarfile.open(fileobj=file, tarinfo=_StrictInfo) as tar,
        ):
            while (member := tar.next()) is not None:
                # tarfile would keep a kilobyte for each of millions of pictures
                tar.members.clear()  # type: ignore[attr-defined]
                parts = PurePosixPath(member.name).parts
                top_names[parts[0] if parts else "."] = None
                if any(parts[i : i + len(wanted)] == wanted for i in range(len(parts))):
                    if len(parts) > MAX_DEPTH:
                        raise DataError(
                            f"{archive}: {member.name[:80]!r}... is {len(parts):,} folders deep, "
                            f"more than the limit of {MAX_DEPTH}; this is not {source.title}"
                        )
                    if not (member.isreg() or member.isdir()):
                        # links have escaped tarfile's filter: CVE-2025-4517
                        raise DataError(
                            f"{archive}: {member.name!r} is a link or a device, unpack it yourself"
                        )
                    tar.extract(member, folder, filter="data")
                if file.tell() >= shown + CHUNK:
                    shown = file.tell()
                    on_progress(f"unpacking {archive.name}", shown, size)
            while tar.fileobj and tar.fileobj.read(CHUNK):  # verify the checksum at the end
                pass
    except tarfile.FilterError as error:
        raise DataError(
            f"{archive}: {error.tarinfo.name!r} would be written outside its folder: {error}"
        ) from error
    except (
        *(tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OSError),
        *(OverflowError, RecursionError),  # of headers
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        found, remedy = f"{size:,} bytes", "fetch it again"
        if source.remote:
            found += f", expected {source.remote.size:,}" if source.remote.size else ""
            remedy = f"delete it and fetch {source.remote.url} again: {source.remote}"
        # tarfile lists each compression that it tried, one per line
        reason = str(error).partition("\n")[0].rstrip(":")
        raise DataError(
            f"{archive}: damaged, truncated or no tar archive ({found}): {reason}; {remedy}"
        ) from error
    on_progress(f"unpacking {archive.name}", size, size)
    return list(top_names)[:10]


class _StrictInfo(tarfile.TarInfo):
    """Raises on a damaged header in the middle, where tarfile assumes the end of the archive."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the regular end
                raise
            raise tarfile.ReadError(str(error)) from error
