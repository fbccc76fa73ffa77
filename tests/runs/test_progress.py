"""Progress messages without a terminal, and a reader that closes the pipe."""

import subprocess
import sys
from types import SimpleNamespace

from lra.config.options import options
from lra.runs import progress
from lra.runs.progress import Reporter, preparing, settings_hint


def test_a_long_preparation_logs_a_message_every_ten_seconds(monkeypatch, caplog):
    clock = iter([0.0, 5.0, 11.0, 11.0, 20.0, 22.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "Progress", lambda **_: HiddenBar())
    caplog.set_level("INFO", logger="lra")

    def work(on_progress):
        for done in (1, 2000, 3000, 4000):
            on_progress("train", done, 5000)
        return "made"

    assert preparing(SimpleNamespace(name="pathx"), work) == "made"
    assert caplog.messages == [
        "preparing pathx train 2,000 of 5,000",
        "preparing pathx train 4,000 of 5,000",
    ]


def test_settings_that_are_no_papers_are_named():
    listops = {"task": "listops", "model": "stu", "experiment": None}
    assert settings_hint(listops).endswith("; experiment=listops/stu has those of the paper")
    assert settings_hint(listops | {"model": "gru"}).endswith(
        "settings: defaults and overrides; no published experiment for this model"
    )
    assert settings_hint(listops | {"experiment": "listops/stu"}) is None
    assert settings_hint(listops | {"task": "adding"}) is None  # nothing is published
    assert "listops/stu" in options("experiment")


def test_training_and_scoring_without_a_bar_print_a_line_every_ten_seconds(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    reporter = Reporter(200, 8, live=False)
    for step in range(1, 31):
        now += 2.0
        reporter.advance(step, 1, 2.0, (3.0, 1.0, 2.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/200" for step in range(5, 31, 5)]
    assert lines[-1] == (
        "step     30/200  loss 1.500 accuracy 0.500  0.5 steps/s  4 examples/s  0:05:40 left"
    )
    for done in range(8, 89, 8):
        now += 4.0
        reporter.predicting("validation", done, 90)
    assert capsys.readouterr().out.splitlines() == [
        f"scoring validation: {done} of 90 examples" for done in (24, 48, 72)
    ]


def test_rate_of_the_first_call_which_compiles_is_not_shown(capsys):
    reporter = Reporter(200, 8, live=False)
    reporter.advance(1, 1, 30.0, (3.0, 1.0, 2.0))
    assert capsys.readouterr().out == (
        "step      1/200  loss 1.500 accuracy 0.500  first call 30.0 s\n"
    )


class HiddenBar:
    """A progress bar that prints nothing and does not read the clock."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_task(self, *_, **__):
        pass

    def update(self, *_, **__):
        pass


def test_output_into_a_closed_pipe_is_dropped():
    code = (
        "from lra.runs.progress import Reporter\n"
        "reporter = Reporter(4, 2, live=False)\n"
        "for step in range(2000):\n"
        "    reporter.evaluation(step, {'loss': 1.0, 'accuracy': 0.5}, False)\n"
        "print('the end')"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), stderr) == (0, b"")
