"""What is true about a run? Its folder: one record, its metrics over time, its test predictions, and the lock it holds.

The folder is the source of truth; tables, plots and Weights & Biases are views of it.

    record.json       the run in one object, replaced atomically: a reader sees the old version or the new one, whole
    metrics.jsonl     one JSON object a line, each with its `step`; a last line cut short by a crash is dropped
    predictions.npz   test logits (n, C) float32, labels (n,), rows (n,): logits[i] belongs to row rows[i] of the split
    run.lock          held while the process lives (the kernel lets go when it dies, however it dies)

record.json, schema 1. JSON is strict: NaN and infinities are written as null. Accuracies are fractions in 0..1, here
and in metrics.jsonl; only tables speak percent. A value that does not exist yet or does not apply is null.

    schema          1
    status          running | finished | preempted | diverged | failed  (`load_records` adds: dead)
    error           the message that ended the run
    task model protocol experiment seed     names as on the command line; experiment may be null
    config          the resolved Hydra config
    command         what to type to get this run again
    step            optimiser steps done
    metrics         {train, val, test: {accuracy, loss, count}}; test is scored once, at the end
    selection       {rule: best | last, step, val_accuracy, last_step, last_val_accuracy}: the weights scored on test
    reference       {majority, root_operator, ...}: accuracies of shortcuts on the test split, those that are known
    data            {source: generated | release, key, partial: not all of it, splits: {train, val, test: {count, sha256}}}
    params          {total, groups: {name: count}}
    segments        [{step, platform, kind, count, processes, micro_batch}]: what trained from which step on, of the steps
                    that are kept
    resumed_from    steps at which the run was taken up again
    damaged_checkpoints     steps whose checkpoint was damaged, so that an older one was taken
    tuning_runs     how many runs the choice of this configuration rests on
    commit          of the code, `+dirty` when it had uncommitted changes; null outside a checkout
    versions        {python, jax, jaxlib, flax, optax, numpy, lra}
    device          {platform, kind, count: that share a batch, processes}, of the last segment
    micro_batch     of the last segment: examples whose activations were held at once, over all devices
    eval_batch      examples that were evaluated at once
    first_loss      mean training loss of the first step, near log(classes) in a model that knows nothing yet
    at_chance       whether validation accuracy was within noise of chance when last looked at; null before trainer.chance_after
    stopped_early   {step, reason} where trainer.early_stopping ended the run
    learned         whether the test accuracy is above chance by more than noise; false is FAIL in a table
    time            {wall_s: of all starts; train_s, steps_per_s, examples_per_s: of the last, waits for data included}
    memory          {peak_bytes}
"""

import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from lra.errors import RunFolderError
from lra.files import disk_errors, write_all, write_atomically

SCHEMA = 1
STATUSES = ("running", "finished", "preempted", "diverged", "failed")
RECORD, METRICS, PREDICTIONS, LOCK = "record.json", "metrics.jsonl", "predictions.npz", "run.lock"

_REQUIRED = ("status", "task", "model", "protocol", "seed", "config")
_GRACE_S = 0.5  # `load_records` touches the lock of a running run for microseconds; a starting run must outlive that
_NOT_IDENTITY = (
    "output",
    "resume",
    "tracker",
    "tuning_runs",
    "data.root",
    "data.download",
    "data.placement",
    "trainer.devices",
    "trainer.distributed",
    "trainer.distributed_timeout",
    "model.budget",  # the width that it chose counts
    "trainer.time_limit",
    "trainer.profile",
)  # where a run is kept and told of, how it was chosen, which devices work, when it has to stop, and what is traced


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
            for leftover in self.path.glob(".*.tmp"):  # a writer was killed between write and rename
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
        write_atomically(self.path / RECORD, json.dumps(to_json(record), indent=1, allow_nan=False).encode() + b"\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; `row` names its `step`. A line the disk refuses leaves no trace."""
        line = json.dumps(to_json({**row, "step": int(row["step"])}), allow_nan=False).encode() + b"\n"
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
            write_atomically(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write_predictions(self, logits: Any, labels: Any, rows: Any) -> None:
        """Replace predictions.npz: logits (n, C), labels (n,) and the row of the split each belongs to (n,).

        Where an example has T labels: logits (n, T, C), labels (n, T).
        """
        logits, labels, rows = np.asarray(logits, np.float32), np.asarray(labels), np.asarray(rows)
        if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1] or rows.shape != logits.shape[:1]:
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


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a run, without its lock; None before the first was written.

    Raises:
        RunFolderError: it is not a record of this version.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunFolderError(f"{path} is not JSON ({error}); move it away and run again") from error
    if problem := _problem(record):
        raise RunFolderError(f"{path} {problem}")
    return record


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first, without its lock; a last line cut short is left out.

    Raises:
        RunFolderError: a line that is not the last is not a JSON object with a `step`.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty or torn
    except FileNotFoundError:
        return []
    return [_metrics_row(path, number, line) for number, line in enumerate(lines, 1)]


def read_predictions(folder: str | Path) -> dict[str, np.ndarray] | None:
    """{logits, labels, rows} of a run; None where it wrote none."""
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in ("logits", "labels", "rows")}


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


