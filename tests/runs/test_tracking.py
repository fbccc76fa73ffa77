"""Does W&B get what it should, and is a run unharmed by what W&B does? Where it matters, with the real W&B, offline."""

import os
import socket
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lra.runs import tracking
from lra.runs.tracking import Trackers, WandbTracker, doctor_line, make_trackers, wanted_mode

ROOT = Path(__file__).resolve().parents[2]
KEY = "k" * 40  # of the right form, opens nothing
NAMES = {"task": "listops_short", "model": "stu", "protocol": "strict", "experiment": None}
CONFIG = {"seed": 0, "optim": {"lr": 1e-3}}


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without login, settings, proxies or W&B variables, and a server that is a closed port here."""
    for variable in list(os.environ):
        if (
            variable.startswith("WANDB_")
            or variable.lower().endswith("_proxy")
            or variable == "NETRC"
        ):
            monkeypatch.delenv(variable)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield home
    for process in tracking._LET_GO:
        process.kill()
        process.wait()
    tracking._LET_GO.clear()


@pytest.fixture
def silent_server(monkeypatch):
    """A server whose port opens and that never answers; connections it has seen."""
    listener, seen = socket.create_server(("127.0.0.1", 0)), []

    def accept():
        while True:
            try:
                seen.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    yield seen
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    for connection in seen:
        connection.close()


@pytest.fixture
def answering_server(monkeypatch):
    """A server that answers whatever is asked, and is not W&B's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), NotWandb)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class NotWandb(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def options(wandb):
    return {"wandb": wandb, "project": "lra", "entity": None, "group": None, "tags": ["test"]}


def wait_for_the_mirror():
    for process in tracking._LET_GO:
        process.wait(60)


def a_run(folder, wandb, steps=3):
    """Track a short run; returns the trackers and the seconds that the run spent on them."""
    start = time.perf_counter()
    trackers = make_trackers(options(wandb), folder, config=CONFIG, names=NAMES, seed=0)
    for step in range(steps):
        trackers.log(step, {"train/loss": 1.0 / (step + 1), "train/bad": float("nan")})
    trackers.summary({"test/accuracy": 0.4321})
    trackers.finish("finished")
    seconds = time.perf_counter() - start
    wait_for_the_mirror()
    return trackers, seconds


def kept_offline(folder):
    """The bytes of W&B's own log of each offline run in the folder."""
    return [path.read_bytes() for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def test_an_offline_run_lies_in_the_folder_and_can_be_uploaded_later(tmp_path, capfd):
    trackers, seconds = a_run(tmp_path / "a run", "offline")
    assert seconds < tracking.FINISH_S + 1
    (log,) = kept_offline(tmp_path / "a run")
    for word in (b"train/loss", b"test/accuracy", b"0.4321", b"listops_short-stu-strict-s0"):
        assert word in log
    assert trackers.sync_hint == f"wandb sync '{tmp_path}/a run/wandb'/offline-run-*"
    assert capfd.readouterr() == ("", "")  # quiet, as W&B is not by itself


def test_wandb_is_not_imported_for_the_asking():
    code = "import sys, lra.runs.tracking as t; t.doctor_line(); sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_resumed_run_keeps_its_id_and_a_new_one_has_its_own(tmp_path):
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "wandb").mkdir(exist_ok=True)
    first = tracking.run_id(tmp_path / "a", CONFIG)
    assert tracking.run_id(tmp_path / "a", CONFIG) == first
    other = tracking.run_id(tmp_path / "b", CONFIG)
    assert other != first
    assert other[:8] == first[:8]


