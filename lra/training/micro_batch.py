"""Chooses the micro-batch: how many examples' activations are held in memory at once."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from omegaconf import DictConfig

from lra.errors import ConfigError, LraError
from lra.training import distributed
from lra.training.data_parallel import DataParallel
from lra.training.memory import compiled_bytes, device_bytes, in_gb, is_out_of_memory
from lra.training.prefetch import DeviceData, HostPrefetch, TrainingBatches
from lra.training.setup import Setup
from lra.training.state import Examples, State, copy_tree
from lra.training.step import StepFunctions, make_step_functions


def make_batches(
    cfg: DictConfig, setup: Setup, train: Examples, devices: DataParallel, micro_batch: int
) -> tuple[TrainingBatches, StepFunctions]:
    """The source of training batches and the jitted functions for one micro-batch size."""
    batch_size = cfg.trainer.batch_size
    step_fns = make_step_functions(setup, batch_size, micro_batch, devices)
    if isinstance(train.labels, jax.Array):
        return DeviceData(train), step_fns
    order_key, steps = setup.order_key, cfg.trainer.steps
    return HostPrefetch(train, order_key, batch_size, micro_batch, devices, steps), step_fns


def choose_sizes(
    cfg: DictConfig,
    setup: Setup,
    val: Examples,
    eval_batch: int,
    devices: DataParallel,
    make: Callable[[int], tuple[TrainingBatches, StepFunctions]],
    new_state: Callable[[], State],
    previous: dict[str, Any],
) -> tuple[int, int, dict[int, int | None]]:
    """The largest micro-batch and the largest evaluation batch that fit into memory.

    Args:
        val: validation split, from which the evaluations tried take their examples.
        eval_batch: largest evaluation batch to try.
        make: `make_batches` for a size, which returns the same objects when called again.
        new_state: makes a state that a trial may consume.
        previous: record of an earlier start whose checkpoint is resumed; its sizes are kept, so
            that batches are cut the same way. Empty for a new run.
    Returns:
        Micro-batch, evaluation batch, and the bytes that each tried micro-batch needs.
    Raises:
        LraError: not even the smallest size fits.
    """
    # a run holds the best weights beside its state
    best = copy_tree((setup.params, setup.batch_stats))
    # with several processes, an OOM on one would hang the others in an all-reduce
    execute = jax.process_count() == 1
    search = partial(largest_that_fits, sharing=devices.num_local_devices, execute=execute)

    def training(size: int) -> tuple[Any, tuple]:
        batches, step_fns = make(size)
        return batches.jitted_call(step_fns, new_state(), setup.constants, int(execute))

    def evaluation(size: int) -> tuple[Any, tuple]:
        rows = np.arange(size) % len(val.labels)
        batch = (val.inputs[rows], val.lengths[rows])
        return make(micro_batch)[1].predict, (*best, setup.constants, *batch)

    def candidates(key: str, largest: int) -> list[int]:
        if previous.get(key) in micro_batch_sizes(largest, devices.num_devices):
            return [previous[key]]
        return halvings(largest, devices.num_devices)

    sizes = candidates("micro_batch", cfg.trainer.batch_size)
    what = "a micro-batch" if len(sizes) > 1 else "the micro-batch of the earlier start,"
    micro_batch, needs = search(what, sizes, training)
    sizes = candidates("eval_batch", eval_batch)
    state = new_state()  # held in memory while an evaluation runs
    eval_batch, _ = search("an evaluation batch", sizes, evaluation)
    del state
    return micro_batch, eval_batch, needs


def check_micro_batch(cfg: DictConfig, devices: int) -> None:
    """Checks that the micro-batch divides the batch and that the devices divide the micro-batch.

    Raises:
        ConfigError: names the nearest sizes that work.
    """
    size, batch_size = cfg.trainer.micro_batch, cfg.trainer.batch_size
    if size in (None, "auto"):
        return
    allowed = micro_batch_sizes(batch_size, devices)
    if size not in allowed:
        near = sorted(sorted(allowed, key=lambda other: abs(other - size))[:2])
        shared = f" and a multiple of the {devices} devices" if devices > 1 else ""
        raise ConfigError(
            f"trainer.micro_batch={size} must be a divisor of trainer.batch_size={batch_size}"
            f"{shared}; use {' or '.join(map(str, near))}, or auto"
        )


def micro_batch_sizes(batch_size: int, devices: int = 1) -> list[int]:
    """Divisors of the batch size that are multiples of the number of devices, largest first."""
    small = [n for n in range(1, math.isqrt(batch_size) + 1) if batch_size % n == 0]
    divisors = {*small, *(batch_size // n for n in small)}
    return sorted((n for n in divisors if n % devices == 0), reverse=True)


def halvings(batch_size: int, devices: int = 1) -> list[int]:
    """Micro-batch sizes to try: the whole batch, then each at most half of the previous one."""
    tried = [batch_size]
    while smaller := [n for n in micro_batch_sizes(batch_size, devices) if 2 * n <= tried[-1]]:
        tried.append(smaller[0])
    return tried


def largest_that_fits(
    what: str,
    candidates: list[int],
    trial: Callable[[int], tuple[Any, tuple]],
    *,
    sharing: int = 1,
    execute: bool = True,
) -> tuple[int, dict[int, int | None]]:
    """The first candidate that fits on every process, and the bytes that each tried size needs.

    Args:
        what: name of what is tried, for the error message.
        trial: maps a size to a jitted function and its arguments.
        sharing: number of CPU devices that share the machine's memory.
        execute: run the function once, instead of trusting the compiler's memory analysis alone.
    Raises:
        LraError: not even the last candidate fits.
    """
    needs: dict[int, int | None] = {}
    device = jax.local_devices()[0]
    available = device_bytes(device)
    if available is not None and device.platform == "cpu":
        available //= sharing
    for size in candidates:
        function, args = trial(size)
        try:
            needs[size] = needed = compiled_bytes(function.lower(*args).compile())
            fits = available is None or needed is None or needed <= available
            if fits and execute:
                jax.block_until_ready(function(*args))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
            needs.setdefault(size, None)
        del function, args
        if all(distributed.all_gather(fits)):
            return size, needs
    needed = needs[candidates[-1]]
    raise LraError(
        f"out of memory even at {what} of {candidates[-1]}"
        f"{f', which needs {in_gb(needed)}' if needed else ''}; set trainer.remat=block or "
        "trainer.precision=bf16, or lower backbone.width or backbone.depth"
    )
