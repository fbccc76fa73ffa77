"""Mirrors a run to Weights & Biases (W&B); the run folder stays the source of truth.

All calls into W&B happen on one daemon thread. The run only appends to the queue of that thread,
so a slow, failing or hanging W&B costs nothing until `finish`, which waits a limited time and then
ends W&B's service process. Any error of W&B becomes one warning.

Mode: `tracker.wandb=off` is final, then WANDB_MODE, then `tracker.wandb`. `auto` is online with a
login and a server that accepts the run, otherwise offline; a failed online start falls back to it.
Offline runs are in <folder>/wandb; `sync_hint` is the command that uploads them.
"""

import importlib.metadata
import importlib.util
import logging
import math
import os
import queue
import secrets
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lra.runs.records import config_hash, to_json

log = logging.getLogger(__name__)

IMPORT_S = 60  # limit for `import wandb`, which may hang on a file system that does not answer
INIT_S = 10.0  # W&B's limit for starting an online run
UPLOAD_S = 10.0  # W&B's limit for uploading what is left at the end of a run
FINISH_S = 20.0  # the longest that `finish` waits, covers the two limits above
KILL_S = 1.0  # limit for ending W&B's service process
DOCTOR_S = 30.0  # for the state that `lra doctor` prints

_MODES = dict.fromkeys(("online", "run", "shared"), "online")
_MODES |= dict.fromkeys(("offline", "dryrun"), "offline")
_MODES |= dict.fromkeys(("disabled", "off"), "off")


class Tracker:
    """Receives a run's metrics, final values and status. This one discards them."""

    sync_hint: str | None = None

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def finish(self, status: str, seconds: float = math.inf) -> None:
        """Sends the status; waits for what is left, at most `seconds` and `FINISH_S`."""


