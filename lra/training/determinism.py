"""Sets XLA's flag for deterministic GPU operations (`trainer.deterministic`)."""

import os

import jax

from lra.config.rules import format_value
from lra.errors import ConfigError

DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"
_flag_added = False  # whether a run of this process has added DETERMINISTIC_FLAG to XLA_FLAGS


def use_deterministic_ops(enabled: bool) -> None:
    """Adds XLA's flag for deterministic GPU operations to XLA_FLAGS, or removes what it added.

    XLA reads the flag once, when JAX starts its backend. A flag that the user has set in the
    environment stays, whatever `enabled` is.

    Raises:
        ConfigError: the backend has already started with the other setting.
    """
    global _flag_added
    flags = os.environ.get("XLA_FLAGS", "").split()
    if enabled == (DETERMINISTIC_FLAG in flags) or not (enabled or _flag_added):
        return
    if backend_started():
        raise ConfigError(
            f"trainer.deterministic={format_value(enabled)} is set too late, JAX has already "
            f"started in this process with {format_value(not enabled)}; start a new process"
            + (f" or set XLA_FLAGS={DETERMINISTIC_FLAG} before JAX starts" if enabled else "")
        )
    flags = [flag for flag in flags if flag != DETERMINISTIC_FLAG]
    os.environ["XLA_FLAGS"] = " ".join(flags + [DETERMINISTIC_FLAG] * enabled)
    _flag_added = enabled


def backend_started() -> bool:
    """Returns whether JAX has started its backend.

    JAX has no public function for it, but refuses to change `jax_num_cpu_devices` afterwards.
    """
    current = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", current + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", current)
    return False
