"""The ops suite measures time and memory of both sides."""

from lra.bench import ops
from models import benchmarks


def test_ops_suite_measures_every_kind_of_case(monkeypatch):
    calls = []
    both = benchmarks.recurrence_case(2, 8, 3, speed_goal=">= 2 x")
    cases = [
        both,
        both._replace(what="alone", published=None, memory_goal="<= 1 GB"),
        benchmarks.HostCase("a call", lambda: calls.append(1), "< 1 s"),
    ]
    monkeypatch.setattr(benchmarks, "cases", lambda platform: iter(cases))
    found = {m.what: m for m in ops.measure()}
    assert list(found) == [
        f"{both.what}: faster",
        f"{both.what}: memory",
        "alone: time",
        "alone: memory",
        "a call",
    ]
    assert all(m.value > 0 for m in found.values())
    assert calls == [1]
    assert found[f"{both.what}: faster"].goal == ">= 2 x"
    alone = found["alone: memory"]
    assert (alone.unit, alone.goal) == ("GB", "<= 1 GB")
    assert alone.value * 1e9 > 2 * 8 * (2 * 8 * 3 + 3)  # complex64 inputs and their gradients
