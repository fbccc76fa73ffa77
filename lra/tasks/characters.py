"""Which id does a byte or a character get? The two encodings of Text and Retrieval, their vocabularies fixed in here."""

import numpy as np
from jaxtyping import Float, Integer, UInt8, UInt16

UNK, EOS = 1, 2  # 0 is padding

# The 131 characters that occur at least 15 times in IMDB's 25,000 train reviews, each cut to its first 4095 characters and
# otherwise as it is (`<br />` and the C1 control characters of cp1252 kept): what S4 counts (`min_freq` of torchtext
# admits 15). The rarest are \ (17), \x84 (17) and | (16), the next are · (14) and ¦ (14), which are left out. Counted
# over whole reviews there would be two more, \x8e and \x9e (18 each). S4 numbers them by frequency; ours are sorted by
# code point, a permutation, so that no counting is needed to know an id.
IMDB_CHARACTERS = (
    "\t"
    " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
    "\x84\x85\x91\x96\x97¡£¨«\u00b4»½àáâãäåçèéêëíïñóôöúü"
    "\u2013\u2019\u201c\u201d"
)
# With pad, unk and eos that makes 134, the rows of S4's embedding. S5 and the JAX code that follows it have 135 inputs, the
# figure in a comment of S4, and never use the last: it would be S4's fourth special token, which S4's settings leave out.
# It has an id here, so that a model has the published size, and occurs nowhere.
IMDB_UNUSED = ("<bos>",)

# 98 with pad, unk and eos is published; that the 95 are the printable ASCII is our reading, the official file is not at
# hand: Retrieval's notes say how many characters became unk.
AAN_CHARACTERS = "".join(map(chr, range(32, 127)))

ROWS_PER_COUNT = 256


class Bytes:
    """lra2020: UTF-8 bytes, id = byte + 1."""

    bag = "bag_of_bytes"  # what a reference line that counts ids is called
    vocab = ("<pad>", *(chr(byte) if 32 <= byte < 127 else f"<{byte:02x}>" for byte in range(256)))

    def encode(self, text: bytes, limit: int) -> UInt16[np.ndarray, " L"]:
        """Ids of the first `limit` bytes.

        Raises:
            UnicodeDecodeError: the text is not UTF-8 (which the ids do not need, but a damaged file shows itself so).
        """
        text.decode()
        return np.frombuffer(text[:limit], np.uint8).astype(np.uint16) + np.uint16(1)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The text of ids, without padding; a character that was cut in the middle shows as U+FFFD."""
        return (ids[ids > 0] - 1).astype(np.uint8).tobytes().decode(errors="replace")


class Characters:
    """s4: pad, unk and eos, then `characters`, then `unused` tokens; any other character is unk."""

    bag = "bag_of_characters"

    def __init__(self, characters: str, unused: tuple[str, ...] = ()):
        self.vocab = ("<pad>", "<unk>", "<eos>", *characters, *unused)
        self._shown = ("", "\ufffd", "", *characters, *("" for _ in unused))
        codes = _code_points(characters)
        self._ids = np.full(
            int(codes.max()) + 2, UNK, np.uint8
        )  # by code point; the last for all that are higher
        self._ids[codes] = np.arange(EOS + 1, EOS + 1 + len(codes))

    def encode(self, text: bytes, limit: int) -> UInt8[np.ndarray, " L"]:
        """Ids of the first `limit` - 1 characters, then eos.

        Raises:
            UnicodeDecodeError: the text is not UTF-8.
        """
        codes = _code_points(text.decode()[: limit - 1])
        return np.append(self._ids[np.minimum(codes, len(self._ids) - 1)], np.uint8(EOS))

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The text of ids, without padding and eos; an unknown character shows as U+FFFD."""
        return "".join(self._shown[i] for i in ids.tolist())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def frequencies(inputs: Integer[np.ndarray, "n L"], vocab_size: int) -> Float[np.ndarray, "n ids"]:
    """How often each id occurs in each row, as a share of the row's length; without padding's, id 0."""
    shares = np.empty((len(inputs), vocab_size - 1))
    for first in range(0, len(inputs), ROWS_PER_COUNT):
        ids = np.asarray(inputs[first : first + ROWS_PER_COUNT], np.int64)
        cells = ids + vocab_size * np.arange(len(ids))[:, None]
        counts = np.bincount(cells.ravel(), minlength=vocab_size * len(ids)).reshape(
            len(ids), vocab_size
        )[:, 1:]
        shares[first : first + ROWS_PER_COUNT] = counts / counts.sum(axis=1, keepdims=True)
    return shares
