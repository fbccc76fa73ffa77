"""A run's folder: its record, metrics, predictions and lock."""

import io
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from lra.errors import RunFolderError
from lra.files import disk_errors, write_all, write_atomically
from lra.runs.records import (
    LOCK,
    METRICS,
    PREDICTIONS,
    RECORD,
    SCHEMA,
    _problem,
    read_metrics,
    read_record,
    to_json,
    warn,
)

_GRACE_S = 0.5  # `load_records` touches the lock of a running run for microseconds; a starting run must outlive that


class RunFolder:
    """A run's folder, locked for this process until `close` (or the end of a `with` block).

    Raises:
        RunFolderError: another process holds it.
        LraError: it cannot be created or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
            for leftover in self.path.glob(
                ".*.tmp"
            ):  # a writer was killed between write and rename
                leftover.unlink()
            _drop_torn_tail(self.path / METRICS)

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace record.json by `record`; `schema` is filled in. On any error the previous version stays whole.

        Raises:
            ValueError: a required key is missing or `status` is none of `STATUSES`.
            TypeError: a value has no JSON form.
            LraError: the disk is full or refuses.
        """
        record = {"schema": SCHEMA, **record}
        if problem := _problem(record):
            raise ValueError(f"record {problem}")
        write_atomically(
            self.path / RECORD,
            json.dumps(to_json(record), indent=1, allow_nan=False).encode() + b"\n",
        )

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; `row` names its `step`. A line the disk refuses leaves no trace."""
        line = (
            json.dumps(to_json({**row, "step": int(row["step"])}), allow_nan=False).encode() + b"\n"
        )
        path = self.path / METRICS
        with disk_errors(path), open(path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                write_all(file.fileno(), line)
            except OSError:
                file.truncate(start)
                raise

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines past `step`, atomically: a run resumed from `step` writes them again."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        if (self.path / METRICS).exists():
            write_atomically(
                self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode()
            )

    def write_predictions(self, logits: Any, labels: Any, rows: Any) -> None:
        """Replace predictions.npz: logits (n, C), labels (n,) and the row of the split each belongs to (n,).

        Where an example has T labels: logits (n, T, C), labels (n, T).
        """
        logits, labels, rows = np.asarray(logits, np.float32), np.asarray(labels), np.asarray(rows)
        if (
            logits.ndim not in (2, 3)
            or labels.shape != logits.shape[:-1]
            or rows.shape != logits.shape[:1]
        ):
            raise ValueError(
                f"expected logits (n[, T], C), labels (n[, T]), rows (n,); got {logits.shape}, {labels.shape}, {rows.shape}"
            )
        buffer = io.BytesIO()
        np.savez(buffer, logits=logits, labels=labels, rows=rows)
        write_atomically(self.path / PREDICTIONS, buffer.getvalue())

    def read_record(self) -> dict[str, Any] | None:
        return read_record(self.path)

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)


def is_locked(folder: str | Path) -> bool:
    """Whether a live process holds this run. Where the file system cannot tell, a lock file that exists counts."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        import fcntl  # absent on Windows, where the answer is the doubtful one

        fcntl.flock(
            descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB
        )  # shared: probes never disturb each other
    except (OSError, ImportError):
        return True
    finally:
        os.close(descriptor)
    return False


def _locked(folder: Path) -> filelock.FileLock:
    path = folder / LOCK
    holder = _holder(
        path
    )  # before we try: older versions of filelock empty the file when they fail to get it
    lock = filelock.FileLock(
        path, thread_local=False
    )  # a tracker's or a signal's thread may be the one to let go
    try:
        lock.acquire(timeout=_GRACE_S, poll_interval=0.05)
    except filelock.Timeout:
        holder = _holder(path) or holder or "another process"
        raise RunFolderError(
            f"{folder} is in use by {holder}; wait for it, stop it, or set another output"
        ) from None
    path.write_text(
        f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    )
    return lock


def _holder(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.exists() else ""


def _drop_torn_tail(path: Path) -> None:
    """A crash in the middle of an append leaves half a line, to which the next append would be glued."""
    if not path.exists() or not (content := path.read_bytes()) or content.endswith(b"\n"):
        return
    os.truncate(path, content.rfind(b"\n") + 1)


def load_records(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Every run's record at or below the given folders (or record.json files), each with its folder as `path`.

    A status of running whose lock nobody holds is shown as dead; nothing is changed on disk. A record that cannot be
    read costs one warning line on stderr. Runs do not nest: below a folder with a record nothing is searched.
    """
    files = {os.path.realpath(file): file for path in paths for file in _record_files(Path(path))}
    records = []
    for file in sorted(files.values()):
        try:
            record = _living_or_dead(file.parent)
        except (RunFolderError, OSError) as error:
            warn(f"skipped: {error}")
            continue
        if record is not None:
            records.append({**record, "path": str(file.parent)})
    return records


def _living_or_dead(folder: Path) -> dict[str, Any] | None:
    record = read_record(folder)
    if record is None or record["status"] != "running" or is_locked(folder):
        return record
    record = read_record(
        folder
    )  # again: it may have finished, and let go, between the first look and the probe
    return (
        {**record, "status": "dead"}
        if record is not None and record["status"] == "running"
        else record
    )


def _record_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        warn(f"{path}: no such folder")
    for folder, folders, files in os.walk(path):
        if RECORD in files:
            folders.clear()
            yield Path(folder) / RECORD
