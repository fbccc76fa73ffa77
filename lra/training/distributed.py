"""One run in several processes: how they start, how they agree, and how they end.

Process 0 alone writes, the others look on. What all of them know of (a signal, a diverged loss, what `agree` raises) ends a
run as it ends that of one process. What only one of them knows of ends it at once, without a word to JAX, whose way out
waits minutes for all: it tells the others over the channel on which they met, and they follow.
"""

import atexit
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from omegaconf import DictConfig, OmegaConf

from lra import errors
from lra.config.rules import format_value
from lra.config.schema import keys_affecting
from lra.runs.machine import versions
from lra.runs.run_folder import RunFolder
from lra.training.memory import is_out_of_memory

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_MEMBERS = {"coordinator": str, "num_processes": int, "process_id": int}
_CHUNK = 4096  # bytes; messages are filled up to a multiple, so that few shapes are compiled
_PATIENCE_S = 10.0  # of waiting for the others before it is said
_SHUTDOWN_S = 60  # for which JAX waits at the end; all have come out of `together` by then
_POLL_S = 0.5  # between two looks at whether another process has ended
_GRACE_S = (
    5.0  # for which process 0, whose end is the channel's, waits for the others to hear of it
)
_ENDED, _GONE = "lra/ended", "lra/gone"  # keys of that channel
_LOST = "Gloo|NCCL|UNAVAILABLE|[Hh]eartbeat|[Cc]oordination service"  # in what JAX says of a process that is gone


def start(cfg: DictConfig) -> None:
    """What has to be said before JAX starts its backend: determinism, and which processes belong together.

    Raises:
        ConfigError: it has started already, or the processes are described wrongly.
        LraError: the other processes do not answer.
    """
    be_deterministic(cfg.trainer.deterministic)
    if cfg.trainer.distributed is not None and not jax.distributed.is_initialized():
        connect(cfg.trainer.distributed, cfg.trainer.distributed_timeout)


# ---- determinism


def has_started() -> bool:
    """Whether JAX has a backend, as far as it tells: no public function does."""
    try:
        from jax._src import xla_bridge

        return xla_bridge.backends_are_initialized()
    except (ImportError, AttributeError):
        return False


def _asked_for() -> bool:
    return DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split()


def _in_the_shell() -> bool:
    """Whether the flag came with the process; what a program sets later, XLA may have read too early to see."""
    try:
        return DETERMINISTIC.encode() in Path("/proc/self/environ").read_bytes()
    except OSError:  # not Linux
        return _asked_for()


_early = _asked_for() and not has_started()  # set by a program before JAX started
_ours = False  # set by a run of this process


def be_deterministic(wanted: bool) -> None:
    """Put XLA's flag where it belongs: into the environment while JAX has not started, as XLA reads it once.

    Raises:
        ConfigError: JAX has started, and not so; the record would say what was not.
    """
    global _ours
    if not has_started():
        flags = os.environ.get("XLA_FLAGS", "").split()
        if wanted and DETERMINISTIC not in flags:
            os.environ["XLA_FLAGS"], _ours = " ".join([*flags, DETERMINISTIC]), True
        elif not wanted and _ours:
            os.environ["XLA_FLAGS"], _ours = (
                " ".join(flag for flag in flags if flag != DETERMINISTIC),
                False,
            )
    elif wanted and not (_ours or _early or _in_the_shell()):
        raise errors.ConfigError(
            "trainer.deterministic=true comes too late, JAX has started in this process; "
            f"set XLA_FLAGS={DETERMINISTIC} before it starts"
        )
    elif not wanted and _ours:
        raise errors.ConfigError(
            "trainer.deterministic=false comes too late, an earlier run of this process has started JAX with true; "
            "run the two in commands of their own"
        )


# ---- how they start


