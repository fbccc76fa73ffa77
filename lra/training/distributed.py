"""Runs in several processes: initialization, agreement, and the shared run folder.

Built on `jax.distributed` and `jax.experimental.multihost_utils`. Process 0 writes the record,
metrics and predictions; the other processes only read. All functions that communicate must be
called by all processes in the same order.
"""

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from omegaconf import DictConfig, OmegaConf

from lra import errors
from lra.config.rules import format_value
from lra.config.schema import keys_affecting
from lra.runs.machine import versions
from lra.runs.run_folder import RunFolder
from lra.training.determinism import backend_started, use_deterministic_ops
from lra.training.memory import is_out_of_memory

T = TypeVar("T")

HEARTBEAT_TIMEOUT_S = 100  # JAX ends all processes when one has sent no heartbeat for this long
SHUTDOWN_TIMEOUT_S = 60  # for process 0 to finish its tracker while the others wait in JAX's exit
MEMBER_KEYS = {"coordinator": str, "num_processes": int, "process_id": int}
# found in the messages of JAX errors that follow the loss of another process
PEER_LOST = re.compile("Gloo|NCCL|UNAVAILABLE|[Hh]eartbeat|[Cc]oordination service")
MESSAGE_BYTES = 4096  # messages are padded to multiples of this, so that few shapes are compiled


def initialize(cfg: DictConfig) -> None:
    """Sets `trainer.deterministic` and connects the processes of `trainer.distributed`.

    Must run before JAX starts its backend.

    Raises:
        ConfigError: a value is malformed, or the backend has already started.
        LraError: the processes cannot be connected. If process 0 runs and another process is
            missing, JAX ends them after `trainer.distributed_timeout` seconds with exit code 134.
    """
    use_deterministic_ops(cfg.trainer.deterministic)
    members, timeout = cfg.trainer.distributed, cfg.trainer.distributed_timeout
    if members is None or jax.distributed.is_initialized():
        return
    arguments = {} if members == "auto" else distributed_arguments(members)
    if backend_started():
        raise errors.ConfigError(
            "trainer.distributed is set too late, JAX has already started in this process; "
            "start a new process"
        )
    if arguments.get("process_id"):
        wait_for_coordinator(arguments["coordinator_address"], timeout)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise errors.LraError(
            f"trainer.distributed={format_value(members)}: the processes cannot be connected: "
            f"{reason}"
        ) from error


