"""Batches of CIFAR-10 are unpickled, and no code in a pickle runs."""

import collections
import os
import pickle

import numpy as np
import pytest

from lra.errors import DataError
from lra.sources.pickles import restricted_pickle


@pytest.mark.parametrize("old", [True, False])
def test_restricted_pickle_reads_a_batch(tmp_path, old):
    data = np.arange(6, dtype=np.uint8).reshape(2, 3)
    written = pickle.dumps({b"data": data, b"labels": [1, 2]}, protocol=2)
    new_name = np.zeros(1).__reduce__()[0].__module__.encode()
    written = written.replace(new_name, b"numpy.core.multiarray") if old else written
    assert (b"numpy.core." in written) == old
    (tmp_path / "batch").write_bytes(written)
    batch = restricted_pickle(tmp_path / "batch")
    np.testing.assert_array_equal(batch[b"data"], data)
    assert batch[b"data"].dtype == np.uint8
    assert batch[b"labels"] == [1, 2]


def test_restricted_pickle_reads_what_python_2_wrote(tmp_path):
    # {"labels": [3], "data": the bytes of one string}: strings of Python 2 are bytes here
    (tmp_path / "batch").write_bytes(b"\x80\x02}(U\x06labels](K\x03eU\x04dataU\x02\xff\x00u.")
    assert restricted_pickle(tmp_path / "batch") == {b"labels": [3], b"data": b"\xff\x00"}


class Evil:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.mkdir, collections.OrderedDict, eval, np.load])
def test_malicious_pickle_is_refused(tmp_path, protocol, function):
    path, created = tmp_path / "batch", tmp_path / "created"
    path.write_bytes(pickle.dumps({b"data": Evil(function, str(created))}, protocol))
    with pytest.raises(DataError, match=f"batch: refused.*{function.__name__}"):
        restricted_pickle(path)
    assert not created.exists()


def test_codecs_of_a_pickle_are_refused(tmp_path):
    (tmp_path / "batch").write_bytes(
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    )
    with pytest.raises(DataError, match="refused.*rot13"):
        restricted_pickle(tmp_path / "batch")


@pytest.mark.parametrize(
    "content", [b"", b"hello", pickle.dumps({b"x": list(range(99))}, 2)[:-40], pickle.dumps([1])]
)
def test_damaged_pickle(tmp_path, content):
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(DataError, match="batch.*fetch it again"):
        restricted_pickle(tmp_path / "batch")