def connect(members: Any, timeout: int) -> None:
    """Meet the other processes, within `timeout` seconds.

    Raises:
        ConfigError: `members` are not described as they should be, or JAX has started.
        LraError: they do not meet; where JAX would wait for ever or abort, the process ends with the same line.
    """
    form = "{coordinator: HOST:PORT, num_processes: N, process_id: I}"
    words: dict[str, Any] = {}
    if members != "auto":
        if not isinstance(members, Mapping) or set(members) != set(_MEMBERS):
            raise errors.ConfigError(
                f"trainer.distributed={format_value(members)} must be {form}, auto or null"
            )
        for key, kind in _MEMBERS.items():
            if type(members[key]) is not kind:
                raise errors.ConfigError(
                    f"trainer.distributed.{key}={format_value(members[key])} does not fit {form}"
                )
        if not re.fullmatch(r".+:\d{1,5}", members["coordinator"]):
            raise errors.ConfigError(
                f"trainer.distributed.coordinator={members['coordinator']} must be HOST:PORT"
            )
        number, count = members["process_id"], members["num_processes"]
        if not 0 <= number < count:
            raise errors.ConfigError(
                f"trainer.distributed.process_id={number} must be in [0, {count})"
            )
        words = {
            "coordinator_address": members["coordinator"],
            "num_processes": count,
            "process_id": number,
        }
    try:
        with _meeting(words, timeout):
            jax.distributed.initialize(
                **words,
                initialization_timeout=timeout + 60,  # JAX's end is an abort; ours comes first
                shutdown_timeout_seconds=_SHUTDOWN_S,
            )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "must be called before" in reason:
            raise errors.ConfigError(
                "trainer.distributed comes too late, JAX has started in this process; start a new one"
            ) from error
        message = (
            f"trainer.distributed={format_value(members)}: the processes do not meet: {reason}"
        )
        if (
            jax.distributed.is_initialized()
        ):  # by half: JAX would take leave of those whom it has not met
            _say_error(message)
            os._exit(errors.LraError.exit_code)
        raise errors.LraError(message) from error
    _watch()


