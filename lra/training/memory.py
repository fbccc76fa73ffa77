"""Device memory: bytes of a compiled program, available bytes, advice when it runs out."""

import os
import re

import jax
from omegaconf import DictConfig

OUT_OF_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|out.of.memory|ALLOC_FAILED|Failed to create cuFFT", re.IGNORECASE
)


def compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the device bytes of arguments, results and temporaries; None if unknown."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return total - found.alias_size_in_bytes


def device_bytes(device: jax.Device) -> int | None:
    """Returns the bytes that a device may hold (CPU: the free ones); None if unknown."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    # Linux grants more memory than it has and kills the process that uses it.
    with open("/proc/meminfo") as lines:
        return next(
            (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the device or the host ran out of memory.

    XLA and cuFFT word it in several ways.
    """
    if isinstance(error, MemoryError):  # NumPy
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def out_of_memory_advice(cfg: DictConfig, micro_batch: int | None) -> str:
    """Returns one line with the config keys that reduce the memory."""
    trainer, backbone = cfg.trainer, cfg.backbone
    size = micro_batch or trainer.batch_size
    # `Setup` refuses micro_batch=auto with batch norm
    auto = "" if backbone.get("norm") == "batch" else "=auto or"
    changes = []
    if size > 1:
        changes.append(
            f"trainer.micro_batch{auto} below {size} (the batch stays {trainer.batch_size})"
        )
    if trainer.remat == "none":
        changes.append("trainer.remat=block")
    if trainer.precision != "bf16":
        changes.append("trainer.precision=bf16")
    changes.append(
        f"a trainer.eval_batch_size below {trainer.eval_batch_size} if it was in an evaluation"
    )
    return (
        f"out of memory at trainer.batch_size={trainer.batch_size}, trainer.micro_batch={size}, "
        f"trainer.remat={trainer.remat}, trainer.precision={trainer.precision}, "
        f"backbone.width={backbone.width}, depth {backbone.depth}; set {', or '.join(changes)}"
    )


def in_gb(size: int | None) -> str:
    """Formats a number of bytes in GB, "?" for None."""
    return "?" if size is None else f"{size / 1e9:.2f} GB"
