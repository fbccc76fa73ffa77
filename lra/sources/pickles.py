"""Unpickles NumPy arrays only, so that a malicious pickle cannot run code.

The Python batches of CIFAR-10 are pickles. Only the names that NumPy arrays and the bytes of old
protocols need can be resolved; every other name is refused before it is called.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import DataError
from lra.sources.locate import open_source


def restricted_pickle(path: Path) -> dict:
    """Load a Python batch of CIFAR-10: `{b"data": (N, 3072) uint8, b"labels": [N integers], ...}`.

    Raises DataError if the file names anything that an array does not need.
    """
    try:
        with open_source(path) as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except _Refused as error:
        raise DataError(
            f"{path}: refused, since it would call {error}; this is not CIFAR-10, do not open it"
        ) from None
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{path}: cannot be read as a batch of CIFAR-10 ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, expected a dictionary; fetch it again"
        )
    return content


class _Refused(Exception):
    """Holds the name that the pickle would call."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """Decodes bytes of old pickle protocols; `_codecs.encode` itself would accept any codec."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode to {encoding}")
    return text.encode(encoding)


_reconstruct = np.zeros(1).__reduce__()[0]  # NumPy moved it and warns at its old name
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}
