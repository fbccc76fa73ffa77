"""Caches spectral filters on disk between runs.

The folder is `$XDG_CACHE_HOME/lra/filters` (default `~/.cache/lra/filters`), with one .npz per
kind, L and K. A file that does not match its name or its digest is replaced; a folder that cannot
be written is not used. No error of the cache stops a run.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

_VERSION = 1  # part of the file's name; increase it if the filters change
# shorter filters are computed in less time than a shared file system may need
_SHORTEST = 1024

Arrays = tuple[np.ndarray, np.ndarray]


def load_or_compute(
    kind: str, seq_len: int, num_filters: int, compute: Callable[[], Arrays]
) -> Arrays:
    """Eigenvalues (K,) and filters (L, K), from the cache if it has them, else from `compute`."""
    if seq_len < _SHORTEST:
        return compute()
    file = cache_folder() / f"{kind}-L{seq_len}-K{num_filters}-v{_VERSION}.npz"
    found = _read(file, seq_len, num_filters)
    if found is None:
        found = compute()
        _write(file, *found)
    return found


def cache_folder() -> Path:
    """`lra/filters` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores relative paths; expanduser does not fail if there is no home.
    return Path(root if os.path.isabs(root) else os.path.expanduser("~/.cache")) / "lra" / "filters"


def _read(file: Path, seq_len: int, num_filters: int) -> Arrays | None:
    try:
        # opened here, because NumPy does not close a file that is a truncated archive
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            sigma, phi, digest = data["sigma"], data["phi"], str(data["digest"])
    except Exception:  # a damaged file raises many exceptions; all mean: compute the filters
        return None
    fits = (
        sigma.shape == (num_filters,)
        and phi.shape == (seq_len, num_filters)
        and sigma.dtype == phi.dtype == np.float64
    )
    return (sigma, phi) if fits and digest == _digest(sigma, phi) else None


def _write(file: Path, sigma: np.ndarray, phi: np.ndarray) -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        # A temporary name first, so that concurrent readers find a complete file or none.
        handle, name = tempfile.mkstemp(prefix=file.stem, suffix=".tmp", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(stream, sigma=sigma, phi=phi, digest=_digest(sigma, phi))
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise


def _digest(sigma: np.ndarray, phi: np.ndarray) -> str:
    return hashlib.sha256(sigma.tobytes() + phi.tobytes()).hexdigest()