class WandbTracker(Tracker):
    """Mirrors a run to W&B, in <folder>/wandb. No method raises; only `finish` waits.

    `mode` is auto, online or offline; `run` holds keyword arguments of `wandb.init`.
    """

    def __init__(self, folder: Path, mode: str, run: Mapping[str, Any]):
        self.folder = folder
        self._ended = False  # whether `finish` has given up on W&B
        self._failed = False  # whether W&B failed or was ended, so that a server lacks values
        self._imported = False
        self._shared = False  # whether the service belongs to a W&B run of the calling program
        self._calls: queue.SimpleQueue[Callable[[Any], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._mirror, args=(mode, run), daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        values = to_json(values)
        self._calls.put(lambda run: run.log(values, step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        values = to_json(values)
        self._calls.put(lambda run: run.summary.update(values))

    def finish(self, status: str, seconds: float = math.inf) -> None:
        seconds = min(seconds, FINISH_S)
        if status == "preempted":
            self._calls.put(lambda run: run.mark_preempting())
        self._calls.put(lambda run: run.finish(exit_code=0 if status == "finished" else 1))
        self._calls.put(None)
        try:
            self._thread.join(seconds)
        finally:  # also after Ctrl-C
            if self._thread.is_alive():
                self._ended = self._failed = True
                log.warning("W&B did not finish within %.3g s; this run ends without it", seconds)
                self._kill_service()

    @property
    def sync_hint(self) -> str | None:  # type: ignore[override]
        """The command that uploads what the server lacks from this folder; None without any."""
        folder = self.folder / "wandb"
        names = ["offline-run-*", *(["run-*"] if self._failed else [])]
        found = [name for name in names if any(folder.glob(f"{name}/*.wandb"))]
        paths = [f"{shlex.quote(str(folder))}/{name}" for name in found]
        return f"wandb sync {' '.join(paths)}" if paths else None

    def _mirror(self, mode: str, run: Mapping[str, Any]) -> None:
        try:
            (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
            run = {**run, "id": run_id(self.folder, run["config"]), "dir": str(self.folder)}
            wandb = _import_wandb()
            self._imported = True
            self._shared = "WANDB_SERVICE" in os.environ
            wandb_run = _open_run(wandb, mode, run)
            while (call := self._calls.get()) is not None:
                call(wandb_run)
            if not self._shared:
                wandb.teardown()
        except BaseException as error:  # W&B also calls sys.exit
            self._failed = True
            if not self._ended:
                log.warning("W&B failed: %s; this run goes on without it", _brief(error))
                self._kill_service()

    def _kill_service(self) -> None:
        """Ends W&B's service process, which W&B's exit hook would wait for without a limit."""
        if self._shared or not self._imported:
            return

        def kill() -> None:
            with suppress(BaseException):  # such as AttributeError without a service
                wandb = sys.modules["wandb"]
                wandb.setup()._connection._proc._process.kill()  # W&B has no public call for this
                wandb.teardown()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        killer.join(KILL_S)


def make_tracker(
    options: Mapping[str, Any],
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    names: Mapping[str, Any],
    seed: int,
) -> Tracker:
    """The tracker that conf/tracker selects, started.

    Args:
        options: {wandb, project, entity, group, tags}; the default group is the seeds of one
            (task, model, protocol).
        config: resolved.
        names: task, model, protocol.
    """
    mode = wanted_mode(options["wandb"])
    if mode == "off":
        return Tracker()
    if importlib.util.find_spec("wandb") is None:
        log.warning("W&B is not installed (pip install wandb); this run goes on without it")
        return Tracker()
    group = "-".join(str(names[key]) for key in ("task", "model", "protocol"))
    run = {
        "project": options["project"],
        "entity": options["entity"],
        "group": options["group"] or group,
        "name": f"{group}-s{seed}",
        "tags": list(options["tags"]),
        "config": to_json(config),
    }
    return WandbTracker(Path(folder).absolute(), mode, run)


def wanted_mode(option: str | bool) -> str:
    """auto, online, offline or off, from `tracker.wandb` and WANDB_MODE."""
    if option in ("off", False):  # YAML reads a bare off as false
        return "off"
    variable = os.environ.get("WANDB_MODE", "").lower()
    if variable and variable not in _MODES:
        log.warning("WANDB_MODE=%s is unknown; W&B is off", variable)
        return "off"
    return _MODES.get(variable, str(option))


def run_id(folder: Path, config: Mapping[str, Any]) -> str:
    """W&B's id of the run in `folder`, stored there so that a resumed run keeps it."""
    path = folder / "wandb" / "id"
    if not path.exists():  # with a random part, because W&B refuses the id of a deleted run
        path.write_text(f"{config_hash(config)[:8]}-{secrets.token_hex(4)}\n")
    return path.read_text().strip()


def doctor_line() -> str:
    """W&B's state in one line, for `lra doctor`."""
    try:
        installed = f"wandb {importlib.metadata.version('wandb')}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install wandb); runs are recorded in their folders only"
    mode = wanted_mode("auto")
    if mode in ("off", "offline"):
        kept = "not mirrored" if mode == "off" else "mirrored offline"
        return f"{installed}, WANDB_MODE={os.environ['WANDB_MODE']}: runs are {kept}"
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_online_state()), daemon=True).start()
    try:
        return f"{installed}, {answers.get(timeout=DOCTOR_S)}"
    except queue.Empty:
        return f"{installed}, no answer within {DOCTOR_S:g} s: runs are not mirrored online"


def _online_state() -> str:
    try:
        wandb = _import_wandb()
        if obstacle := _obstacle(wandb, verify=True):
            return f"{obstacle}: runs are mirrored offline"
        return f"logged in to {wandb.setup().settings.base_url}: runs are mirrored online"
    except Exception as error:
        return f"fails ({_brief(error)}): runs are not mirrored online"


def _import_wandb() -> Any:
    for name, value in {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        os.environ.setdefault(name, value)
    if "wandb" not in sys.modules and hasattr(signal, "alarm"):  # missing on Windows
        # Another process tries first: an import that hangs here would hold Python's import lock, so
        # that the run would hang at its next import or at its exit.
        code = f"import signal; signal.alarm({IMPORT_S}); import wandb"
        null = subprocess.DEVNULL
        trial = subprocess.run([sys.executable, "-P", "-c", code], stdout=null, stderr=null)
        if trial.returncode == -signal.SIGALRM:
            raise TimeoutError(f"import wandb takes longer than {IMPORT_S} s")
    import wandb

    return wandb


def _open_run(wandb: Any, mode: str, run: Mapping[str, Any]) -> Any:
    # create_new leaves a W&B run of the calling program alone
    limits = {"init_timeout": INIT_S, "finish_timeout": UPLOAD_S}
    settings = wandb.Settings(silent=True, console="off", reinit="create_new", **limits)
    if mode != "offline":
        try:
            if (obstacle := _obstacle(wandb)) is None:
                return wandb.init(**run, mode="online", resume="allow", settings=settings)
            if mode == "online":
                log.warning("W&B is %s; this run is kept offline", obstacle)
        except Exception as error:
            log.warning("W&B is offline: %s; this run is kept in its folder", _brief(error))
            wandb.teardown()  # the service would refuse the id of a run that it failed to start
    return wandb.init(**run, mode="offline", resume="allow", settings=settings)


def _obstacle(wandb: Any, *, verify: bool = False) -> str | None:
    """The reason in W&B's settings or login that rules out online runs; None without one.

    `verify` also logs in to the server, which may take 10 s.
    """
    mode = wandb.setup().settings.mode
    if _MODES.get(mode) != "online":
        return f"set to {mode} (wandb online)"
    if not wandb.login(verify=verify, prompt=False):
        return "not logged in (wandb login)"
    return None


def _brief(error: BaseException) -> str:
    """The error in one line of at most 160 characters; a wrong server may send a whole page."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
