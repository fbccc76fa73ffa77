"""The files of a run folder and their contents. Tables, plots and W&B are derived from them.

    record.json       the run as one JSON object, replaced atomically
    metrics.jsonl     one JSON object with a `step` per line; a truncated last line is ignored
    predictions.npz   test logits (n, C) float32, labels (n,), rows (n,): row in the split
    run.lock          locked while the process lives; the kernel releases the lock when it dies

record.json, schema 1. JSON is strict: NaN and infinities become null. Accuracies are fractions in
0..1, also in metrics.jsonl. A value that is not known yet or does not apply is null.

    schema          1
    status          running | finished | preempted | diverged | failed; `load_records` adds dead
    error           the message that ended the run
    task model protocol experiment seed     names as on the command line; experiment may be null
    config          the resolved Hydra config
    command         the command that reproduces the run
    step            optimizer steps done
    metrics         {train, val, test: {accuracy, loss, count}}; test is scored once, at the end
    selection       {rule: best | last, step, val_accuracy, last_step, last_val_accuracy} of the
                    weights that are scored on test
    reference       {majority, root_operator, ...}: test accuracies of trivial predictors
    data            {source: generated | release, key, partial: not all examples,
                    splits: {train, val, test: {count, sha256}}}
    params          {total, groups: {name: count}}
    segments        [{step, platform, kind, count, processes, micro_batch, commit, versions}]: the
                    hardware and the code from each `step` on
    resumed_from    steps at which the run was resumed
    lost_metrics    lines of metrics.jsonl that were missing when the run was resumed
    damaged_checkpoints     steps whose checkpoint was damaged and skipped
    tuning_runs     number of runs behind the choice of this configuration
    commit          of the code of the last segment, with `+dirty` for uncommitted changes; null
                    outside a checkout
    versions        {python, jax, jaxlib, flax, optax, numpy, lra} of the last segment
    device          {platform, kind, count: devices per batch, processes} of the last segment
    micro_batch     examples per forward and backward pass, over all devices, in the last segment
    eval_batch      examples per evaluation batch
    first_loss      mean training loss of the first step
    at_chance       validation accuracy is within noise of chance; null before trainer.chance_after
    stopped_early   {step, reason} if trainer.early_stopping ended the run
    learned         test accuracy is above chance by more than noise; false is FAIL in a table
    time            {wall_s: of all starts; train_s, steps_per_s, examples_per_s: of the last start,
                    including waits for data; first_step_s: from the start of the training to the
                    end of its first step; compile_s: part of it in which JAX traces and compiles}
    memory          {peak_bytes}
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from lra.config.schema import keys_affecting
from lra.errors import RunFolderError

SCHEMA = 1
STATUSES = ("running", "finished", "preempted", "diverged", "failed")
RECORD, METRICS, PREDICTIONS, LOCK = "record.json", "metrics.jsonl", "predictions.npz", "run.lock"


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a run, or None; raises RunFolderError if the file is no valid record."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunFolderError(f"{path} is not JSON ({error}); move it away and run again") from error
    if found := problem(record):
        raise RunFolderError(f"{path} {found}")
    return record


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first, without a truncated last line.

    Raises RunFolderError if another line is not a JSON object with a `step`.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # the last part is empty or truncated
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"]
        except (ValueError, LookupError, TypeError):
            raise RunFolderError(
                f"{path}, line {number}: expected a JSON object with a step, found {line[:60]!r}"
            ) from None
    return rows


def read_predictions(folder: str | Path) -> dict[str, np.ndarray] | None:
    """{logits, labels, rows} of a run, or None without predictions."""
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in ("logits", "labels", "rows")}


def config_hash(config: Mapping[str, Any], *, without: Sequence[str] = ()) -> str:
    """SHA-256 (hex) of a resolved config, which identifies a run; JSON keeps it unchanged.

    Leaves out the keys that affect only one start or one process of a run (`lra.config.schema`),
    so that a resumed run may change them, and the dotted keys in `without`.
    """
    kept = _hashed(to_json(config), {*keys_affecting("start", "process"), *without})
    if "hparams" in (task := kept.get("task") or {}):
        task["budget"] = task.pop("hparams")  # the name when the first runs were hashed
    text = json.dumps(kept, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def run_path(root: str | Path, config: Mapping[str, Any], names: Mapping[str, Any]) -> Path:
    """The folder of a run: root/<task>/<model>/<protocol>-s<seed>-<first 8 digits of its hash>."""
    task, model, protocol = (names[key].replace("/", "-") for key in ("task", "model", "protocol"))
    return Path(root) / task / model / f"{protocol}-s{config['seed']}-{config_hash(config)[:8]}"


def to_json(value: Any) -> Any:
    """Converts to JSON types: NaN, infinities to None, arrays to lists, paths, keys to strings."""
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


def problem(record: Any) -> str | None:
    """What makes `record` invalid under schema 1; None for a valid record."""
    if not isinstance(record, dict):
        return f"holds a {type(record).__name__}, expected an object"
    if record.get("schema") != SCHEMA:
        return f"has schema {record.get('schema')!r}; this version reads schema {SCHEMA}"
    required = ("status", "task", "model", "protocol", "seed", "config")
    if missing := [key for key in required if key not in record]:
        return f"lacks {', '.join(missing)}"
    if record["status"] not in STATUSES:
        return f"has status {record['status']!r}, expected one of {', '.join(STATUSES)}"
    if not all(isinstance(record[key], str) for key in ("task", "model", "protocol")):
        return "has a task, model or protocol that is not a name"
    if not isinstance(record["config"], Mapping):
        return "has a config that is not an object"
    return None


def _hashed(value: Any, left_out: Set[str] = frozenset(), prefix: str = "") -> Any:
    """`value` without the dotted keys in `left_out`, and with 1 for 1.0, which have one hash."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if prefix + key not in left_out}
        return {key: _hashed(item, left_out, f"{prefix}{key}.") for key, item in kept.items()}
    if isinstance(value, list):
        return [_hashed(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