def is_locked(folder: str | Path) -> bool:
    """Whether a live process holds this run. Where the file system cannot tell, a lock file that exists counts."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        import fcntl  # absent on Windows, where the answer is the doubtful one

        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: probes never disturb each other
    except (OSError, ImportError):
        return True
    finally:
        os.close(descriptor)
    return False


def config_hash(config: Mapping[str, Any], *, without: Sequence[str] = ()) -> str:
    """Identity of a run: SHA-256 (hex) of its resolved config, the same before and after a trip through record.json.

    Left out are `output`, `resume`, `tracker`, `tuning_runs`, `model.budget`, where the data lie (`data.root`,
    `data.download`, `data.placement`), which devices work and for how long (`trainer.devices`, `trainer.distributed`,
    `trainer.distributed_timeout`, `trainer.time_limit`), so that a run may be resumed on other ones, what is traced
    (`trainer.profile`), and the keys in `without`, dotted like these.
    Everything else counts, also a key that cannot change the result, such as `trainer.progress`: another value of it is
    another run, in a folder of its own. What the table takes for one configuration is `tables.NO_EFFECT`.
    """
    kept = _without(to_json(config), {*_NOT_IDENTITY, *without})
    return hashlib.sha256(json.dumps(_plain_numbers(kept), sort_keys=True, allow_nan=False).encode()).hexdigest()


def run_path(root: str | Path, config: Mapping[str, Any], names: Mapping[str, Any]) -> Path:
    """Where a run lives: root/<task>/<model>/<protocol>-s<seed>-<first 8 digits of the hash>.

    Args:
        config: resolved, with its `seed`.
        names: task, model and protocol; a slash in one (an experiment's group) becomes a hyphen.
    """
    task, model, protocol = (names[key].replace("/", "-") for key in ("task", "model", "protocol"))
    return Path(root) / task / model / f"{protocol}-s{config['seed']}-{config_hash(config)[:8]}"


def versions() -> dict[str, str | None]:
    """Versions of what computes the result; null for a package that is not installed. Imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in [*((n, n) for n in ("jax", "jaxlib", "flax", "optax", "numpy")), ("lra", "lra-jax")]:
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """Short hash of the checkout this package is in, `+dirty` if code or configs differ from it; None elsewhere.

    A virtual environment inside somebody's repository is not a checkout of ours: git must track this very file.
    """
    root = Path(__file__).resolve().parent.parent
    if _git(root, "ls-files", "--error-unmatch", "lra/records.py") is None:
        return None
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    changed = _git(root, "status", "--porcelain", "--", "lra", "models", "conf")
    return commit + ("+dirty" if changed else "")


def to_json(value: Any) -> Any:
    """`value` in strict JSON types: NaN and infinities become None, arrays lists, paths and keys strings.

    Raises:
        TypeError: there is no such form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [to_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and JAX, scalars and arrays
        return to_json(value.tolist())
    raise TypeError(f"a {type(value).__name__} has no JSON form: {value!r}")


def warn(message: str) -> None:
    """One line on stderr that interrupts nothing."""
    print(f"lra: warning: {' '.join(message.split())}", file=sys.stderr, flush=True)


# ---- the parts


def _problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"holds a {type(record).__name__}, expected an object"
    if record.get("schema") != SCHEMA:
        return f"has schema {record.get('schema')!r}; this version reads schema {SCHEMA}"
    if missing := [key for key in _REQUIRED if key not in record]:
        return f"lacks {', '.join(missing)}"
    if record["status"] not in STATUSES:
        return f"has status {record['status']!r}, expected one of {', '.join(STATUSES)}"
    if not all(isinstance(record[key], str) for key in ("task", "model", "protocol")):
        return "has a task, model or protocol that is not a name"
    if not isinstance(record["config"], Mapping):
        return "has a config that is not an object"
    return None


def _living_or_dead(folder: Path) -> dict[str, Any] | None:
    record = read_record(folder)
    if record is None or record["status"] != "running" or is_locked(folder):
        return record
    record = read_record(folder)  # again: it may have finished, and let go, between the first look and the probe
    return {**record, "status": "dead"} if record is not None and record["status"] == "running" else record


def _metrics_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row["step"], int):
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise RunFolderError(f"{path}, line {number}: expected a JSON object with a step, found {line[:60]!r}")


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


def _locked(folder: Path) -> filelock.FileLock:
    path = folder / LOCK
    holder = _holder(path)  # before we try: older versions of filelock empty the file when they fail to get it
    lock = filelock.FileLock(path, thread_local=False)  # a tracker's or a signal's thread may be the one to let go
    try:
        lock.acquire(timeout=_GRACE_S, poll_interval=0.05)
    except filelock.Timeout:
        holder = _holder(path) or holder or "another process"
        raise RunFolderError(f"{folder} is in use by {holder}; wait for it, stop it, or set another output") from None
    path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    return lock


def _holder(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.exists() else ""


def _drop_torn_tail(path: Path) -> None:
    """A crash in the middle of an append leaves half a line, to which the next append would be glued."""
    if not path.exists() or not (content := path.read_bytes()) or content.endswith(b"\n"):
        return
    os.truncate(path, content.rfind(b"\n") + 1)


def _without(config: dict[str, Any], left_out: Set[str], prefix: str = "") -> dict[str, Any]:
    """`config` less the dotted keys in `left_out`."""
    kept = {key: value for key, value in config.items() if prefix + key not in left_out}
    return {
        key: _without(value, left_out, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def _plain_numbers(value: Any) -> Any:
    """1.0 and 1 are one setting, however it was typed."""
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # hundreds of runs may ask at once
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
