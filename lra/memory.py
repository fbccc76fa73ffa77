"""Does a step fit into the device's memory? Finds the micro-batch that does, and says what helps where none does."""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
from omegaconf import DictConfig

from lra.errors import ConfigError, LraError

EXHAUSTED = re.compile("RESOURCE_EXHAUSTED|out.of.memory|ALLOC_FAILED|Failed to create cuFFT", re.IGNORECASE)


def check_micro_batch(cfg: DictConfig, devices: int) -> None:
    """Refuse a micro-batch that the devices cannot share, or of which the batch is no multiple.

    Raises:
        ConfigError: the line names the nearest sizes that work.
    """
    size, batch_size = cfg.trainer.micro_batch, cfg.trainer.batch_size
    if size not in (None, "auto") and size not in (allowed := sizes(batch_size, devices)):
        near = sorted(sorted(allowed, key=lambda other: abs(other - size))[:2])
        shared = f" and a multiple of the {devices} devices" if devices > 1 else ""
        raise ConfigError(
            f"trainer.micro_batch={size} must be a divisor of trainer.batch_size={batch_size}{shared}; "
            f"take {' or '.join(map(str, near))}, or auto"
        )


def sizes(batch_size: int, devices: int = 1) -> list[int]:
    """Every micro-batch that divides the batch and that the devices can share, largest first."""
    return [n for n in range(batch_size, 0, -1) if batch_size % n == 0 and n % devices == 0]


def halvings(batch_size: int, devices: int = 1) -> list[int]:
    """The micro-batches to try: the whole batch, then each at most half of the one before."""
    tried = [batch_size]
    while smaller := [n for n in sizes(batch_size, devices) if 2 * n <= tried[-1]]:
        tried.append(smaller[0])
    return tried


def largest_that_fits(
    what: str,
    candidates: list[int],
    trial: Callable[[int], tuple[Any, tuple]],
    agree: Callable[[bool], bool],
    *,
    sharing: int = 1,
    call: bool = True,
) -> tuple[int, dict[int, int | None]]:
    """The first of `candidates` that fits, and the bytes that each one tried needs, None where unknown.

    Args:
        what: is tried, for the message.
        trial: of a size a jitted function and the arguments of a call whose result nobody wants.
        agree: whether it fits on every process.
        sharing: devices that have one memory together, where that is the machine's.
        call: whether to run it too, and not only compare what the compiler says.
    Raises:
        LraError: not even the smallest fits.
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
            if fits and call:
                jax.block_until_ready(function(*args))
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
            fits = False
            needs.setdefault(size, None)
        del function, args
        if agree(fits):
            return size, needs
    raise LraError(
        f"out of memory even at {what} of {candidates[-1]}"
        f"{f', which needs {in_gb(needs[candidates[-1]])}' if needs[candidates[-1]] else ''}; "
        "set trainer.remat=block or trainer.precision=bf16, or lower backbone.width or backbone.depth"
    )


def compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes a device holds while this runs: arguments, results and what lies between; None where it does not tell."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return total - found.alias_size_in_bytes


def device_bytes(device: jax.Device) -> int | None:
    """Bytes that a device may hold, on a CPU those that are free now; None where nobody tells."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    # asked here, since Linux grants what it does not have and kills the process that uses it
    with open("/proc/meminfo") as lines:
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def is_exhausted(error: BaseException) -> bool:
    """Whether the device had no memory left: XLA says so in several ways, cuFFT by a plan that it cannot make."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(EXHAUSTED.search(str(error)))


def advice(cfg: DictConfig, micro_batch: int | None) -> str:
    """What to change after an out of memory, in one line."""
    trainer, backbone = cfg.trainer, cfg.backbone
    now = micro_batch or trainer.batch_size
    auto = "" if backbone.get("norm") == "batch" else "=auto or"  # `Setup` refuses auto with batch norm
    helps = [f"trainer.micro_batch{auto} below {now} (the batch stays {trainer.batch_size})"] if now > 1 else []
    helps += ["trainer.remat=block"] if trainer.remat == "none" else []
    helps += ["trainer.precision=bf16"] if trainer.precision != "bf16" else []
    helps += [f"a trainer.eval_batch_size below {trainer.eval_batch_size} if it was in an evaluation"]
    return (
        f"out of memory at trainer.batch_size={trainer.batch_size}, trainer.micro_batch={now}, trainer.remat={trainer.remat}, "
        f"trainer.precision={trainer.precision}, backbone.width={backbone.width}, depth {backbone.depth}; "
        f"set {', or '.join(helps)}"
    )


def in_gb(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f} GB"
