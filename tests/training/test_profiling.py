"""`trainer.profile` traces the selected steps and changes nothing else."""

import gzip
import json
import sys

import jax
import pytest
from run_checks import folder_of

import lra
from lra.errors import ConfigError
from lra.runs.records import read_metrics
from lra.training.profiling import Profile, profiled_steps


@pytest.mark.parametrize(
    ("value", "steps"), [(None, None), ("0:4", range(4)), ("2:3", range(2, 3))]
)
def test_steps_are_a_slice(value, steps):
    assert profiled_steps(value, 4) == steps


@pytest.mark.parametrize("value", ["3", "3:3", "4:2", "2:5", "a:b", ":3", 620, True])
def test_other_values_are_refused_in_one_line(value, tiny):
    with pytest.raises(
        ConfigError, match=r"^trainer.profile=\S+ must be A:B with 0 <= A < B <= trainer.steps=4"
    ) as error:
        profiled_steps(value, 4)
    assert "\n" not in str(error.value)


def test_bad_steps_are_refused_before_the_run(tiny):
    with pytest.raises(ConfigError, match="trainer.profile=2:9 must be"):
        lra.train([*tiny, "trainer.profile=2:9"])


def test_calls_end_at_both_boundaries(tmp_path):
    profile = Profile(range(3, 6), tmp_path, print)
    assert [profile.next_boundary(step) for step in (0, 2, 3, 5, 6)] == [3, 3, 6, 6, sys.maxsize]
    assert Profile(None, tmp_path, print).next_boundary(0) == sys.maxsize


@pytest.mark.slow
def test_trace_holds_the_steps_and_changes_nothing(tiny, tmp_path, capsys):
    plain = [
        *tiny,
        "trainer.steps=8",
        "trainer.eval_every=8",
        "trainer.log_every=8",
        "trainer.call_seconds=100.0",
    ]
    traced = [*plain, "trainer.profile=3:6", f"output.root={tmp_path / 'traced'}"]
    plain_folder, traced_folder = folder_of(plain), folder_of(traced)
    assert traced_folder.name == plain_folder.name  # a trace is not part of the identity
    lra.train(plain)
    lra.train(traced)
    assert read_metrics(traced_folder) == read_metrics(plain_folder)
    assert not (plain_folder / "profile").exists()
    (file,) = traced_folder.glob("profile/**/perfetto_trace.json.gz")
    assert list(file.parent.glob("*.xplane.pb"))
    out = capsys.readouterr().out
    assert f"trace of steps 3:6: tensorboard --logdir {traced_folder / 'profile'}" in out
    assert str(file) in out
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    calls = sorted(
        (int(event["args"]["first"]), int(event["args"]["until"]))
        for event in events
        if event.get("name") == "train"
    )
    assert [step for call in calls for step in range(*call)] == [3, 4, 5]


def test_trace_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    def full():
        raise RuntimeError("no space\nleft")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    profile = Profile(range(1, 9), tmp_path, print)
    with profile.trace(1, 4):
        pass
    profile.close()
    profile.close()
    assert caplog.messages == ["trace of steps 1:4 not written: no space left"]
