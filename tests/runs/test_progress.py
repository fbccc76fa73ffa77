"""Long preparations are heard of without a terminal too."""

from types import SimpleNamespace

from lra.runs import progress
from lra.runs.progress import preparing


def test_long_preparation_says_so_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 11.0, 11.0, 20.0, 22.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "Progress", lambda **_: Quiet())

    def work(on_progress):
        for done in (1, 2000, 3000, 4000):
            on_progress("train", done, 5000)
        return "made"

    assert preparing(SimpleNamespace(name="pathx"), work) == "made"
    assert capsys.readouterr().err.splitlines() == [
        "preparing pathx train 2,000 of 5,000",
        "preparing pathx train 4,000 of 5,000",
    ]


class Quiet:
    """A bar that shows nothing, and asks no clock."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_task(self, *_, **__):
        pass

    def update(self, *_, **__):
        pass
