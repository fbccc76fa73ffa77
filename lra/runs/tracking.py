"""Who is told about a run while it goes? The run's folder always; Weights & Biases as a mirror that can never hurt.

W&B lives in a process of its own (`python -m lra.runs.tracking`), fed over a socket. Whatever W&B does there (an import that
fails, a prompt, retries on a dead network, hooks on exit and Ctrl-C, a last upload), the run neither waits for it nor
dies of it: it waits at most `FINISH_S`, at its end, then leaves the mirror to finish alone, for at most `LINGER_S`.

Which mode: `off` in the config is final; else WANDB_MODE in the environment; else the config's online or offline;
`auto` is online when W&B, asked in the mirror, is not set to offline, finds a login and its server answers; offline
otherwise. Online that cannot be is offline, with a warning. Offline runs lie in <folder>/wandb; `sync_hint` is the line
that uploads them.
"""

import importlib.metadata
import importlib.util
import json
import os
import queue
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lra.runs.records import config_hash, to_json, warn

REACH_S = 2.0  # for the server's first answer
ASK_S = 30.0  # for W&B to start and say its state to `lra doctor`
FINISH_S = 4.0  # the longest a run waits for its mirror, once, at the end
LINGER_S = 600.0  # after which a mirror whose run is over gives up

_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
}
_MODES |= {"disabled": "off", "off": "off"}


