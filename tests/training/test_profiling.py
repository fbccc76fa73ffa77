"""`trainer.profile`: a trace of the steps asked for, which changes nothing else."""

import gzip
import json
import sys

import pytest

import lra
from lra.errors import ConfigError
from lra.runs.records import read_metrics, run_path
from lra.training.profiling import Profile, profiled_steps
from lra.training.trainer import run_config


@pytest.mark.parametrize(
    ("value", "steps"), [(None, None), ("0:4", range(4)), ("2:3", range(2, 3))]
)
def test_steps_are_a_slice(value, steps):
    assert profiled_steps(value, 4) == steps


@pytest.mark.parametrize("value", ["3", "3:3", "4:2", "2:5", "a:b", ":3", 620, True])
def test_other_words_are_refused_in_one_line(value, tiny):
    with pytest.raises(
        ConfigError, match=r"^trainer.profile=\S+ must be A:B with 0 <= A < B <= trainer.steps=4"
    ) as error:
        profiled_steps(value, 4)
    assert "\n" not in str(error.value)


def test_a_run_refuses_before_it_begins(tiny):
    with pytest.raises(ConfigError, match="trainer.profile=2:9 must be"):
        lra.train([*tiny, "trainer.profile=2:9"])


def test_calls_end_at_both_edges(tmp_path):
    profile = Profile(range(3, 6), tmp_path, print)
    assert [profile.end(step) for step in (0, 2, 3, 5, 6)] == [3, 3, 6, 6, sys.maxsize]
    assert Profile(None, tmp_path, print).end(0) == sys.maxsize


def test_trace_holds_these_steps_and_changes_nothing(tiny, tmp_path, capsys):
    words = [
        *tiny,
        "trainer.steps=8",
        "trainer.eval_every=8",
        "trainer.log_every=8",
        "trainer.call_seconds=100.0",
    ]
    cfg, same = lra.compose(words), lra.compose([*words, "trainer.profile=3:6"])
    plain_folder, traced_folder = (
        run_path(tmp_path / name, run_config(cfg), dict(cfg.names)) for name in ("runs", "traced")
    )
    assert (
        run_path(tmp_path / "traced", run_config(same), dict(same.names)) == traced_folder
    )  # as if nothing was traced
    lra.train(words)
    lra.train([*words, "trainer.profile=3:6", f"output.root={tmp_path / 'traced'}"])
    assert read_metrics(traced_folder) == read_metrics(plain_folder)
    assert not (plain_folder / "profile").exists()
    (file,) = traced_folder.glob("profile/**/perfetto_trace.json.gz")
    assert list(file.parent.glob("*.xplane.pb"))
    said = capsys.readouterr().out
    assert f"trace of steps 3:6: tensorboard --logdir {traced_folder / 'profile'}" in said
    assert str(file) in said
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    calls = sorted(
        (int(e["args"]["first"]), int(e["args"]["until"]))
        for e in events
        if e.get("name") == "train"
    )
    assert [step for call in calls for step in range(*call)] == [3, 4, 5]


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    import jax

    def full():
        raise RuntimeError("no space\nleft")

    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    profile = Profile(range(1, 9), tmp_path, said.append)
    with profile.tracing(1, 4):
        pass
    profile.close()
    profile.close()
    assert said == ["trace of steps 1:4 not written: no space left"]
