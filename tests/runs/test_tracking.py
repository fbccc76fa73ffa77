"""W&B receives a run's metrics, and no failure of W&B changes a run or costs more than 30 s."""

import os
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from lra.runs import tracking
from lra.runs.tracking import Tracker, doctor_line, make_tracker, wanted_mode

ROOT = Path(__file__).resolve().parents[2]
KEY = "k" * 40  # well-formed, not registered
NAMES = {"task": "listops_short", "model": "stu", "protocol": "strict", "experiment": None}
CONFIG = {"seed": 0, "optim": {"lr": 1e-3}}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A user without login, settings, proxies or W&B variables; the server's port is closed."""
    for variable in list(os.environ):
        if variable.startswith(("WANDB_", "NETRC")) or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    return home


def options(wandb):
    return {"wandb": wandb, "project": "lra", "entity": None, "group": None, "tags": ["test"]}


def start(folder, wandb="auto"):
    return make_tracker(options(wandb), folder, config=CONFIG, names=NAMES, seed=0)


# ---- the installed W&B, in a process of its own

SCRIPT = """
import os, resource, signal, sys, time
from pathlib import Path
from lra.runs import tracking
from lra.runs.console import configure_logging

folder, mode, scenario = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
options = {"wandb": mode, "project": "lra", "entity": None, "group": None, "tags": ["test"]}
names = {"task": "listops_short", "model": "stu", "protocol": "strict"}
configure_logging()
tracking.INIT_S = 2.0
tracking.FINISH_S = 3.0 if scenario == "stopped" else 20.0
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
if scenario == "full disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

def services():
    children = Path("/proc/self/task").glob("*/children")
    return [int(pid) for file in children for pid in file.read_text().split()]

def track(status):
    tracker = tracking.make_tracker(options, folder, config={"seed": 0}, names=names, seed=0)
    for step in range(3):
        tracker.log(step, {"train/loss": 1.0 / (step + 1), "train/bad": float("nan")})
    if scenario == "full disk":
        tracker.log(3, {"text": "x" * 100_000})
    if scenario in ("stopped", "killed"):
        while not list(folder.glob("wandb/offline-run-*/*.wandb")):
            time.sleep(0.05)
        for pid in services():
            os.kill(pid, signal.SIGSTOP if scenario == "stopped" else signal.SIGKILL)
        tracker.log(4, {"x": 1.0})
    tracker.summary({"test/accuracy": 0.4321})
    tracker.finish(status)
    return tracker

tracker = track("preempted" if scenario == "resumed" else "finished")
if scenario == "resumed":
    time.sleep(1)  # W&B names folders by the second
    tracker = track("finished")
assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print(tracker.sync_hint)
"""


def run_script(folder, mode, scenario="plain"):
    """Runs `SCRIPT`; returns (warnings, stdout, seconds)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    command = [sys.executable, "-c", SCRIPT, str(folder), mode, scenario]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines(), done.stdout.strip(), time.perf_counter() - begin


def offline_logs(folder):
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def test_without_an_account_runs_are_kept_offline_and_a_resumed_run_keeps_its_id(tmp_path):
    folder = tmp_path / "a run"
    warnings, hint, _ = run_script(folder, "auto", "resumed")
    assert warnings == []
    assert hint == f"wandb sync '{folder}/wandb'/offline-run-*"
    first, second = offline_logs(folder)
    assert first.name == second.name
    for word in (b"train/loss", b"test/accuracy", b"0.4321", b"listops_short-stu-strict-s0"):
        assert word in second.read_bytes()


def test_a_server_that_never_answers_costs_seconds_and_the_run_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as server:  # connects, never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        (warning,), hint, seconds = run_script(tmp_path, "auto")
    assert warning.startswith("lra: warning: W&B is offline: CommError")
    assert len(warning) < 300
    assert "offline-run-*" in hint
    assert b"0.4321" in offline_logs(tmp_path)[0].read_bytes()
    assert seconds < 30


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("scenario", "message"), [("stopped", "did not finish within 3 s"), ("killed", "W&B failed")]
)
def test_a_service_process_that_hangs_or_dies_is_one_warning(tmp_path, scenario, message):
    (warning,), _, seconds = run_script(tmp_path, "offline", scenario)
    assert message in warning
    assert seconds < 30


def test_a_full_disk_does_not_stop_the_run(tmp_path):
    warnings, _, seconds = run_script(tmp_path, "offline", "full disk")
    assert len(warnings) <= 1
    assert seconds < 30


HANGING = """
import os, pathlib, time
tried = pathlib.Path(os.environ["TRIED"])
if tried.exists() or os.environ["WHEN"] == "first":
    tried.write_text(str(os.getpid()))
    time.sleep(1000)
tried.touch()
def setup():
    import wandb.missing  # waits for the import that hangs
"""


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("first", "W&B failed: TimeoutError: import wandb takes longer than 1 s"),
        ("second", "W&B did not finish within 1 s"),
    ],
)
def test_an_import_that_hangs_is_one_warning_and_leaves_no_process(
    tmp_path, monkeypatch, when, message
):
    (tmp_path / "wandb.py").write_text(HANGING)
    monkeypatch.setenv("TRIED", str(tmp_path / "pid"))
    monkeypatch.setenv("WHEN", when)
    code = f"""
