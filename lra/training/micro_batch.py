"""Does a step fit into the device's memory? Finds the micro-batch that does, and says what helps where none does."""

from collections.abc import Callable
from typing import Any

import jax
from omegaconf import DictConfig

from lra.errors import ConfigError, LraError
from lra.training.memory import compiled_bytes, device_bytes, in_gb, is_out_of_memory


def check_micro_batch(cfg: DictConfig, devices: int) -> None:
    """Refuse a micro-batch that the devices cannot share, or of which the batch is no multiple.

    Raises:
        ConfigError: the line names the nearest sizes that work.
    """
    size, batch_size = cfg.trainer.micro_batch, cfg.trainer.batch_size
    if size not in (None, "auto") and size not in (
        allowed := micro_batch_sizes(batch_size, devices)
    ):
        near = sorted(sorted(allowed, key=lambda other: abs(other - size))[:2])
        shared = f" and a multiple of the {devices} devices" if devices > 1 else ""
        raise ConfigError(
            f"trainer.micro_batch={size} must be a divisor of trainer.batch_size={batch_size}{shared}; "
            f"take {' or '.join(map(str, near))}, or auto"
        )


def micro_batch_sizes(batch_size: int, devices: int = 1) -> list[int]:
    """Every micro-batch that divides the batch and that the devices can share, largest first."""
    return [n for n in range(batch_size, 0, -1) if batch_size % n == 0 and n % devices == 0]


def halvings(batch_size: int, devices: int = 1) -> list[int]:
    """The micro-batches to try: the whole batch, then each at most half of the one before."""
    tried = [batch_size]
    while smaller := [n for n in micro_batch_sizes(batch_size, devices) if 2 * n <= tried[-1]]:
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
            if not is_out_of_memory(error):
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
