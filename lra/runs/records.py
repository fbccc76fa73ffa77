"""The files of a run folder and their contents. Tables, plots and W&B are derived from them.

    record.json       the run as one JSON object, replaced atomically: `Record`
    metrics.jsonl     one JSON object with a `step` per line; a truncated last line is ignored
    predictions.npz   test logits (n, C) float32, labels (n,), rows (n,) of the split, ascending
    run.lock          locked while the process lives; the kernel releases the lock when it dies

JSON is strict: NaN and infinities become null. Accuracies are fractions in 0..1, also in
metrics.jsonl. A value that is not known yet or does not apply is null. Files are validated when
they are read, because they may come from others: docs/trust.md.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Required

import numpy as np
from annotated_types import Ge, Le, Lt, MaxLen, MinLen
from typing_extensions import TypedDict

from lra.config.schema import keys_affecting
from lra.errors import RunFolderError
from lra.files import read_regular_file

SCHEMA = 1
RECORD, METRICS, PREDICTIONS, LOCK = "record.json", "metrics.jsonl", "predictions.npz", "run.lock"
LARGEST_RECORD, LARGEST_PREDICTIONS = 2**24, 2**30  # bytes

Name = Annotated[str, MinLen(1), MaxLen(200)]
Count = Annotated[int, Ge(0), Lt(2**63)]
Fraction = Annotated[float, Ge(0), Le(1)]
Section = dict[str, Any]


class Scores(TypedDict, total=False):
    """Of one split, by the selected weights; test is scored once, at the end."""

    accuracy: Fraction | None
    loss: float | None  # nats
    count: Count  # examples
    exact: Fraction | None  # examples with all labels correct, for several labels per example


class Selection(TypedDict, total=False):
    """The weights that are scored on test."""

    rule: Literal["best", "last"]
    step: Count
    val_accuracy: Fraction | None
    last_step: Count
    last_val_accuracy: Fraction | None


class SplitData(TypedDict, total=False):
    """The examples of a split and the hash of their stored bytes."""

    count: Count
    sha256: str


class Data(TypedDict, total=False):
    """The data of a run; `key` is a hash of the hashes of its splits."""

    source: str | None  # generated, release or tfds
    key: str
    partial: bool  # not all examples
    sample: str  # stratified, or first (if absent): the examples scored if not all are
    splits: dict[str, SplitData]


class Params(TypedDict, total=False):
    """Numbers of parameters, also by parameter group."""

    total: Count
    groups: dict[str, Count]


class Device(TypedDict, total=False):
    """The hardware: `count` devices share a batch."""

    platform: str
    kind: str
    count: Count
    processes: Count


class Segment(Device, total=False):
    """The hardware and the code from `step` on."""

    step: Required[Count]
    micro_batch: Count | None
    commit: str | None
    versions: dict[str, str | None] | None


class StoppedEarly(TypedDict, total=False):
    """Where trainer.early_stopping ended the run."""

    step: Count
    reason: str


class Time(TypedDict, total=False):
    """Seconds and rates."""

    wall_s: float | None  # of all starts
    train_s: float | None  # of the last start, as the rates; all include waits for data
    steps_per_s: float | None
    examples_per_s: float | None
    first_step_s: float | None  # from the start of the training to the end of its first step
    compile_s: float | None  # part of first_step_s in which JAX traces and compiles


class Memory(TypedDict, total=False):
    """Largest use of device memory, or of main memory on a CPU."""

    peak_bytes: Count | None


class Config(TypedDict, total=False):
    """The resolved config; `lra.config` validates its values before a model is built."""

    task: Section
    model: Section
    protocol: Section
    backbone: Section
    optim: Section
    trainer: Section
    tracker: Section
    output: Section
    data: Section


class Record(TypedDict, total=False):
    """record.json. Keys of newer versions are kept; older versions lack some."""

    schema: Required[Literal[1]]
    status: Required[Literal["running", "finished", "preempted", "diverged", "failed"]]
    error: str | None  # the message that ended the run
    task: Required[Name]  # names as on the command line
    model: Required[Name]
    protocol: Required[Name]
    experiment: str | None
    seed: Required[Count]
    config: Required[Config]
    command: Annotated[str, MaxLen(20_000)] | None  # reproduces the run
    step: Count  # optimizer steps done
    metrics: dict[str, Scores | None] | None  # of train, val and test
    selection: Selection | None
    reference: dict[str, Fraction | None] | None  # test accuracies of trivial predictors
    data: Data | None
    params: Params | None
    segments: list[Segment] | None
    resumed_from: list[Count] | None  # steps
    lost_metrics: Count | None  # lines of metrics.jsonl that were missing at a resume
    damaged_checkpoints: list[Count] | None  # steps whose checkpoint was damaged and skipped
    tuning_runs: Count | None  # runs behind the choice of this configuration
    commit: str | None  # of the last segment's code, with `+dirty` for uncommitted changes
    versions: dict[str, str | None] | None  # of the last segment
    device: Device | None  # of the last segment
    micro_batch: Count | None  # examples per forward and backward pass, over all devices
    eval_batch: Count | None  # examples per evaluation batch
    first_loss: float | None  # mean training loss of the first step
    at_chance: bool | None  # validation accuracy is within noise of chance
    stopped_early: StoppedEarly | None
    learned: bool | None  # test accuracy is above chance by more than noise; false: FAIL in a table
    time: Time | None
    memory: Memory | None


MetricsLine = TypedDict(
    "MetricsLine",
    {
        "step": Required[Count],
        "train/loss": float | None,
        "train/accuracy": Fraction | None,
        "train/lr": float | None,
        "val/loss": float | None,
        "val/accuracy": Fraction | None,
    },
    total=False,
)


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a run, or None; raises RunFolderError if the file is no valid record."""
    path = Path(folder) / RECORD
    try:
        return parse_json(Record, read_regular_file(path, LARGEST_RECORD))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunFolderError(f"{path} {error}; move it away") from None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first, without a truncated last line.

    Raises RunFolderError if another line is not valid.
    """
    path = Path(folder) / METRICS
    try:
        lines = read_regular_file(path).split(b"\n")[:-1]  # the last part is empty or truncated
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(MetricsLine, line))
        except ValueError as error:
            raise RunFolderError(f"{path}, line {number} {error}") from None
    return rows


def parse_json(schema: Any, content: bytes) -> Any:
    """The value of a JSON text; raises ValueError with the first field that `schema` refuses."""
    from pydantic import ValidationError
    from pydantic_core import from_json

    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    try:
        _validator(schema).validate_python(value, strict=True, extra="allow")
        return value
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise ValueError(f"lacks {field}")
    found = repr(first["input"])
    found = found if len(found) <= 60 else f"{found[:60]}..."
    raise ValueError(f"has {field}={found}: {first['msg'][0].lower()}{first['msg'][1:]}")


@cache
def _validator(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def read_predictions(folder: str | Path) -> dict[str, np.ndarray] | None:
    """{logits, labels, rows} of a run, at least one example, or None without predictions.

    Raises RunFolderError if the file is damaged, or if its arrays do not fit together.
    """
    path = Path(folder) / PREDICTIONS
    try:
        content = io.BytesIO(read_regular_file(path, LARGEST_PREDICTIONS))
        with zipfile.ZipFile(content) as archive:  # a compressed file of a few KB may hold many GB
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed")
        with np.load(content, allow_pickle=False) as file:
            logits, labels, rows = (file[name] for name in ("logits", "labels", "rows"))
        if (
            logits.ndim not in (2, 3)
            or logits.dtype != np.float32
            or labels.shape != logits.shape[:-1]
            or rows.shape != logits.shape[:1]
            or not (labels.dtype.kind in "iu" and rows.dtype.kind in "iu")
            or not (logits.size and rows[0] >= 0 and (rows[1:] > rows[:-1]).all())
            or not ((labels >= 0) & (labels < logits.shape[-1])).all()
        ):
            raise ValueError("shapes, types, labels or rows do not fit together")
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy and zipfile raise almost anything for a damaged header
        raise RunFolderError(
            f"{path} is damaged ({' '.join(str(error).split())}); restore it, or move it away"
        ) from None
    return {"logits": logits, "labels": labels, "rows": rows}


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


def _hashed(value: Any, left_out: Set[str] = frozenset(), prefix: str = "") -> Any:
    """`value` without the dotted keys in `left_out`, and with 1 for 1.0, which have one hash."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if prefix + key not in left_out}
        return {key: _hashed(item, left_out, f"{prefix}{key}.") for key, item in kept.items()}
    if isinstance(value, list):
        return [_hashed(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
