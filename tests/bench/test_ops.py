"""The ops suite measures time and memory of both sides."""

from lra.bench import ops
from models import benchmarks


def test_ops_suite_measures_every_kind_of_case(monkeypatch):
    calls = []
    small = [
        benchmarks.recurrence_case(2, 8, 3, speed_goal=">= 2 x"),
        benchmarks.path_x_case(batch=1, length=32, width=4, depth=1),
        benchmarks.HostCase("a call", lambda: calls.append(1), "< 1 s"),
    ]
    monkeypatch.setattr(benchmarks, "cases", lambda platform: iter(small))
    found = {m.what: m for m in ops.measure()}
    assert len(found) == 5
    assert all(m.value > 0 for m in found.values())
    assert calls == [1]
    assert found["complex recurrence, B=2 L=8 N=3: faster"].goal == ">= 2 x"
    (whole,) = (m for m in found.values() if m.unit == "GB")
    assert 32 * 4 * 4 < whole.value * 1e9 < 1e9