def test_two_sessions_of_one_run_are_one_run_to_wandb(tmp_path):
    a_run(tmp_path, "offline")
    time.sleep(1)  # W&B names a session's folder by the second
    trackers, _ = a_run(tmp_path, "offline")
    first, second = (path.name for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    assert first == second
    assert trackers.sync_hint is not None


def test_a_login_without_a_network_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    _, seconds = a_run(tmp_path, "auto")
    assert seconds < tracking.FINISH_S + 1
    assert len(kept_offline(tmp_path)) == 1


def test_a_server_that_never_answers_costs_the_run_nothing(tmp_path, monkeypatch, silent_server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    start = time.perf_counter()
    trackers = make_trackers(options("auto"), tmp_path, config=CONFIG, names=NAMES, seed=0)
    trackers.log(0, {"train/loss": 1.0})
    assert time.perf_counter() - start < 1
    trackers.finish("preempted")
    assert time.perf_counter() - start < tracking.FINISH_S + 2
    wait_for_the_mirror()
    assert silent_server, "nobody asked the server"
    assert len(kept_offline(tmp_path)) == 1


def test_a_server_that_is_not_wandb_is_one_warning(tmp_path, monkeypatch, capfd, answering_server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    _, seconds = a_run(tmp_path, "auto")
    assert seconds < tracking.FINISH_S + 1
    (line,) = capfd.readouterr().err.splitlines()
    assert len(line) < 300
    assert line.startswith("lra: warning: W&B refuses: ")
    assert line.endswith("; this run is kept offline")
    assert len(kept_offline(tmp_path)) == 1


def test_online_without_a_login_warns_and_keeps_the_run_offline(tmp_path, capfd):
    a_run(tmp_path, "online")
    assert "W&B is not logged in (wandb login)" in capfd.readouterr().err
    assert len(kept_offline(tmp_path)) == 1


def test_a_key_of_the_wrong_form_is_one_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    a_run(tmp_path, "auto")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lra: warning: W&B refuses: WANDB_API_KEY invalid")
    assert len(kept_offline(tmp_path)) == 1


@pytest.mark.parametrize(("option", "warnings"), [("auto", 0), ("online", 1)])
def test_the_mirror_knows_no_mode_but_ours(tmp_path, nobody, monkeypatch, capfd, option, warnings):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "nonsense")  # W&B would refuse to start
    wandb_says(nobody, "mode = offline")
    a_run(tmp_path / "run", option)
    lines = capfd.readouterr().err.splitlines()
    warning = (
        "lra: warning: W&B is without an answer from http://127.0.0.1:9; this run is kept offline"
    )
    assert lines == [warning] * warnings
    assert len(kept_offline(tmp_path / "run")) == 1


def test_a_wandb_that_cannot_be_imported_is_one_warning(tmp_path, monkeypatch, capfd):
    package = tmp_path / "broken" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no protobuf\\nhere')\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    a_run(tmp_path / "run", "offline", steps=50)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "lra: warning: W&B failed: ImportError: no protobuf here; this run goes on without it"
    ]


def test_a_wandb_that_is_not_installed_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    trackers, _ = a_run(tmp_path, "auto")
    assert capsys.readouterr().err.count("W&B is not installed") == 1
    assert trackers.sync_hint is None


def start_instead(monkeypatch, code):
    """Give the next tracker another process than the mirror."""

    def start(mode):
        ours, its = socket.socketpair()
        ours.setblocking(False)
        with its:
            return subprocess.Popen([sys.executable, "-c", code], stdin=its.fileno()), ours

    monkeypatch.setattr(tracking, "_start_mirror", start)


DIES = """
import signal, sys
from pathlib import Path
from lra import tracking
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as command-line tools do; a closed pipe then kills
tracker = tracking.WandbTracker(Path(sys.argv[1]), "offline", {"config": {}})
process, _ = tracker._mirror
process.kill()
process.wait()
for step in range(10):
    tracker.log(step, {"x": 1.0})
tracker.finish("finished")
print("goes on")
"""


def test_a_mirror_that_dies_takes_nothing_with_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")


def test_a_mirror_that_hangs_is_dropped_with_a_warning(tmp_path, monkeypatch, capsys):
    start_instead(monkeypatch, "import time; time.sleep(60)")
    start = time.perf_counter()
    tracker = WandbTracker(tmp_path, "offline", {"config": CONFIG})
    for step in range(5000):
        tracker.log(step, {"some/quite/long/name/of/a/metric": 1.0})
    tracker.finish("finished")
    assert time.perf_counter() - start < 5
    assert capsys.readouterr().err.count("does not keep up") == 1


def test_off_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    a_run(tmp_path / "run", "off")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "environment", "mode"),
    [
        ("auto", None, "auto"),
        ("online", "offline", "offline"),
        ("offline", "online", "online"),
        ("auto", "disabled", "off"),
        ("auto", "dryrun", "offline"),
        ("online", "nonsense", "online"),
        ("off", "online", "off"),
        (False, None, "off"),
    ],
)
def test_the_environment_wins_over_all_but_off(monkeypatch, option, environment, mode):
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wanted_mode(option) == mode


def test_a_folder_that_takes_no_files_is_one_warning(tmp_path, capsys):
    (tmp_path / "wandb").write_text("in the way")
    tracker = WandbTracker(tmp_path, "offline", {"config": CONFIG})
    tracker.log(0, {"x": 1.0})
    tracker.finish("finished")
    assert capsys.readouterr().err.count("W&B cannot start") == 1


