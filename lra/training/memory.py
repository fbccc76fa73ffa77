"""Device memory: what a compiled program needs, what is free, and advice when it runs out."""

import os
import re

import jax
from omegaconf import DictConfig

OUT_OF_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|out.of.memory|ALLOC_FAILED|Failed to create cuFFT", re.IGNORECASE
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
        return next(
            (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left: XLA says so in several ways, cuFFT by a plan that it cannot make."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def out_of_memory_advice(cfg: DictConfig, micro_batch: int | None) -> str:
    """What to change after an out of memory, in one line."""
    trainer, backbone = cfg.trainer, cfg.backbone
    now = micro_batch or trainer.batch_size
    auto = (
        "" if backbone.get("norm") == "batch" else "=auto or"
    )  # `Setup` refuses auto with batch norm
    helps = (
        [f"trainer.micro_batch{auto} below {now} (the batch stays {trainer.batch_size})"]
        if now > 1
        else []
    )
    helps += ["trainer.remat=block"] if trainer.remat == "none" else []
    helps += ["trainer.precision=bf16"] if trainer.precision != "bf16" else []
    helps += [
        f"a trainer.eval_batch_size below {trainer.eval_batch_size} if it was in an evaluation"
    ]
    return (
        f"out of memory at trainer.batch_size={trainer.batch_size}, trainer.micro_batch={now}, trainer.remat={trainer.remat}, "
        f"trainer.precision={trainer.precision}, backbone.width={backbone.width}, depth {backbone.depth}; "
        f"set {', or '.join(helps)}"
    )


def in_gb(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f} GB"