def distributed_arguments(members: Any) -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize` for `trainer.distributed`.

    Raises:
        ConfigError: a key is missing, unknown or malformed.
    """
    form = "{coordinator: HOST:PORT, num_processes: N, process_id: I}"
    if not isinstance(members, Mapping) or set(members) != set(MEMBER_KEYS):
        raise errors.ConfigError(
            f"trainer.distributed={format_value(members)} must be {form}, auto or null"
        )
    for key, kind in MEMBER_KEYS.items():
        if type(members[key]) is not kind:
            raise errors.ConfigError(
                f"trainer.distributed.{key}={format_value(members[key])} does not fit {form}"
            )
    address, count, number = (members[key] for key in MEMBER_KEYS)
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise errors.ConfigError(f"trainer.distributed.coordinator={address} must be HOST:PORT")
    if not 0 <= number < count:
        raise errors.ConfigError(f"trainer.distributed.process_id={number} must be in [0, {count})")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def wait_for_coordinator(address: str, timeout: int) -> None:
    """Waits until process 0 accepts connections; JAX would abort with a C++ stack trace.

    Raises:
        LraError: process 0 does not accept connections within `timeout` seconds.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise errors.LraError(
                    f"process 0 does not answer at {address} within {timeout} s ({error}); start "
                    f"all processes at about the same time, or set trainer.distributed_timeout"
                ) from error
        time.sleep(0.2)


# ---- agreement between processes


def is_first() -> bool:
    """Returns whether this is process 0, which alone writes and prints."""
    return jax.process_index() == 0


def all_gather(value: Any) -> list[Any]:
    """Returns the `value` (JSON types) of every process, ordered by process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = process_allgather(np.int32(len(message)))
    padded = np.zeros(-(-int(lengths.max()) // MESSAGE_BYTES) * MESSAGE_BYTES, np.uint8)
    padded[: len(message)] = message
    rows = process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def run_on_all(work: Callable[[], T]) -> T:
    """Returns the value of `work()` on this process; an error on any process is raised on all.

    Raises:
        LraError: of the same class as on the process that failed, "on process I: ..."; another
            error keeps its class only on the process that raised it.
    """
    return work() if jax.process_count() == 1 else _run(work, share=False)[0]


def broadcast(work: Callable[[], Any]) -> Any:
    """Returns the value of `work()` on process 0 (JSON types) on all; errors as in `run_on_all`."""
    if jax.process_count() == 1:
        return work()
    return _run(work if is_first() else lambda: None, share=True)[1]


def _run(work: Callable[[], Any], *, share: bool) -> tuple[Any, Any]:
    """Returns the value of `work()` on this process and, if shared, on process 0."""
    value, own = None, None
    try:
        value = work()
    except Exception as error:
        own = error
    failure = None if own is None else [type(own).__name__, str(own)]
    outcomes = all_gather([failure, value if share else None])
    if own is not None:
        raise own
    for number, (found, _) in enumerate(outcomes):
        if found is not None:
            kind = getattr(errors, found[0], errors.LraError)
            raise kind(f"on process {number}: {found[1]}")
    return value, outcomes[0][1]


def check_same_config(cfg: DictConfig) -> None:
    """Checks that all processes run the same config with the same versions.

    Raises:
        ConfigError: on all processes, if a process differs from process 0.
    """
    own = {
        **{f"version of {name}": version for name, version in versions().items()},
        **dict(_flatten(OmegaConf.to_container(cfg))),
    }
    may_differ = tuple(f"{key}." for key in (*keys_affecting("process"), "names.command"))
    own = {
        key: format_value(value)
        for key, value in own.items()
        if not f"{key}.".startswith(may_differ)
    }
    for number, other in enumerate(configs := all_gather(own)):
        first = configs[0]
        keys = [key for key in sorted({*other, *first}) if other.get(key) != first.get(key)]
        if keys:
            found = [f"{key}={other.get(key)}, not {first.get(key)}" for key in keys[:3]]
            raise errors.ConfigError(
                f"process {number} was started with {', '.join(found)}{', ...' * (len(keys) > 3)} "
                f"as process 0; start all with the same command"
            )


def check_same_data(key: str) -> None:
    """Checks that all processes read the same data, identified by the hash `key`.

    Raises:
        DataError: on all processes, if a process differs from process 0.
    """
    for number, other in enumerate(keys := all_gather(key)):
        if other != keys[0]:
            raise errors.DataError(
                f"process {number} has other data under its data.root than process 0; "
                f"copy or share it"
            )


def _flatten(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(section, Mapping):
        yield prefix, section
        return
    for name, value in section.items():
        yield from _flatten(value, f"{prefix}.{name}" if prefix else str(name))


# ---- the run folder


class ReadOnlyRunFolder(RunFolder):
    """A run's folder on all processes but process 0: takes no lock, and writes do nothing."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def close(self) -> None: ...

    def remove_if_empty(self) -> None: ...

    def check_lock(self) -> None: ...

    def write_record(self, record: Mapping[str, Any]) -> None: ...

    def append_metrics(self, row: Mapping[str, Any]) -> None: ...

    def truncate_metrics(self, step: int) -> int:
        return 0

    def write_predictions(self, logits: Any, labels: Any, rows: Any) -> None: ...


def open_run_folder(path: Path) -> RunFolder:
    """Opens a run's folder, locked and writable on process 0, read-only on the others.

    Raises:
        RunFolderError: on all processes, if the folder is in use or if they see different folders.
    """
    folder = run_on_all(lambda: RunFolder(path) if is_first() else ReadOnlyRunFolder(path))
    if jax.process_count() == 1:
        return folder
    try:
        # RunFolder removes files with such a name when it opens a folder
        probe = path / broadcast(lambda: f".{secrets.token_hex(8)}.tmp")
        broadcast(probe.touch)
        visible = all_gather(probe.exists())
        broadcast(lambda: probe.unlink(missing_ok=True))
        if not all(visible):
            raise errors.RunFolderError(
                f"process {visible.index(False)} does not see the folder {path} of process 0; "
                f"output.root must be one folder that all processes share"
            )
    except BaseException:
        folder.close()
        raise
    return folder


# ---- lost processes


def is_peer_lost(error: BaseException) -> bool:
    """Returns whether a JAX error says that another process of this run is gone."""
    if not jax.distributed.is_initialized() or is_out_of_memory(error):
        return False
    return isinstance(error, (RuntimeError, ValueError)) and bool(PEER_LOST.search(str(error)))


def lost_peer_error(error: BaseException) -> errors.LraError | None:
    """Returns the one-line error for a lost process, None if `error` has another cause."""
    if not is_peer_lost(error):
        return None
    first_line = str(error).strip().partition("\n")[0][:150]
    return errors.PreemptedError(
        f"another process of this run is gone; the same command with resume=auto on all processes "
        f"continues from the last checkpoint, if there is one ({first_line})"
    )