def wandb_says(home, line):
    """One line of the user's W&B settings, as `wandb offline` and `wandb login` write them."""
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text(f"[default]\n{line}\n")


def test_doctor_says_what_would_happen(monkeypatch):
    assert doctor_line().endswith(", not logged in (wandb login): runs are mirrored offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert doctor_line().endswith(
        ", without an answer from http://127.0.0.1:9: runs are mirrored offline"
    )
    monkeypatch.setenv("WANDB_API_KEY", "short")
    line = doctor_line()
    assert "invalid" in line
    assert line.endswith("runs are not mirrored online")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor_line().endswith(", WANDB_MODE=offline: runs are mirrored offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert doctor_line().endswith(", WANDB_MODE=disabled: runs are not mirrored")


def test_a_login_and_a_wish_are_found_where_wandb_keeps_them(nobody, answering_server):
    online = f", http://{answering_server} answers: runs are mirrored online"
    (nobody / ".netrc").write_text(f"machine {answering_server} login user password {KEY}\n")
    (nobody / ".netrc").chmod(0o600)
    assert doctor_line().endswith(online)
    wandb_says(nobody, "mode = offline")
    assert doctor_line().endswith(", set to offline (wandb online): runs are mirrored offline")


def test_doctor_survives_a_wandb_that_does_not(tmp_path, monkeypatch):
    package = tmp_path / "broken" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no protobuf\\nhere')\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    assert "fails (no protobuf here): runs are not mirrored online" in doctor_line()
    (package / "__init__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(tracking, "ASK_S", 0.5)
    assert "does not start" in doctor_line()


class FakeWandb(types.ModuleType):
    """Has a login, and remembers what it is told; `refuses` names modes whose init fails."""

    UsageError = ValueError

    def __init__(self, refuses=()):
        super().__init__("wandb")
        self.settings = types.SimpleNamespace(mode="online", base_url="http://127.0.0.1:9")
        self.refuses, self.modes, self.told, self.summary = refuses, [], [], {}

    def Settings(self, **settings):
        assert settings["silent"]
        return settings

    def init(self, *, mode, resume, **run):
        assert resume == "allow"
        self.modes.append(mode)
        if mode in self.refuses:
            raise RuntimeError("bad\nkey")
        return self

    def setup(self):
        return self

    def login(self, verify):
        return True

    def teardown(self):
        self.modes.append("closed")

    def log(self, values, step):
        self.told.append((step, values))

    def mark_preempting(self):
        self.told.append("preempting")

    def finish(self, exit_code):
        self.told.append(exit_code)


@pytest.fixture
def mirror(monkeypatch):
    """Run the mirror in this process, on a fake W&B."""
    monkeypatch.setattr(tracking, "_give_up_after", lambda seconds: None)

    def run(messages, mode="offline", refuses=()):
        wandb = FakeWandb(refuses)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        tracking.mirror(iter([{"folder": "/tmp", "mode": mode, "run": {"id": "x"}}, *messages]))
        return wandb

    return run


@pytest.mark.parametrize(
    ("status", "told"),
    [("finished", [0]), ("diverged", [1]), ("preempted", ["preempting", 1]), (None, [1])],
)
def test_the_mirror_passes_on_values_and_the_last_word(mirror, status, told):
    last = [{"finish": status}] if status else []  # a killed run says nothing
    wandb = mirror([{"step": 3, "log": {"x": 1}}, {"summary": {"acc": 0.5}}, *last])
    assert wandb.told == [(3, {"x": 1}), *told]
    assert wandb.summary == {"acc": 0.5}


def test_a_reachable_server_is_used_and_a_refusal_falls_back(mirror, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "reachable", lambda url: True)
    assert mirror([], mode="auto").modes == ["online"]
    assert mirror([], mode="offline").modes == ["offline"]
    assert capsys.readouterr().err == ""
    assert mirror([], mode="auto", refuses=["online"]).modes == ["online", "closed", "offline"]
    assert (
        capsys.readouterr().err == "lra: warning: W&B refuses: bad key; this run is kept offline\n"
    )


def test_any_http_answer_is_an_answer(silent_server, monkeypatch):
    assert not tracking.reachable(os.environ["WANDB_BASE_URL"])
    assert not tracking.reachable("http://127.0.0.1:9")
    assert not tracking.reachable("no address")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse():
            connection = listener.accept()[0]
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        assert tracking.reachable(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_nobody_to_tell_is_fine(tmp_path):
    trackers = Trackers([])
    trackers.log(5, {"x": 1.0})
    trackers.summary({"y": 1})
    trackers.finish("finished")
    assert trackers.sync_hint is None
