"""Software versions, commit, CPU and memory of the process that computes a result."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path


def versions() -> dict[str, str | None]:
    """Installed versions, None for a missing package. Imports none of the packages."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "lra"):
        try:
            found[name] = importlib.metadata.version("lra-jax" if name == "lra" else name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """Short commit hash of this checkout, with `+dirty` if code or configs differ from it.

    None unless git tracks this file; a virtual environment may lie inside another repository.
    """
    if (root := _checkout()) is None or not (commit := _git(root, "rev-parse", "--short", "HEAD")):
        return None
    changed = _git(root, "status", "--porcelain", "--", "lra", "models", "conf")
    return commit + ("+dirty" if changed else "")


@cache
def has_commit(commit: str) -> bool | None:
    """Whether this checkout has a commit, given its hash; None without the whole history."""
    if (root := _checkout()) is None:
        return None
    if _git(root, "cat-file", "-e", f"{commit}^{{commit}}") is not None:
        return True
    return False if _git(root, "rev-parse", "--is-shallow-repository") == "false" else None


def _checkout() -> Path | None:
    """The root of this checkout; None unless git tracks this file."""
    root = Path(__file__).resolve().parents[2]
    return root if _git(root, "ls-files", "lra/runs/machine.py") else None


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # without optional locks, because hundreds of runs may start at once
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=10, env=environment
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_bytes() -> int | None:
    """Peak memory of the first device in bytes; on a CPU, peak resident memory of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_name() -> str:
    """Model name of the CPU, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cores() -> int:
    """Number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
