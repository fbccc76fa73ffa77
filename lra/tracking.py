"""Who is told about a run while it goes? The run's folder always; Weights & Biases as a mirror that can never hurt.

W&B lives in a process of its own (`python -m lra.tracking`), fed over a socket. Whatever W&B does there (an import that
fails, a prompt, retries on a dead network, hooks on exit and Ctrl-C, a last upload), the run neither waits for it nor
dies of it: it waits at most `FINISH_S`, at its end, then leaves the mirror to finish alone, for at most `LINGER_S`.

Which mode: `off` in the config is final; else WANDB_MODE in the environment; else the config's online or offline;
`auto` is online when W&B finds a login and its server answers, offline otherwise. Online that cannot be is offline,
with a warning. Offline runs lie in <folder>/wandb; `sync_hint` is the line that uploads them.
"""

import configparser
import importlib.metadata
import importlib.util
import json
import netrc
import os
import queue
import re
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
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from lra.errors import ConfigError
from lra.records import RunFolder, config_hash, to_json, warn

REACH_S = 2.0  # for the server's first answer
FINISH_S = 4.0  # the longest a run waits for its mirror, once, at the end
LINGER_S = 600.0  # after which a mirror whose run is over gives up

_MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline"}
_MODES |= {"disabled": "off", "off": "off"}


@runtime_checkable
class Tracker(Protocol):
    """What the training loop tells about itself. No method raises or blocks for long."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def finish(self, status: str) -> None: ...


class JsonlTracker:
    """Writes metrics.jsonl. The summary and the status are record.json's, which the trainer writes itself."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.folder.append_metrics({"step": step, **values})

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class Trackers:
    """Tells each of several trackers the same."""

    def __init__(self, trackers: Iterable[Tracker]):
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
        return next((tracker.sync_hint for tracker in self.trackers if isinstance(tracker, WandbTracker)), None)


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
            self._mirror = _start_mirror()
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
    options: Mapping[str, Any], folder: str | Path, *, config: Mapping[str, Any], names: Mapping[str, Any], seed: int
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
    """auto, online, offline or off, from the config's word and WANDB_MODE; an unknown WANDB_MODE changes nothing.

    Raises:
        ConfigError: the config's word is none of these.
    """
    if option in ("off", False):  # YAML reads a bare off as false
        return "off"
    if option not in ("auto", "online", "offline"):
        raise ConfigError(f"tracker.wandb={option} is unknown; choose auto, online, offline or off")
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
    """W&B's state in one line, for `lra doctor`; takes at most `REACH_S`."""
    try:
        installed = f"wandb {importlib.metadata.version('wandb')}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install wandb); runs are recorded in their folders only"
    login, environment = find_login(), os.environ.get("WANDB_MODE")
    forced = f", WANDB_MODE={environment} decides" if environment else ""
    if login is None:
        return f"{installed}, not logged in (wandb login): runs are mirrored offline{forced}"
    answers = reachable(server())
    mode = "answers: runs are mirrored online" if answers else "does not answer: runs are mirrored offline"
    return f"{installed}, logged in by {login}, {server()} {mode}{forced}"


# ---- what W&B itself would find, without the second its import takes


def server() -> str:
    """URL of the W&B server: WANDB_BASE_URL, else W&B's settings files, else the installed version's default."""
    return (os.environ.get("WANDB_BASE_URL") or _settings().get("base_url") or _default_server()).rstrip("/")


def find_login() -> str | None:
    """Where W&B's login is found, in W&B's own order (environment, netrc, settings files), or None."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    path = _netrc_path()
    hosts = {urlsplit(server()).netloc}
    if server() == _default_server():
        hosts.add("api.wandb.ai")  # the default before it moved; W&B still takes logins under this name
    try:
        logins = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        logins = None
    if logins and any((entry := logins.authenticators(host)) and entry[2] for host in hosts):
        return str(path)
    return "W&B's settings file" if _settings().get("api_key") else None


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


def _default_server() -> str:
    """Read from W&B's source, for it has changed between versions."""
    spec = importlib.util.find_spec("wandb")
    source = Path(spec.origin).parent / "sdk" / "lib" / "urls.py" if spec and spec.origin else None
    text = source.read_text() if source and source.exists() else ""
    found = re.search(r'^DEFAULT_BASE_URL\s*=\s*"([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "https://api.wandb.ai"


def _settings() -> dict[str, str]:
    """W&B's settings files, those of the working folder over the user's; {} where there are none."""
    root = Path(os.environ.get("WANDB_DIR") or ".")
    shared = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([shared / "settings", root / "wandb" / "settings", root / ".wandb" / "settings"])
        return dict(parser.items("default"))
    except (OSError, configparser.Error):
        return {}


def _netrc_path() -> Path:
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    paths = [Path(name).expanduser() for name in candidates]
    return next((path for path in paths if path.exists()), paths[0])


# ---- the mirror: a process per run

_LET_GO: list[subprocess.Popen[bytes]] = []  # kept, for Python warns when it forgets a child that still runs
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a mirror that is gone must not end the run by SIGPIPE


def _start_mirror() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The mirror, and the line to it.

    It gets a session of its own: Ctrl-C reaches the run alone, and the mirror hears of the end from the run.
    """
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    ours, its = socket.socketpair()
    ours.setblocking(False)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", "lra.tracking"],
            stdin=its.fileno(),
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"},
            start_new_session=True,
        )
    return process, ours


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
    if mode == "online" and find_login() is None:
        warn("W&B is not logged in (wandb login); this run is kept offline")
    elif mode == "online" and not reachable(server()):
        warn(f"W&B's server {server()} does not answer; this run is kept offline")
    elif mode == "online" or (mode == "auto" and find_login() and _settings_allow() and reachable(server())):
        try:
            return _init(wandb, run, folder, "online")
        except Exception as error:
            warn(f"W&B refuses: {_brief(error)}; this run is kept offline")
            wandb.teardown()  # its service still counts the run as open
    return _init(wandb, run, folder, "offline")


def _brief(error: Exception) -> str:
    """An error of W&B's may hold the whole page that a wrong server sent."""
    return textwrap.shorten(str(error), 160, placeholder=" ...")


def _settings_allow() -> bool:
    """`wandb offline` and `wandb disabled` are remembered in the settings files."""
    return _MODES.get(_settings().get("mode", "online")) == "online" and _settings().get("disabled") != "true"


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

    def read() -> None:  # not through sys.stdin, whose lock this thread would hold when the interpreter ends
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
    _mirror_main()
