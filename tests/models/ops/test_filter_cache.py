"""The cache of filters on disk: reused, replaced if damaged, and never fatal."""

import os
import subprocess
import sys

import numpy as np
import pytest

from models.ops import filter_cache
from models.ops.filter_cache import cache_folder, load_or_compute


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lra" / "filters"


def arrays(length=1024, num=3):
    rng = np.random.default_rng(0)
    return rng.uniform(size=num), rng.normal(size=(length, num))


def counted(make=arrays):
    calls = []

    def called():
        calls.append(1)
        return make()

    return called, calls


def test_second_process_finds_what_the_first_made(cache):
    code = (
        "from models.ops.filters import spectral_filters as f; import hashlib; "
        "print(hashlib.md5(f(1024, 5)[1]).hexdigest())"
    )

    def run():
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout

    first = run()
    (file,) = cache.iterdir()
    assert file.name == "hankel-L1024-K5-v1.npz"
    written = file.stat().st_mtime_ns
    assert run() == first
    assert file.stat().st_mtime_ns == written


def test_kept_arrays_come_back_bit_by_bit_without_being_made():
    first = load_or_compute("hankel", 1024, 3, arrays)
    make, calls = counted()
    again = load_or_compute("hankel", 1024, 3, make)
    assert not calls
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_kinds_and_sizes_do_not_meet(cache):
    load_or_compute("hankel", 1024, 3, arrays)
    for kind, length, num in (("alternative", 1024, 3), ("hankel", 1025, 3), ("hankel", 1024, 2)):
        make, calls = counted(lambda length=length, num=num: arrays(length, num))
        load_or_compute(kind, length, num, make)
        assert calls
    assert len(list(cache.iterdir())) == 4


def cut(file):
    file.write_bytes(file.read_bytes()[:5000])


def emptied(file):
    file.write_bytes(b"")


def text(file):
    file.write_text("no filters here")


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def another_length(file):
    sigma, phi = arrays(1030)
    filter_cache._write(file, sigma, phi)


def without_digest(file):
    sigma, phi = arrays()
    with file.open("wb") as stream:
        np.savez(stream, sigma=sigma, phi=phi + 1)


def other_content(file):
    with np.load(file) as data:
        digest = data["digest"]
    sigma, phi = arrays()
    with file.open("wb") as stream:
        np.savez(stream, sigma=sigma, phi=phi + 1e-9, digest=digest)


def one_array(file):
    with file.open("wb") as stream:
        np.save(stream, arrays()[1])


def pickled(file):
    with file.open("wb") as stream:
        np.savez(stream, sigma=np.array([None]), phi=np.array([None]), digest="")


DAMAGES = (
    cut,
    emptied,
    text,
    flipped,
    another_length,
    without_digest,
    other_content,
    one_array,
    pickled,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_file_is_made_again_and_replaced(damage, cache):
    load_or_compute("hankel", 1024, 3, arrays)
    (file,) = cache.iterdir()
    damage(file)
    make, calls = counted()
    _, phi = load_or_compute("hankel", 1024, 3, make)
    assert calls
    np.testing.assert_array_equal(phi, arrays()[1])
    load_or_compute("hankel", 1024, 3, make)
    assert len(calls) == 1


def test_a_folder_that_cannot_be_made_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _, phi = load_or_compute("hankel", 1024, 3, arrays)
    np.testing.assert_array_equal(phi, arrays()[1])


def test_a_full_disk_leaves_nothing_behind(monkeypatch, cache):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    _, phi = load_or_compute("hankel", 1024, 3, arrays)
    np.testing.assert_array_equal(phi, arrays()[1])
    assert list(cache.iterdir()) == []


def test_short_filters_are_not_kept(cache):
    make, calls = counted(lambda: arrays(1023))
    for _ in range(2):
        load_or_compute("hankel", 1023, 3, make)
    assert len(calls) == 2
    assert not cache.exists()


def test_relative_and_missing_caches_mean_the_one_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".cache" / "lra" / "filters"
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == home
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == home