class Trackers:
    """Who is told beside metrics.jsonl: nobody, or W&B's mirror. No method raises or blocks for long."""

    def __init__(self, trackers: Iterable["WandbTracker"]):
        self.trackers = list(trackers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(step, values)

    def summary(self, values: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.summary(values)

    def finish(self, status: str) -> None:
        for tracker in self.trackers:
            tracker.finish(status)

    @property
    def sync_hint(self) -> str | None:
        """The line that uploads what W&B kept offline; None where there is nothing to upload."""
        return next((tracker.sync_hint for tracker in self.trackers), None)


class WandbTracker:
    """Mirrors a run to W&B from a second process; drops W&B for this run, with one warning line, when that fails.

    Args:
        folder: the run's; W&B's files go to <folder>/wandb.
        mode: auto, online or offline.
        run: keyword arguments of `wandb.init` (project, entity, group, name, tags, config, id).
    """

    def __init__(self, folder: Path, mode: str, run: Mapping[str, Any]):
        self.folder = folder
        self._mirror: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        try:
            (folder / "wandb").mkdir(parents=True, exist_ok=True)
            run = {**run, "id": run_id(folder, run["config"])}
            self._mirror = _start_mirror(mode)
        except OSError as error:
            self._drop(f"cannot start ({error})")
        self._send({"folder": str(folder.absolute()), "mode": mode, "run": run})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._send({"step": step, "log": values})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._send({"summary": values})

    def finish(self, status: str) -> None:
        """Waits up to `FINISH_S` for the mirror to finish; it goes on alone after that."""
        self._send({"finish": status})
        if (process := self._let_go()) is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(FINISH_S)

    @property
    def sync_hint(self) -> str | None:
        """The line that uploads what was kept offline, by this run and those it resumes; None if nothing was."""
        if not list((self.folder / "wandb").glob("offline-run-*")):
            return None
        return f"wandb sync {shlex.quote(str(self.folder / 'wandb'))}/offline-run-*"

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._mirror is None:
            return
        line = json.dumps(to_json(message)).encode() + b"\n"
        try:
            if self._mirror[1].send(line, _NO_SIGNAL) < len(line):
                raise BlockingIOError("no room")
        except BlockingIOError:
            self._drop("does not keep up")
        except OSError:  # it has ended, and said why itself
            self._let_go()

    def _drop(self, reason: str) -> None:
        warn(f"W&B {reason}; this run goes on without it")
        self._let_go()

    def _let_go(self) -> "subprocess.Popen[bytes] | None":
        """Say no more to the mirror, which ends when it has done what it was told."""
        if self._mirror is None:
            return None
        (process, line), self._mirror = self._mirror, None
        line.close()
        _LET_GO.append(process)
        return process


def make_trackers(
    options: Mapping[str, Any],
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    names: Mapping[str, Any],
    seed: int,
) -> Trackers:
    """The trackers beside the run's own metrics.jsonl, as conf/tracker says; starts W&B's mirror unless it is off.

    Args:
        options: {wandb: auto | online | offline | off, project, entity, group, tags}; without a group, the seeds of one
            (task, model, protocol) form one.
        config: resolved; its hash begins the W&B id, which a resumed run keeps.
        names: task, model, protocol.
    """
    mode = wanted_mode(options["wandb"])
    if mode == "off":
        return Trackers([])
    if importlib.util.find_spec("wandb") is None:
        warn("W&B is not installed (pip install wandb); this run goes on without it")
        return Trackers([])
    group = "-".join(str(names[key]) for key in ("task", "model", "protocol"))
    run = {
        "project": options["project"],
        "entity": options["entity"],
        "group": options["group"] or group,
        "name": f"{group}-s{seed}",
        "tags": list(options["tags"]),
        "config": to_json(config),
    }
    return Trackers([WandbTracker(Path(folder), mode, run)])


def wanted_mode(option: str | bool) -> str:
    """auto, online, offline or off, from `tracker.wandb` and WANDB_MODE; an unknown WANDB_MODE changes nothing."""
    if option in ("off", False):  # YAML reads a bare off as false
        return "off"
    return _MODES.get(os.environ.get("WANDB_MODE", "").lower(), str(option))


def run_id(folder: Path, config: Mapping[str, Any]) -> str:
    """W&B's id of the run in this folder: the config's hash and a random part, written down so that resuming keeps it.

    The random part is there because W&B refuses an id it has seen deleted, and would merge two runs of one config.
    """
    path = folder / "wandb" / "id"
    if not path.exists():
        path.write_text(f"{config_hash(config)[:8]}-{secrets.token_hex(4)}\n")
    return path.read_text().strip()


def doctor_line() -> str:
    """W&B's state in one line, for `lra doctor`; asked in a process of its own, as a run's mirror would ask."""
    try:
        installed = f"wandb {importlib.metadata.version('wandb')}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install wandb); runs are recorded in their folders only"
    mode = wanted_mode("auto")
    if mode in ("off", "offline"):
        fate = "not mirrored" if mode == "off" else "mirrored offline"
        return f"{installed}, WANDB_MODE={os.environ['WANDB_MODE']}: runs are {fate}"
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "lra.runs.tracking", "doctor"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_S,
            env=_environment(mode),
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{installed}, does not start ({_brief(error)}): runs are not mirrored"
    return f"{installed}, {asked.stdout.strip()}"


def _doctor_main() -> None:
    try:
        import wandb

        server, obstacle = wandb.setup().settings.base_url, _obstacle(wandb)
    except Exception as error:
        print(f"fails ({_brief(error)}): runs are not mirrored online")
    else:
        print(
            f"{obstacle}: runs are mirrored offline"
            if obstacle
            else f"{server} answers: runs are mirrored online"
        )


def reachable(url: str) -> bool:
    """Whether the server gives any HTTP answer within `REACH_S`, through the environment's proxies.

    An open port is not enough: behind some firewalls every port opens and nothing ever answers.
    """
    answers: queue.Queue[bool] = queue.Queue()
    # a thread, since no time limit covers the look-up of a name
    threading.Thread(target=lambda: answers.put(_answers(url)), daemon=True).start()
    try:
        return answers.get(timeout=REACH_S)
    except queue.Empty:
        return False


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=REACH_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError):
        return False
    return True


# ---- the mirror: a process per run

_LET_GO: list[
    subprocess.Popen[bytes]
] = []  # kept, for Python warns when it forgets a child that still runs
_NO_SIGNAL = getattr(
    socket, "MSG_NOSIGNAL", 0
)  # a mirror that is gone must not end the run by SIGPIPE


def _start_mirror(mode: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The mirror, and the line to it.

    It gets a session of its own: Ctrl-C reaches the run alone, and the mirror hears of the end from the run.
    """
    ours, its = socket.socketpair()
    ours.setblocking(False)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", "lra.runs.tracking"],
            stdin=its.fileno(),
            stdout=subprocess.DEVNULL,
            env=_environment(mode),
            start_new_session=True,
        )
    return process, ours


def _environment(mode: str) -> dict[str, str]:
    """A second process's: it finds this package, W&B is silent there and knows no mode but ours (auto: its own)."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    rest = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    chosen = {} if mode == "auto" else {"WANDB_MODE": mode}
    return {
        **rest,
        **chosen,
        "PYTHONPATH": path,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
    }


def mirror(messages: Iterator[dict[str, Any]]) -> None:
    """Relay a run's messages to W&B until it finishes; the first message says which run, in which folder and mode."""
    start = next(messages)
    import wandb

    run = _open_run(wandb, start["run"], start["folder"], start["mode"])
    status = "failed"  # what remains true when the line closes without a last word
    for message in messages:
        if "log" in message:
            run.log(message["log"], step=message["step"])
        if "summary" in message:
            run.summary.update(message["summary"])
        if "finish" in message:
            status = message["finish"]
            break  # not the end of the line: a forked worker may hold that open
    _give_up_after(LINGER_S)
    if status == "preempted":
        run.mark_preempting()
    run.finish(exit_code=0 if status == "finished" else 1)


def _open_run(wandb: Any, run: dict[str, Any], folder: str, mode: str) -> Any:
    if mode != "offline":
        try:
            if (obstacle := _obstacle(wandb)) is None:
                return _init(wandb, run, folder, "online")
            if mode == "online":
                warn(f"W&B is {obstacle}; this run is kept offline")
        except Exception as error:
            warn(f"W&B refuses: {_brief(error)}; this run is kept offline")
            wandb.teardown()  # its service still counts the run as open
    return _init(wandb, run, folder, "offline")


def _obstacle(wandb: Any) -> str | None:
    """Why a run here cannot be online, by W&B's own settings, login and server; None if it can.

    W&B asks nobody for a key where stdin is no terminal, which holds for the mirror and the doctor's process.
    """
    settings = wandb.setup().settings
    if _MODES.get(settings.mode) != "online":
        return f"set to {settings.mode} (wandb online)"
    try:
        found = wandb.login(verify=False)  # True would wait for the server, and longer than we do
    except wandb.UsageError:
        found = False
    if not found:
        return "not logged in (wandb login)"
    if not reachable(settings.base_url):
        return f"without an answer from {settings.base_url}"
    return None


def _brief(error: Exception) -> str:
    """An error of W&B's may hold the whole page that a wrong server sent."""
    return textwrap.shorten(str(error), 160, placeholder=" ...")


def _init(wandb: Any, run: dict[str, Any], folder: str, mode: str) -> Any:
    settings = wandb.Settings(silent=True, console="off", init_timeout=30, x_stats_pid=os.getppid())
    return wandb.init(**run, dir=folder, mode=mode, resume="allow", settings=settings)


def _give_up_after(seconds: float) -> None:
    """End this process and W&B's own helpers, which are of its session, however busy they are."""
    timer = threading.Timer(seconds, os.killpg, (os.getpgid(0), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _messages() -> Iterator[dict[str, Any]]:
    """The lines on stdin, read ahead of their use: the run must never find it full."""
    lines: queue.Queue[bytes | None] = queue.Queue()

    def read() -> (
        None
    ):  # not through sys.stdin, whose lock this thread would hold when the interpreter ends
        rest = b""
        while chunk := os.read(0, 1 << 16):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)


def _mirror_main() -> None:
    try:
        mirror(_messages())
    except Exception as error:
        warn(f"W&B failed: {type(error).__name__}: {_brief(error)}; this run goes on without it")
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:] == ["doctor"]:
        _doctor_main()
    else:
        _mirror_main()
