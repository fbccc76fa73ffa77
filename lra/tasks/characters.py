"""Encodes text as bytes or characters for Text and Retrieval; the vocabularies are constants."""

import numpy as np
from jaxtyping import Float, Integer, UInt8, UInt16

UNK, EOS = 1, 2  # 0 is padding

# The 131 characters that occur at least 15 times in IMDB's 25,000 train reviews, each cut to its
# first 4095 characters and otherwise unchanged (`<br />` and the C1 control characters of cp1252
# are kept): the vocabulary that S4 counts (`min_freq` of torchtext includes 15). The rarest are
# \ (17), \x84 (17) and | (16); the next are · (14) and ¦ (14), which are left out. Whole reviews
# would add two, \x8e and \x9e (18 each). S4 numbers the characters by frequency. Ours are sorted
# by code point, a permutation, so that ids are known without counting.
IMDB_CHARACTERS = (
    "\t"
    " !\"#$%&'()*+,-./0123456789:;<=>?@"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
    "\x84\x85\x91\x96\x97¡£¨«\u00b4»½àáâãäåçèéêëíïñóôöúü"
    "\u2013\u2019\u201c\u201d"
)
# With pad, unk and eos this makes 134, the rows of S4's embedding. S5 and the JAX code that follows
# it have 135 inputs, the figure in a comment of S4, and never use the last: it would be S4's fourth
# special token, which S4's settings omit. It has an id here, so that a model has the published
# size, and never occurs.
IMDB_UNUSED = ("<bos>",)

# 98 with pad, unk and eos is published. That the 95 are the printable ASCII is our assumption,
# since the official file was not available. Retrieval's notes count the characters mapped to unk.
AAN_CHARACTERS = "".join(map(chr, range(32, 127)))

ROWS_PER_COUNT = 256


class Bytes:
    """lra2020: UTF-8 bytes, id = byte + 1."""

    baseline = "bag_of_bytes"  # name of the reference line that counts ids
    vocab = ("<pad>", *(chr(byte) if 32 <= byte < 127 else f"<{byte:02x}>" for byte in range(256)))

    def encode(self, text: bytes, limit: int) -> UInt16[np.ndarray, " L"]:
        """Ids of the first `limit` bytes."""
        text.decode()  # detects a damaged file, although the ids do not need it
        return np.frombuffer(text[:limit], np.uint8).astype(np.uint16) + np.uint16(1)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The text of ids, without padding; a character cut in the middle becomes U+FFFD."""
        return (ids[ids > 0] - 1).astype(np.uint8).tobytes().decode(errors="replace")


class Characters:
    """s4: pad, unk and eos, then `characters`, then `unused` tokens; other characters are unk."""

    baseline = "bag_of_characters"

    def __init__(self, characters: str, unused: tuple[str, ...] = ()):
        self.vocab = ("<pad>", "<unk>", "<eos>", *characters, *unused)
        self._shown = ("", "\ufffd", "", *characters, *("" for _ in unused))
        codes = _code_points(characters)
        # indexed by code point; the last entry is for all higher ones
        self._ids = np.full(int(codes.max()) + 2, UNK, np.uint8)
        self._ids[codes] = np.arange(EOS + 1, EOS + 1 + len(codes))

    def encode(self, text: bytes, limit: int) -> UInt8[np.ndarray, " L"]:
        """Ids of the first `limit` - 1 characters, then eos."""
        codes = _code_points(text.decode()[: limit - 1])
        return np.append(self._ids[np.minimum(codes, len(self._ids) - 1)], np.uint8(EOS))

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The text of ids, without padding and eos; an unknown character becomes U+FFFD."""
        return "".join(self._shown[i] for i in ids.tolist())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def frequencies(inputs: Integer[np.ndarray, "n L"], vocab_size: int) -> Float[np.ndarray, "n ids"]:
    """Share of each id (except padding, id 0) among the ids of each row."""
    shares = np.empty((len(inputs), vocab_size - 1))
    for first in range(0, len(inputs), ROWS_PER_COUNT):
        ids = np.asarray(inputs[first : first + ROWS_PER_COUNT], np.int64)
        cells = ids + vocab_size * np.arange(len(ids))[:, None]
        counts = np.bincount(cells.ravel(), minlength=vocab_size * len(ids))
        counts = counts.reshape(len(ids), vocab_size)[:, 1:]
        shares[first : first + ROWS_PER_COUNT] = counts / counts.sum(axis=1, keepdims=True)
    return shares
