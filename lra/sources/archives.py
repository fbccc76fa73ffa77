"""How are a publisher's files unpacked without trusting the archive?

Only the wanted folder is written, and nothing outside its place: links, devices and names that lead elsewhere are
refused. A damaged archive, a full disk or Ctrl-C leaves nothing behind.
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
from lra.sources.locate import Progress, Source, archive_stem, locate

CHUNK = 2**20  # bytes of the archive between two reports of progress


def extract(
    archive: Path, source: Source, data_root: str | Path, on_progress: Progress | None = None
) -> Path:
    """Unpack the source's folder, and nothing else, into `<data_root>/extracted/<archive stem>/`; returns it there.

    Several processes may call this at once: one unpacks, the others wait for it. Of a folder that the archive holds
    twice, the copy that `locate` prefers stays. A failure or Ctrl-C leaves nothing behind; what a killed process left
    is swept away by the next.

    Raises:
        DataError: the archive is damaged, has no such folder, or would write outside its own; or the disk is full.
    """
    from filelock import FileLock

    place = Path(data_root) / "extracted" / archive_stem(archive.name)
    with disk_errors(place, "data.root", DataError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{place.name}.lock"):
            found = locate(source, place)
            if found is not None:  # unpacked while we waited
                return found
            prefix = f".{place.name}.extracting-"
            for stale in place.parent.glob(
                f"{glob.escape(prefix)}*"
            ):  # of a killed process: the lock is ours
                shutil.rmtree(stale, ignore_errors=True)
            unpacking = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
            try:
                return _unpack_into(
                    place,
                    unpacking,
                    archive,
                    source,
                    on_progress or (lambda what, done, total: None),
                )
            finally:
                shutil.rmtree(unpacking, ignore_errors=True)


def _unpack_into(
    place: Path, unpacking: Path, archive: Path, source: Source, on_progress: Progress
) -> Path:
    tops = _unpack(archive, source, unpacking, on_progress)
    found = locate(source, unpacking)
    if found is None:
        raise DataError(
            f"{archive}: no folder {source.folder} with {', '.join(source.contains)} in it; it holds "
            f"{', '.join(tops) or 'nothing'}. Is this the archive of {source.title}?"
        )
    target = place / found.relative_to(unpacking)
    shutil.rmtree(target, ignore_errors=True)  # `locate` has refused it: files are missing there
    target.parent.mkdir(parents=True, exist_ok=True)
    found.rename(target)
    sync_folder(target.parent)
    return target


def _unpack(archive: Path, source: Source, folder: Path, on_progress: Progress) -> list[str]:
    """Write the members at or below `source.folder`, wherever the archive has it; returns the names at its top."""
    size = archive.stat().st_size
    tops: dict[str, None] = {}
    shown = -CHUNK
    try:
        with open(archive, "rb") as file, tarfile.open(fileobj=file, tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                # of millions of pictures tarfile would keep a kilobyte each
                tar.members.clear()  # type: ignore[attr-defined]
                parts = PurePosixPath(member.name).parts
                _refuse_escape(archive, member, parts)
                tops[parts[0] if parts else "."] = None
                if _is_below(parts, PurePosixPath(source.folder).parts):
                    if not (
                        member.isreg() or member.isdir()
                    ):  # links have fooled tarfile's filter: CVE-2025-4517
                        raise DataError(
                            f"{archive}: {member.name!r} is a link or a device, unpack it yourself"
                        )
                    tar.extract(member, folder, filter="data")
                if file.tell() >= shown + CHUNK:
                    shown = file.tell()
                    on_progress(f"unpacking {archive.name}", shown, size)
            while tar.fileobj and tar.fileobj.read(CHUNK):  # to the checksum behind the last member
                pass
    except tarfile.FilterError as error:
        raise DataError(
            f"{archive}: {error.tarinfo.name!r} would be written outside its folder: {error}"
        ) from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise _damaged(archive, source, error) from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the decompressor
            raise
        raise _damaged(archive, source, error) from error
    on_progress(f"unpacking {archive.name}", size, size)
    return list(tops)[:10]


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header in the middle, or a file cut off between members, for the end of the archive."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the true end
                raise
            raise tarfile.ReadError(str(error)) from error


def _refuse_escape(archive: Path, member: tarfile.TarInfo, parts: tuple[str, ...]) -> None:
    if ".." in parts or PurePosixPath(member.name).is_absolute():
        raise DataError(
            f"{archive}: {member.name!r} would be written outside its folder; nothing was unpacked"
        )


def _is_below(parts: tuple[str, ...], folder: tuple[str, ...]) -> bool:
    return any(parts[i : i + len(folder)] == folder for i in range(len(parts)))


def _damaged(archive: Path, source: Source, error: Exception) -> DataError:
    size = f"{archive.stat().st_size:,} bytes"
    remedy = "fetch it again"
    if source.remote:
        size += f", expected {source.remote.size:,}" if source.remote.size else ""
        remedy = f"delete it and fetch {source.remote.url} again: {source.remote}"
    reason = (
        str(error).partition("\n")[0].rstrip(":")
    )  # tarfile tells of each compression it tried, on a line each
    return DataError(f"{archive}: damaged, cut off or no tar archive ({size}): {reason}; {remedy}")
