"""A cell of `lra bench efficiency`: speed, memory and size of a config, in a process of its own.

`python -m lra.bench.efficiency_cell` reads {"overrides", "seconds"} from standard input and prints
the result as the last line; for `null` it prints the device.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lra.config.compose import compose
from lra.config.cost import cost
from lra.errors import LraError
from lra.runs.machine import cores, cpu_name
from lra.runs.records import to_json
from lra.tasks.base import Task
from lra.training.memory import OUT_OF_MEMORY, compiled_bytes, device_bytes, in_gb, is_out_of_memory
from lra.training.setup import Setup
from lra.training.state import Examples, initial_state
from lra.training.step import make_step_functions

WINDOWS = 5
COMMAND = (sys.executable, "-m", "lra.bench.efficiency_cell")


# --- the calling process -------------------------------------------------------------------------


def device_facts() -> dict[str, Any]:
    """Returns platform, kind and number of the devices, the CPU and its cores."""
    # in another process, because a process that has initialized a GPU holds most of its memory
    done = subprocess.run(COMMAND, input="null", capture_output=True, text=True)
    if done.returncode:
        raise LraError(f"JAX finds no device: {last_line(done.stderr, done.returncode)}")
    return {**json.loads(done.stdout.splitlines()[-1]), "cpu": cpu_name(), "cores": cores()}


def run_cell(overrides: Sequence[str], seconds: float, limit_s: float) -> dict[str, Any]:
    """Returns `measure` of a new process. A failure or out of memory is a result."""
    task = json.dumps({"overrides": list(overrides), "seconds": seconds})
    try:
        done = subprocess.run(COMMAND, input=task, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took longer than limit_s={limit_s:g} seconds"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode == -signal.SIGKILL:
        return {"status": "oom", "reason": "killed by the system"}
    is_oom = OUT_OF_MEMORY.search(done.stderr) or "std::bad_alloc" in done.stderr
    reason = last_line(done.stderr, done.returncode)
    return {"status": "oom" if is_oom else "failed", "reason": reason}


def last_line(text: str, exit_code: int) -> str:
    lines = text.strip().splitlines() or [f"no message, exit code {exit_code}"]
    return " ".join(lines[-1].split())[:300]


# --- the measuring process -----------------------------------------------------------------------


def main() -> None:
    task = json.loads(sys.stdin.read())
    jax.config.update("jax_enable_compilation_cache", False)  # the compile time is a result
    if task is None:
        device = jax.devices()[0]
        facts = {"platform": device.platform, "kind": device.device_kind}
        print(json.dumps({**facts, "count": jax.device_count()}))
        return
    try:
        result = measure(**task)
    except (LraError, ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        result = {"status": "failed", "reason": reason}
    print(json.dumps(to_json(result)))


def measure(overrides: Sequence[str], seconds: float) -> dict[str, Any]:
    """Returns speed, memory and size of one config on random inputs of full length.

    Runs the jitted functions of the trainer in windows of `seconds`. Inference is measured before
    training, because a device reports only the largest peak so far.
    """
    cfg = compose(overrides)
    batch_size = cfg.trainer.batch_size
    device = jax.devices()[0]
    size = cost(cfg)
    facts = {"seq_len": 0, "batch_size": batch_size, "depth": size.depth, "width": size.width}
    facts |= {"params": size.params, "flops": size.flops, "note": size.note}
    speeds: dict[str, dict[str, float]] = {}
    needed: dict[str, int | None] = {}
    peaks: dict[str, int | None] = {}

    def compile_function(name: str, function: Any, *args: Any) -> Any:
        start = time.perf_counter()
        compiled = function.lower(*args).compile()
        speeds[name] = {"compile_s": time.perf_counter() - start}
        needed[name] = need = compiled_bytes(compiled)
        # on a CPU, Linux would kill the process
        free = device_bytes(device) if device.platform == "cpu" else None
        if free is not None and need is not None and need > free:
            raise MemoryError(
                f"{name} needs {in_gb(need)} by XLA's analysis, {in_gb(free)} are free"
            )
        return compiled

    def measure_speed(name: str, call: Callable[[int], None]) -> None:
        rate = steps_per_second(call, seconds)
        speeds[name] |= {"steps_per_s": rate, "examples_per_s": rate * batch_size}
        peaks[name] = (device.memory_stats() or {}).get("peak_bytes_in_use")

    try:
        setup = Setup(cfg)
        facts["seq_len"] = setup.task.seq_len
        batch = random_batch(setup.task, batch_size)
        step_fns = make_step_functions(setup, batch_size, cfg.trainer.micro_batch)
        args = (setup.params, setup.batch_stats, setup.constants, batch.inputs, batch.lengths)
        apply = compile_function("infer", step_fns.predict, *args)

        def infer(count: int) -> None:
            for _ in range(count):
                logits = apply(*args)
            jax.block_until_ready(logits)

        measure_speed("infer", infer)
        del apply, args
        state, _ = initial_state(setup)  # not before: inference holds no optimizer state
        run_steps = compile_function(
            "train", step_fns.train_steps, state, setup.constants, batch, np.int32(0)
        )

        def train(count: int) -> None:
            nonlocal state
            until = np.int32(int(state.step) + count)
            state = jax.block_until_ready(run_steps(state, setup.constants, batch, until))

        measure_speed("train", train)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or "out of memory"
        return {"status": "oom", "reason": reason, **facts}
    source, held = ("device", peaks) if peaks["train"] is not None else ("compiled", needed)
    memory: dict[str, Any] = {"train_bytes": held["train"], "infer_bytes": held["infer"]}
    memory |= {"source": source, "compiled": needed}
    return {"status": "ok", "reason": "", **facts, **speeds, "memory": memory}


def random_batch(task: Task, batch_size: int) -> Examples:
    """Returns one batch on the device, with random ids or values at every position."""
    rng = np.random.default_rng(0)
    pair = (2,) if task.dual else ()
    if task.num_tokens is not None:
        values = rng.integers(1, task.num_tokens, (batch_size, *pair, task.seq_len))
        inputs = values.astype(np.min_scalar_type(task.num_tokens - 1))
    else:
        features = (task.num_features,) if task.num_features > 1 else ()
        top = min(np.iinfo(task.value_dtype).max, 255)
        values = rng.integers(0, top, (batch_size, *pair, task.seq_len, *features), endpoint=True)
        inputs = values.astype(task.value_dtype)
    targets = (task.num_targets,) if task.num_targets > 1 else ()
    labels = rng.integers(0, task.num_classes, (batch_size, *targets)).astype(np.int32)
    lengths = np.full((batch_size, *pair), task.seq_len, np.int32)
    return jax.device_put(Examples(inputs, lengths, labels))


def steps_per_second(call: Callable[[int], None], seconds: float) -> float:
    """Returns the rate of `call(count)` in the fastest of `WINDOWS` windows of about `seconds`.

    Other programs can only slow a window down. Very long steps get fewer windows.
    """
    call(1)
    start = time.perf_counter()
    call(1)
    once = time.perf_counter() - start
    count = max(1, round(seconds / once))
    rates: list[float] = []
    while len(rates) < WINDOWS and time.perf_counter() - start < 2 * WINDOWS * seconds:
        began = time.perf_counter()
        call(count)
        rates.append(count / (time.perf_counter() - began))
    return max(rates, default=1 / once)


if __name__ == "__main__":
    main()
