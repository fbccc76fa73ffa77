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
    seconds = np.empty((1 + ROUNDS, len(functions)))
    for round_, side in np.ndindex(seconds.shape):
        start = time.perf_counter()
        jax.block_until_ready(functions[side](*args))
        seconds[round_, side] = time.perf_counter() - start
    medians = np.median(seconds[1:], axis=0).tolist()
    analyses: list[Any] = [function.memory_analysis() for function in functions]
    memory = [analysis.temp_size_in_bytes for analysis in analyses]
    if case.published is None:
        total = memory[0] + analyses[0].argument_size_in_bytes + analyses[0].output_size_in_bytes
        yield Measurement(f"{case.what}: time", medians[0], "s", case.speed_goal)
        note = "arguments, results, temporaries"
        yield Measurement(f"{case.what}: memory", total / 1e9, "GB", case.memory_goal, note)
        return
    speedup, ratio = medians[1] / medians[0], memory[0] / memory[1]
    note = "ours {}, published order {}".format(*map(format_seconds, medians))
    yield Measurement(f"{case.what}: faster", speedup, "x", case.speed_goal, note)
    note = "ours {}, published order {}".format(*map(format_bytes, memory))
    yield Measurement(f"{case.what}: memory", ratio, "x", case.memory_goal, note)


def compile_with_gradients(
    function: Callable[..., Any], learned: tuple, constants: tuple
) -> jax.stages.Compiled:
    """Compiles (learned, constants) -> (output, vector-Jacobian product with the output)."""

    def forward_backward(learned: tuple, constants: tuple) -> tuple:
        y, pull = jax.vjp(lambda *x: function(*x, *constants), *learned)
        return y, pull(y)

    return jax.jit(forward_backward).lower(learned, constants).compile()
