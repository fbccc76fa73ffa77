"""Writes a run folder under its lock, and loads the records of many runs."""

import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from lra.errors import RunFolderError
from lra.files import disk_errors, read_regular_file, regular_file, write_atomically
from lra.runs.records import (
    LOCK,
    METRICS,
    PREDICTIONS,
    RECORD,
    SCHEMA,
    Record,
    parse_json,
    read_metrics,
    read_record,
    to_json,
)

log = logging.getLogger(__name__)

LOCK_S = 0.5  # limit for taking a lock, which `is_locked` of another process holds for microseconds


class RunFolder(AbstractContextManager):
    """A run folder, locked for this process until `close` or the end of a `with` block.

    Raises RunFolderError if another process has locked it, LraError if it cannot be written. The
    methods that write raise RunFolderError and write nothing if the lock or the folder was removed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
            # the open lock file keeps its inode number from being used again
            self._locked_file = os.stat(self.path / LOCK)
            for leftover in self.path.glob(".*.tmp"):  # of a writer killed before its rename
                leftover.unlink()
            metrics = self.path / METRICS
            if metrics.exists() and not (content := read_regular_file(metrics)).endswith(b"\n"):
                os.truncate(metrics, content.rfind(b"\n") + 1)  # after a crash during an append

    def close(self) -> None:
        self._lock.release()

    def __exit__(self, *_: object) -> None:
        self.close()

    def remove_if_empty(self) -> None:
        """Removes the folder, and the parents that it made, if nothing but the lock is in them."""
        with suppress(OSError):  # rmdir of a folder that is not empty
            self.check_lock()
            if os.listdir(self.path) == [LOCK]:
                os.unlink(self.path / LOCK)
                for folder in self._made:
                    folder.rmdir()

    def check_lock(self) -> None:
        """Raises RunFolderError if run.lock was removed: another run may then write here."""
        path = self.path / LOCK
        with disk_errors(path), suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), self._locked_file):
                return
        removed = path if self.path.is_dir() else self.path
        raise RunFolderError(
            f"{removed} was removed during the run, so another run may use the folder; this run "
            "ends and writes nothing more"
        )

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces record.json by `record` plus `schema`; an error leaves the old file intact.

        Raises ValueError or TypeError if `record` is not a `lra.runs.records.Record`.
        """
        text = json.dumps(to_json({"schema": SCHEMA, **record}), indent=1, allow_nan=False)
        parse_json(Record, text.encode())
        self.check_lock()
        write_atomically(self.path / RECORD, text.encode() + b"\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends `row`, with its `step`, to metrics.jsonl; a failed write leaves no part of it."""
        row = to_json({**row, "step": int(row["step"])})
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        path = self.path / METRICS
        self.check_lock()
        with disk_errors(path), open(path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                while line:  # one write may write only a part
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(start)
                raise

    def truncate_metrics(self, step: int) -> int:
        """Atomically removes the lines after `step`, which a run resumed at `step` writes again.

        Returns the number of lines that are left.
        """
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        if (self.path / METRICS).exists():
            self.check_lock()
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self.path / METRICS, text.encode())
        return len(rows)

    def write_predictions(self, logits: Any, labels: Any, rows: Any) -> None:
        """Replaces predictions.npz.

        Args:
            logits: (n, C), or (n, T, C) for T labels per example.
            labels: (n,) or (n, T).
            rows: (n,), the row of the split of each example.
        """
        buffer = io.BytesIO()
        np.savez(buffer, logits=np.asarray(logits, np.float32), labels=labels, rows=rows)
        self.check_lock()
        write_atomically(self.path / PREDICTIONS, buffer.getvalue())

    def read_record(self) -> dict[str, Any] | None:
        return read_record(self.path)


def is_locked(folder: str | Path) -> bool:
    """Whether a process has locked the run. Without `flock`, True if the lock file exists."""
    try:
        descriptor = regular_file(str(Path(folder) / LOCK), os.O_RDONLY)
    except OSError:
        return False
    try:
        import fcntl  # missing on Windows

        # a shared lock, because other processes may check at the same time
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, ImportError):
        return True
    finally:
        os.close(descriptor)
    return False


def _locked(folder: Path) -> filelock.FileLock:
    path = folder / LOCK
    holder = _holder(path)  # first, because old versions of filelock truncate the file
    lock = filelock.FileLock(path, thread_local=False)  # another thread may release it
    try:
        lock.acquire(timeout=LOCK_S, poll_interval=0.05)
    except filelock.Timeout:
        holder = _holder(path) or holder or "another process"
        raise RunFolderError(
            f"{folder} is in use by {holder}; wait for it, stop it, or set another output.root"
        ) from None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    return lock


def _holder(path: Path) -> str:
    try:
        return read_regular_file(path).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def load_records(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The records at or below the given folders or record.json files, with their folders as `path`.

    The status of a running run without a lock becomes dead; the disk is not changed. An unreadable
    record is skipped with one warning. Folders below a run folder are not searched.
    """
    records = []
    for file in record_files(paths):
        try:
            record = _with_dead_status(file.parent)
        except (RunFolderError, OSError) as error:
            log.warning("skipped: %s", error)
            continue
        if record is not None:
            records.append({**record, "path": str(file.parent)})
    return records


def _with_dead_status(folder: Path) -> dict[str, Any] | None:
    record = read_record(folder)
    if record is None or record["status"] != "running" or is_locked(folder):
        return record
    record = read_record(folder)  # again, because it may have finished before `is_locked`
    if record is not None and record["status"] == "running":
        record["status"] = "dead"
    return record


def record_files(paths: Iterable[str | Path]) -> list[Path]:
    """The record.json files at or below the given paths, each once, sorted.

    Folders below a run folder are not searched; a missing path is a warning.
    """
    files = {os.path.realpath(file): file for path in paths for file in _record_files(Path(path))}
    return sorted(files.values())


def _record_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        log.warning("%s: no such folder", path)
    for folder, folders, files in os.walk(path):
        if RECORD in files:
            folders.clear()
            yield Path(folder) / RECORD
