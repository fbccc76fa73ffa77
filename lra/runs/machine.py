"""Facts about the machine and the software that computed a result."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path


def versions() -> dict[str, str | None]:
    """Versions of what computes the result; null for a package that is not installed. Imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in [
        *((n, n) for n in ("jax", "jaxlib", "flax", "optax", "numpy")),
        ("lra", "lra-jax"),
    ]:
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """Short hash of the checkout this package is in, `+dirty` if code or configs differ from it; None elsewhere.

    A virtual environment inside somebody's repository is not a checkout of ours: git must track this very file.
    """
    root = Path(__file__).resolve().parents[2]
    if _git(root, "ls-files", "--error-unmatch", "lra/runs/machine.py") is None:
        return None
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    changed = _git(root, "status", "--porcelain", "--", "lra", "models", "conf")
    return commit + ("+dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(folder),
        *arguments,
    ]  # hundreds of runs may ask at once
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_bytes() -> int | None:
    """Largest memory in use so far: the device's own count, or this process's resident memory on a CPU."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
