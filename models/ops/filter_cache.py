"""Where are filters kept between runs, and when are the kept ones believed?

In `$XDG_CACHE_HOME/lra/filters` (else `~/.cache/lra/filters`), one .npz per kind, L and K, which carries a digest of its
arrays. A file that does not fit its name or its digest is made again; a folder that cannot be written is not used. Nothing
that happens here stops a run.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

# Part of the file's name: raise it when the filters themselves change.
_VERSION = 1
# Shorter filters are made in less time than a shared file system may take to answer; every LRA task is this long.
_SHORTEST = 1024

Arrays = tuple[np.ndarray, np.ndarray]


def kept(kind: str, seq_len: int, num_filters: int, make: Callable[[], Arrays]) -> Arrays:
    """Eigenvalues (K,) and filters (L, K) from the cache, or from `make` and then into the cache."""
    if seq_len < _SHORTEST:
        return make()
    file = folder() / f"{kind}-L{seq_len}-K{num_filters}-v{_VERSION}.npz"
    found = _read(file, seq_len, num_filters)
    if found is None:
        found = make()
        _write(file, *found)
    return found


def folder() -> Path:
    """`lra/filters` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths; expanduser does not fail where there is no home.
    return Path(root if os.path.isabs(root) else os.path.expanduser("~/.cache")) / "lra" / "filters"


def _read(file: Path, seq_len: int, num_filters: int) -> Arrays | None:
    try:
        # Opened here, since NumPy leaves a file that is no whole archive open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            sigma, phi, digest = data["sigma"], data["phi"], str(data["digest"])
    except Exception:  # damage shows in many ways, and all mean that the filters are to be made
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
        # Under another name first: whoever reads at the same time finds a whole file or none.
        handle, name = tempfile.mkstemp(prefix=file.stem, suffix=".tmp", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(stream, sigma=sigma, phi=phi, digest=_digest(sigma, phi))
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise


def _digest(sigma: np.ndarray, phi: np.ndarray) -> str:
    return hashlib.sha256(
        np.ascontiguousarray(sigma).tobytes() + np.ascontiguousarray(phi).tobytes()
    ).hexdigest()