import sys
from pathlib import Path
from lra.runs import tracking
from lra.runs.console import configure_logging
configure_logging()
tracking.IMPORT_S, tracking.FINISH_S = 1, {20.0 if when == "first" else 1.0}
tracker = tracking.make_tracker(
    {options("auto")}, Path({str(tmp_path)!r}), config={CONFIG}, names={NAMES}, seed=0
)
tracker.log(1, dict(x=1.0))
tracker.finish("finished")
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert message in warning
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ---- a fake W&B


class FakeWandb(types.ModuleType):
    """Records calls. `fails` and `hangs` name methods that raise and that block until `release`."""

    def __init__(self, *, login=True, fails=(), hangs=()):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()
        self.settings = types.SimpleNamespace(mode="online", base_url="http://127.0.0.1:9")
        self.has_login, self.fails, self.hangs = login, fails, hangs
        self.calls, self.summary, self.release = [], {}, threading.Event()
        self.summary = types.SimpleNamespace(update=lambda x: self.record("summary", x))

    def record(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.hangs:
            self.release.wait(30)
        if name in self.fails:
            raise RuntimeError(f"bad\n{name}")

    def Settings(self, **settings):
        assert settings["silent"]
        return settings

    def setup(self):
        self.record("setup")
        return self

    def login(self, *, verify, prompt):
        assert not prompt
        self.record("login", verify)
        return self.has_login

    def init(self, *, mode, resume, **run):
        assert resume == "allow"
        self.record(f"init {mode}")
        return self

    def log(self, values, step):
        self.record("log", step, values)

    def mark_preempting(self):
        self.record("mark_preempting")

    def finish(self, exit_code):
        self.record("finish", exit_code)

    def teardown(self):
        self.record("teardown")

    def names(self):
        return [name for name, *_ in self.calls if name not in ("setup", "login", "teardown")]


@pytest.fixture
def fake(monkeypatch):
    """Installs a fake W&B; blocked calls return at the end of the test."""
    made = []

    def install(**options):
        made.append(FakeWandb(**options))
        monkeypatch.setitem(sys.modules, "wandb", made[-1])
        return made[-1]

    yield install
    for wandb in made:
        wandb.release.set()


@pytest.mark.parametrize(
    ("status", "last"),
    [
        ("finished", [("finish", 0)]),
        ("diverged", [("finish", 1)]),
        ("failed", [("finish", 1)]),
        ("preempted", [("mark_preempting",), ("finish", 1)]),
    ],
)
def test_metrics_summary_and_status_arrive_in_order(tmp_path, fake, status, last):
    wandb = fake()
    tracker = start(tmp_path)
    tracker.log(3, {"x": 1.0, "bad": float("nan")})
    tracker.summary({"accuracy": 0.5})
    tracker.finish(status)
    sent = [call for call in wandb.calls if call[0] not in ("setup", "login", "teardown")]
    assert sent == [
        ("init online",),
        ("log", 3, {"x": 1.0, "bad": None}),
        ("summary", {"accuracy": 0.5}),
        *last,
    ]


@pytest.mark.parametrize(
    ("mode", "options", "inits", "warning"),
    [
        ("auto", {}, ["init online"], None),
        ("offline", {}, ["init offline"], None),
        ("auto", {"login": False}, ["init offline"], None),
        ("online", {"login": False}, ["init offline"], "not logged in (wandb login)"),
        ("auto", {"fails": ["init online"]}, ["init online", "init offline"], "bad init online"),
        ("auto", {"fails": ["login"]}, ["init offline"], "bad login"),
    ],
)
def test_a_failed_online_start_is_offline(tmp_path, fake, caplog, mode, options, inits, warning):
    wandb = fake(**options)
    start(tmp_path, mode).finish("finished")
    assert [name for name in wandb.names() if name.startswith("init")] == inits
    assert wandb.calls[-2:] == [("finish", 0), ("teardown",)]
    assert len(caplog.messages) == (warning is not None)
    assert warning is None or warning in caplog.text


@pytest.mark.parametrize("call", ["init offline", "log", "summary", "finish", "mark_preempting"])
def test_an_error_in_any_call_is_one_warning(tmp_path, fake, caplog, call):
    fake(fails=[call])
    tracker = start(tmp_path, "offline")
    for step in range(50):
        tracker.log(step, {"x": 1.0})
    tracker.summary({"y": 1.0})
    tracker.finish("preempted")
    assert caplog.messages == [f"W&B failed: RuntimeError: bad {call}; this run goes on without it"]


@pytest.mark.parametrize("call", ["login", "init online", "log", "finish"])
def test_a_call_that_hangs_costs_the_run_only_the_limit(tmp_path, fake, caplog, monkeypatch, call):
    monkeypatch.setattr(tracking, "FINISH_S", 0.2)
    fake(hangs=[call])
    begin = time.perf_counter()
    tracker = start(tmp_path)
    for step in range(5000):
        tracker.log(step, {"some/quite/long/name/of/a/metric": 1.0})
    tracker.finish("finished")
    assert time.perf_counter() - begin < 5
    assert caplog.messages == ["W&B did not finish within 0.2 s; this run ends without it"]


def test_finish_waits_no_longer_than_the_run_may(tmp_path, fake, caplog):
    fake(hangs=["finish"])
    tracker = start(tmp_path)
    assert tracker.sync_hint is None
    begin = time.perf_counter()
    tracker.finish("finished", 0.1)
    assert time.perf_counter() - begin < tracking.KILL_S + 5
    assert caplog.messages == ["W&B did not finish within 0.1 s; this run ends without it"]


@pytest.mark.parametrize("call", ["log", "finish"])
def test_an_online_run_that_was_cut_off_can_be_uploaded_later(tmp_path, fake, monkeypatch, call):
    monkeypatch.setattr(tracking, "FINISH_S", 0.2)
    fake(**({"fails": [call]} if call == "log" else {"hangs": [call]}))
    tracker = start(tmp_path)
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "run-1" / "run-1.wandb").touch()
    assert tracker.sync_hint is None
    tracker.log(0, {"x": 1.0})
    tracker.finish("finished")
    assert tracker.sync_hint == f"wandb sync {tmp_path}/wandb/run-*"


