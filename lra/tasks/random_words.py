"""Random words that depend on neither the machine nor NumPy's version."""

import numpy as np
from jaxtyping import UInt32


def random_stream(seed: int, stream: int) -> np.random.Philox:
    """The generator with the 128-bit key (seed, stream), whose raw words NumPy guarantees."""
    return np.random.Philox(key=np.array([seed, stream], np.uint64))


def words32(bits: np.random.Philox, count: int) -> UInt32[np.ndarray, " {count}"]:
    """The next `count` 32-bit words: two of each 64-bit word, the low half first."""
    raw = bits.random_raw((count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[:count].astype(np.uint32, copy=False)
