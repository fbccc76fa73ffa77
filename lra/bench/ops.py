"""`lra bench ops`: the models' operations beside the published order of the same computation."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lra.bench.measurement import Measurement, format_bytes, format_seconds
from models import benchmarks

ROUNDS = 5


def measure() -> Iterator[Measurement]:
    """Measures the cases of `models.benchmarks` for the default backend, forward and backward."""
    for case in benchmarks.cases(jax.default_backend()):
        if isinstance(case, benchmarks.Case):
            yield from compare(case)
        else:
            start = time.perf_counter()
            case.call()
            yield Measurement(case.what, time.perf_counter() - start, "s", case.goal)


def compare(case: benchmarks.Case) -> Iterator[Measurement]:
    """Yields speed-up and memory ratio of `ours`; without a published order, seconds and GB.

    Both sides run in every round; the times are medians over `ROUNDS` rounds after a warm-up.
    """
    args = case.learned, case.constants
    functions = [
        compile_with_gradients(f, *args) for f in (case.ours, case.published) if f is not None
    ]
    seconds: list[list[float]] = [[] for _ in functions]
    for round_ in range(ROUNDS + 1):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            if round_:
                times.append(time.perf_counter() - start)
    medians = [float(np.median(times)) for times in seconds]
    analyses: list[Any] = [function.memory_analysis() for function in functions]
    memory = [analysis.temp_size_in_bytes for analysis in analyses]
    if case.published is None:
        total = memory[0] + analyses[0].argument_size_in_bytes + analyses[0].output_size_in_bytes
        yield Measurement(f"{case.what}: time", medians[0], "s", case.speed_goal)
        note = "arguments, results, temporaries"
        yield Measurement(f"{case.what}: memory", total / 1e9, "GB", case.memory_goal, note)
        return
    notes = [
        "ours {}, published order {}".format(*map(form, both))
        for form, both in ((format_seconds, medians), (format_bytes, memory))
    ]
    speedup, ratio = medians[1] / medians[0], memory[0] / memory[1]
    yield Measurement(f"{case.what}: faster", speedup, "x", case.speed_goal, notes[0])
    yield Measurement(f"{case.what}: memory", ratio, "x", case.memory_goal, notes[1])


def compile_with_gradients(
    function: Callable[..., Any], learned: tuple, constants: tuple
) -> jax.stages.Compiled:
    """Compiles (learned, constants) -> (output, vector-Jacobian product with the output)."""

    def forward_backward(learned: tuple, constants: tuple) -> tuple:
        y, pull = jax.vjp(lambda *x: function(*x, *constants), *learned)
        return y, pull(y)

    return jax.jit(forward_backward).lower(learned, constants).compile()