@contextmanager
def _meeting(words: Mapping[str, Any], timeout: int) -> Iterator[None]:
    """While JAX waits for the others in silence: say so after a while, and end the process with one line in time."""
    met = threading.Event()
    place = f" at {words['coordinator_address']}" if words else ""
    who = f"process {words['process_id']} of {words['num_processes']}" if words else "this process"

    def wait() -> None:
        patience = min(_PATIENCE_S, timeout / 2)
        if met.wait(patience):
            return
        left = timeout - patience
        print(
            f"lra: {who} waits for the others{place}, {left:.0f} s more at most",
            file=sys.stderr,
            flush=True,
        )
        if not met.wait(left):
            _say_error(
                f"{who} has not met the others{place} in {timeout} s{_guess(words)}; start all of them, and at about the "
                f"same time, or set trainer.distributed_timeout"
            )
            os._exit(errors.LraError.exit_code)

    thread = threading.Thread(target=wait, name="lra-meeting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        met.set()
        thread.join()


def _guess(words: Mapping[str, Any]) -> str:
    """Why they did not meet, as far as one of them can tell."""
    if not words or words["process_id"] == 0:
        return ""
    host, _, port = words["coordinator_address"].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        return f": nothing answers there ({error}), where process 0 should"
    return ": process 0 is there, but not all the others"


def check_same(cfg: DictConfig) -> None:
    """All processes run the same config with the same versions, or none runs.

    Raises:
        ConfigError: on all of them, where they differ.
    """
    own = dict(_flat(OmegaConf.to_container(cfg))) | {
        f"version of {name}": v for name, v in versions().items()
    }
    own = {
        key: format_value(value)
        for key, value in own.items()
        if not f"{key}.".startswith(_dotted((*keys_affecting("process"), "names.command")))
    }
    first = agree(lambda: own)
    differ = [key for key in sorted({*own, *first}) if own.get(key) != first.get(key)]
    found = [f"{key}={own.get(key)}, not {first.get(key)}" for key in differ[:3]] + ["..."] * (
        len(differ) > 3
    )
    for number, words in enumerate(gather(found)):
        if words:
            raise common(
                errors.ConfigError(
                    f"process {number} was started with {', '.join(words)} as process 0; start all with the same command"
                )
            )


def check_same_data(key: str) -> None:
    """Raises: DataError, on all processes, where their data, told by the hash `key`, differ."""
    for number, other in enumerate(keys := gather(key)):
        if other != keys[0]:
            raise common(
                errors.DataError(
                    f"process {number} has other data under its data.root than process 0; copy or share them"
                )
            )


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(section, Mapping):
        yield prefix, section
        return
    for name, value in section.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _dotted(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{key}." for key in keys)


# ---- how they agree


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
    return [
        json.loads(row[:length].tobytes())
        for row, length in zip(process_allgather(filled), lengths, strict=True)
    ]


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
        raise common(failed)
    if "error" in outcome:
        name, message = outcome["error"]
        raise common(_error(name, f"on process 0: {message}"))
    return outcome["value"]


def _error(name: str, message: str) -> errors.LraError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.LraError):
        return kind(message)
    return errors.LraError(message)


def open_folder(path: Path) -> RunFolder:
    """The run's folder: locked by process 0, looked at by the others.

    Raises:
        RunFolderError: another process holds it, or not all of this run see it.
    """
    opened: list[RunFolder] = []
    agree(lambda: opened.append(RunFolder(path)))
    folder = opened[0] if opened else Onlooker(path)
    try:
        check_shared(path)
    except BaseException:
        folder.close()
        raise
    return folder


def check_shared(path: Path) -> None:
    """Raises: RunFolderError, on all processes, where one does not see in folder `path` what process 0 puts there."""
    if jax.process_count() == 1:
        return
    token = path / agree(
        lambda: f".{secrets.token_hex(8)}.tmp"
    )  # `RunFolder` sweeps up what is left of it
    agree(token.touch)
    sees = gather(token.exists())
    agree(lambda: token.unlink(missing_ok=True))
    if not all(sees):
        number = sees.index(False)
        raise common(
            errors.RunFolderError(
                f"process {number} does not see {path} of process 0 ({path.absolute()} there, or elsewhere); output.root has "
                f"to be one folder for all of them, shared between hosts"
            )
        )


class Onlooker(RunFolder):
    """The folder as the other processes have it: they read, and write nothing."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def close(self) -> None: ...

    def write_record(self, record: Mapping[str, Any]) -> None: ...

    def append_metrics(self, row: Mapping[str, Any]) -> None: ...

    def truncate_metrics(self, step: int) -> None: ...

    def write_predictions(self, logits: Any, labels: Any, rows: Any) -> None: ...


# ---- how they end


class Ending:
    """What a process does before it ends for an error of another one; `record` writes down the error."""

    record: Callable[[BaseException], None] = staticmethod(lambda error: None)


_ending = Ending()
_leaving = threading.Lock()  # whoever has it ends this process


def common(error: Any) -> Any:
    """`error`, marked as one that every process raises at the same place."""
    error.is_common = True
    return error


def is_alone(error: BaseException | None) -> bool:
    """Whether other processes may know nothing of `error`, so that none of them may be waited for."""
    if error is None or getattr(error, "is_common", False) or not jax.distributed.is_initialized():
        return False
    return _meeting_place() is not None or jax.process_count() > 1


@contextmanager
def together() -> Iterator[Ending]:
    """Around a run: all processes leave the block together, with what is `common`, or end for what is not."""
    _ending.record = Ending.record
    try:
        yield _ending
    except BaseException as error:
        error = explained(error)
        if is_alone(error):
            _leave(error)
        _wait_for_all()
        raise
    else:
        _wait_for_all()
    finally:
        _ending.record = Ending.record  # which holds the run, and with it the data on the device


def _wait_for_all() -> None:
    """JAX's own waiting at the end has a timeout: for a tracker that still sends, say, it would be too short."""
    try:
        gather(None)
    except Exception as error:
        _leave(explained(error))


def is_lost(error: BaseException) -> bool:
    """Whether JAX says by `error` that another process of this run is gone."""
    if not jax.distributed.is_initialized() or is_out_of_memory(error):
        return False
    return isinstance(error, (RuntimeError, ValueError)) and bool(re.search(_LOST, str(error)))


def explained(error: BaseException) -> BaseException:
    """`error`, or where it says that another process is gone, what that one has said, as far as it has said anything."""
    if not (is_lost(error) and is_alone(error)):
        return error
    for _ in range(4):
        if (told := _heard()) is not None:
            return told
        time.sleep(_POLL_S / 2)
    first_line = str(error).strip().partition("\n")[0][:150]
    return errors.PreemptedError(
        f"another process of this run is gone, killed perhaps; resume=auto on all goes on from the last checkpoint, if "
        f"there is one ({first_line})"
    )


def _say_error(message: str) -> None:
    print(f"lra: error: {message}", file=sys.stderr, flush=True)


def _leave(error: BaseException) -> NoReturn:
    """End this process alone: its last line, a word to the others, and no waiting for them at JAX's way out."""
    _leaving.acquire()  # never released: a second thread that comes here waits for the end
    try:
        code = (
            error.exit_code
            if isinstance(error, errors.LraError)
            else 130
            if isinstance(error, KeyboardInterrupt)
            else 1
        )
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            message = (
                "interrupted; resume=auto on all goes on from the last checkpoint, if there is one"
            )
        elif not isinstance(error, errors.LraError):  # a bug
            traceback.print_exception(error)
        _say_error(message)
        if (place := _meeting_place()) is not None:
            channel, own = place.client, place.process_id
            where = getattr(error, "process", own)
            told = json.dumps(
                [where, type(error).__name__, message.removeprefix(f"on process {where}: ")]
            )
            with suppress(RuntimeError):  # another one was first, or the channel is gone
                channel.key_value_set(_ENDED, told)
            with suppress(RuntimeError):
                channel.key_value_set(f"{_GONE}/{own}", "")
            until = time.monotonic() + _GRACE_S
            while own == 0 and time.monotonic() < until:
                if len(channel.key_value_dir_get(_GONE)) == place.num_processes:
                    break
                time.sleep(0.05)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _meeting_place() -> Any:
    """JAX's own connection to process 0 (`client`) and who this process is; None where JAX has another form of it.

    Of these there is no public name, and jax.process_index() waits for a backend that may never start. Without them
    the others learn of an end by what they no longer receive.
    """
    try:
        from jax._src.distributed import global_state

        needed = ("key_value_set", "key_value_try_get", "key_value_dir_get")
        known = all(hasattr(global_state.client, name) for name in needed)
        return global_state if known and global_state.num_processes > 1 else None
    except (ImportError, AttributeError):
        return None


def _heard() -> errors.LraError | None:
    """What another process has ended for."""
    try:
        number, name, message = json.loads(_meeting_place().client.key_value_try_get(_ENDED))
    except (RuntimeError, AttributeError):  # nothing was said, or there is no channel
        return None
    error = _error(
        "PreemptedError" if name == "KeyboardInterrupt" else name, f"on process {number}: {message}"
    )
    error.process = number  # type: ignore[attr-defined]
    return error


def _watch() -> None:
    """Follow a process that ends, also while this one waits for it in a sum over all devices."""
    if _meeting_place() is None:
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(_POLL_S):
            if (error := _heard()) is not None:
                with suppress(Exception):
                    _ending.record(error)
                _leave(error)

    thread = threading.Thread(target=look, name="lra-hosts", daemon=True)
    thread.start()

    def stop() -> None:
        over.set()
        thread.join()

    atexit.register(
        stop
    )  # before JAX closes the channel, since what is registered last comes first
