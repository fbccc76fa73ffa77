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
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from lra.config.schema import keys_affecting
from lra.errors import RunFolderError

SCHEMA = 1
STATUSES = ("running", "finished", "preempted", "diverged", "failed")
RECORD, METRICS, PREDICTIONS, LOCK = "record.json", "metrics.jsonl", "predictions.npz", "run.lock"

_REQUIRED = ("status", "task", "model", "protocol", "seed", "config")


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
        lines = path.read_bytes().split(b"\n")[
            :-1
        ]  # what follows the last newline is empty or torn
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


def config_hash(config: Mapping[str, Any], *, without: Sequence[str] = ()) -> str:
    """Identity of a run: SHA-256 (hex) of its resolved config, the same before and after a trip through record.json.

    Leaves out the keys that affect a single start of a run (`lra.config.schema`), so that a resumed run may change them,
    and the dotted keys in `without`.
    """
    kept = _without(to_json(config), {*keys_affecting("start", "process"), *without})
    return hashlib.sha256(
        json.dumps(_plain_numbers(kept), sort_keys=True, allow_nan=False).encode()
    ).hexdigest()


def run_path(root: str | Path, config: Mapping[str, Any], names: Mapping[str, Any]) -> Path:
    """Where a run lives: root/<task>/<model>/<protocol>-s<seed>-<first 8 digits of the hash>.

    Args:
        config: resolved, with its `seed`.
        names: task, model and protocol; a slash in one (an experiment's group) becomes a hyphen.
    """
    task, model, protocol = (names[key].replace("/", "-") for key in ("task", "model", "protocol"))
    return Path(root) / task / model / f"{protocol}-s{config['seed']}-{config_hash(config)[:8]}"


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


def _metrics_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row["step"], int):
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise RunFolderError(
        f"{path}, line {number}: expected a JSON object with a step, found {line[:60]!r}"
    )


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