def test_the_limits_sum_to_less_than_thirty_seconds():
    assert tracking.INIT_S + tracking.UPLOAD_S <= tracking.FINISH_S < 30


def test_an_import_error_is_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb.py").write_text("raise ImportError('no protobuf\\nhere')\n")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    start(tmp_path / "run").finish("finished")
    assert caplog.messages == [
        "W&B failed: ImportError: no protobuf here; this run goes on without it"
    ]


def test_a_wandb_that_is_not_installed_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    tracker = start(tmp_path)
    tracker.finish("finished")
    assert type(tracker) is Tracker
    assert tracker.sync_hint is None
    assert "W&B is not installed" in caplog.text
    assert len(caplog.messages) == 1


def test_a_folder_that_takes_no_files_is_one_warning(tmp_path, fake, caplog):
    fake()
    (tmp_path / "wandb").write_text("in the way")
    tracker = start(tmp_path)
    tracker.log(0, {"x": 1.0})
    tracker.finish("finished")
    assert len(caplog.messages) == 1
    assert "W&B failed: FileExistsError" in caplog.text


def test_off_writes_nothing(tmp_path, monkeypatch, fake):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb = fake()
    start(tmp_path / "run", "off").finish("finished")
    assert wandb.calls == []
    assert not (tmp_path / "run").exists()


def test_a_new_run_has_its_own_id(tmp_path):
    ids = []
    for name in ("a", "a", "b"):
        (tmp_path / name / "wandb").mkdir(parents=True, exist_ok=True)
        ids.append(tracking.run_id(tmp_path / name, CONFIG))
    assert ids[0] == ids[1] != ids[2]
    assert ids[0][:8] == ids[2][:8]  # the config's hash


@pytest.mark.parametrize(
    ("option", "environment", "mode"),
    [
        ("auto", None, "auto"),
        ("online", "offline", "offline"),
        ("offline", "online", "online"),
        ("auto", "disabled", "off"),
        ("auto", "dryrun", "offline"),
        ("online", "nonsense", "off"),
        ("off", "online", "off"),
        (False, None, "off"),
    ],
)
def test_the_environment_overrides_every_option_but_off(
    monkeypatch, caplog, option, environment, mode
):
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wanted_mode(option) == mode
    assert ("WANDB_MODE=nonsense is unknown" in caplog.text) == (environment == "nonsense")


# ---- lra doctor


def test_doctor_names_the_state_that_a_run_would_have(monkeypatch, fake):
    wandb = fake()
    assert doctor_line().endswith(", logged in to http://127.0.0.1:9: runs are mirrored online")
    assert ("login", True) in wandb.calls  # verified by the server
    wandb.settings.mode = "offline"
    assert doctor_line().endswith(", set to offline (wandb online): runs are mirrored offline")
    fake(login=False)
    assert doctor_line().endswith(", not logged in (wandb login): runs are mirrored offline")
    fake(fails=["login"])
    assert "fails (RuntimeError: bad login): runs are not mirrored online" in doctor_line()
    monkeypatch.setattr(tracking, "DOCTOR_S", 0.1)
    fake(hangs=["login"])
    assert doctor_line().endswith("no answer within 0.1 s: runs are not mirrored online")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor_line().endswith(", WANDB_MODE=offline: runs are mirrored offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert doctor_line().endswith(", WANDB_MODE=disabled: runs are not mirrored")


def test_doctor_reads_the_login_and_settings_of_wandb(home):
    (home / ".config" / "wandb").mkdir(parents=True)
    code = "from lra.runs.tracking import doctor_line; print(doctor_line())"

    def line():
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    assert line().endswith(", not logged in (wandb login): runs are mirrored offline")
    (home / ".config" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert line().endswith(", set to offline (wandb online): runs are mirrored offline")
