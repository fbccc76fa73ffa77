"""One run in several processes: how they start, and how they agree. Process 0 alone writes, the others look on."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from omegaconf import DictConfig

from lra import errors
from lra.config import shown
from lra.records import RunFolder

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_MEMBERS = {"coordinator": str, "num_processes": int, "process_id": int}
_CHUNK = 4096  # bytes; messages are filled up to a multiple, so that few shapes are compiled


def start(cfg: DictConfig) -> None:
    """What has to be said before JAX starts its backend: determinism, and which processes belong together.

    Raises:
        ConfigError: it has started already, or the processes are described wrongly.
        LraError: the other processes do not answer.
    """
    if not isinstance(cfg.trainer.deterministic, bool):
        raise errors.ConfigError(f"trainer.deterministic={shown(cfg.trainer.deterministic)} must be true or false")
    if cfg.trainer.deterministic:
        be_deterministic()
    if cfg.trainer.distributed is not None and not jax.distributed.is_initialized():
        connect(cfg.trainer.distributed)


def be_deterministic() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC in flags:
        return
    if has_started():
        raise errors.ConfigError(
            "trainer.deterministic=true comes too late, JAX has started in this process; "
            f"set XLA_FLAGS={DETERMINISTIC} before it starts"
        )
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()


def has_started() -> bool:
    from jax._src import xla_bridge  # jax.distributed asks the same; no public function tells

    return xla_bridge.backends_are_initialized()


def connect(members: Any) -> None:
    if has_started():
        raise errors.ConfigError("trainer.distributed comes too late, JAX has started in this process; start a new one")
    form = "{coordinator: HOST:PORT, num_processes: N, process_id: I}"
    words: dict[str, Any] = {}
    if members != "auto":
        if not isinstance(members, Mapping) or set(members) != set(_MEMBERS):
            raise errors.ConfigError(f"trainer.distributed={shown(members)} must be {form}, auto or null")
        for key, kind in _MEMBERS.items():
            if type(members[key]) is not kind:
                raise errors.ConfigError(f"trainer.distributed.{key}={shown(members[key])} does not fit {form}")
        number, count = members["process_id"], members["num_processes"]
        if not 0 <= number < count:
            raise errors.ConfigError(f"trainer.distributed.process_id={number} must be in [0, {count})")
        words = {"coordinator_address": members["coordinator"], "num_processes": count, "process_id": number}
    try:
        jax.distributed.initialize(**words)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise errors.LraError(f"trainer.distributed={shown(members)}: the processes do not meet: {reason}") from error


def is_first() -> bool:
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The `value` (of JSON types) of every process, in their order; all of them have to call this."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = process_allgather(np.int32(len(message)))
    filled = np.zeros(-(-int(lengths.max()) // _CHUNK) * _CHUNK, np.uint8)
    filled[: len(message)] = message
    return [json.loads(row[:length].tobytes()) for row, length in zip(process_allgather(filled), lengths, strict=True)]


def agree(work: Callable[[], Any]) -> Any:
    """What `work` gives on process 0, on every process; an error there is raised on all."""
    if jax.process_count() == 1:
        return work()
    failed: Exception | None = None
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": work()}
        except Exception as error:
            failed, outcome = error, {"error": [type(error).__name__, str(error)]}
    outcome = gather(outcome)[0]
    if failed is not None:
        raise failed
    if "error" in outcome:
        name, message = outcome["error"]
        raise getattr(errors, name, errors.LraError)(f"on process 0: {message}")
    return outcome["value"]


def open_folder(path: Path) -> RunFolder:
    """The run's folder: locked by process 0, looked at by the others."""
    opened: list[RunFolder] = []
    agree(lambda: opened.append(RunFolder(path)))
    return opened[0] if opened else Onlooker(path)


class Onlooker(RunFolder):
    """The folder as the other processes have it: they read, and write nothing."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def close(self) -> None: ...

    def write_record(self, record: Mapping[str, Any]) -> None: ...

    def append_metrics(self, row: Mapping[str, Any]) -> None: ...

    def truncate_metrics(self, step: int) -> None: ...

    def write_predictions(self, logits: Any, labels: Any, rows: Any) -> None: ...
