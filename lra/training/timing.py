"""Measures a run: seconds of compilation, and how many steps one jitted call may hold."""

import time

import jax

_compilations: list[tuple[float, float]] = []  # begin and end on the monotonic clock


def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
        now = time.monotonic()
        _compilations.append((now - duration_secs, now))


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compile_seconds(since: float) -> float:
    """Seconds after `since` in which this process traced, lowered or compiled functions, or read
    compiled ones from the cache.

    Returns the length of the union of the events, which overlap where functions call functions.
    """
    total, reached = 0.0, since
    for begin, end in sorted(_compilations):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class CallTimer:
    """Chooses the number of steps per jitted call and measures the training rate.

    The first call compiles: it holds one step and does not count.

    Args:
        call_seconds: wanted duration of one call, in seconds.
    """

    def __init__(self, call_seconds: float):
        self.call_seconds = call_seconds
        self.calls = self.steps = 0  # steps and seconds without the first call
        self.seconds = 0.0

    def next_call(self, steps: int, seconds: float) -> int:
        """Number of steps of the next call, after one of `steps` steps that took `seconds`."""
        self.calls += 1
        if self.calls == 1:
            return 1
        self.seconds, self.steps = self.seconds + seconds, self.steps + steps
        return max(1, round(self.call_seconds * steps / seconds))

    def summary(self, batch_size: int) -> dict[str, float]:
        """`train_s`, `steps_per_s` and `examples_per_s` of the record; empty before two calls."""
        if not self.steps:
            return {}
        rate = self.steps / self.seconds
        return {
            "train_s": round(self.seconds, 2),
            "steps_per_s": round(rate, 3),
            "examples_per_s": round(rate * batch_size, 1),
        }
