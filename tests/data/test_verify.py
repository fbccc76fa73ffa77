"""What is checked before a store is used: ranges always, hashes as `data.verify` says."""

import os

import numpy as np
import pytest
from tiny import TINY
from tiny_listops import listops

import lra
from lra.cli import main
from lra.config.build import build_task
from lra.data import verify as verify_module
from lra.data.inspect import verify_lines
from lra.data.packed import open_store
from lra.data.store import prepare
from lra.data.verify import verify
from lra.errors import DataError, LraError
from lra.training.setup import load_store


def change(path, name, row, value):
    """Write `value` into a row of an array of a store; size and modification time stay."""
    file = path / f"{name}.npy"
    status, array = file.stat(), np.load(file)
    array[row] = value
    np.save(file, array)
    assert file.stat().st_size == status.st_size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def path(tmp_path):
    return prepare(listops(), tmp_path).path


@pytest.fixture
def hashed(monkeypatch):
    """Counts the splits whose hash is computed."""
    calls, describe = [], verify_module.describe_split
    monkeypatch.setattr(
        verify_module, "describe_split", lambda *args: calls.append(args) or describe(*args)
    )
    return calls


@pytest.mark.parametrize("mode", ["always", "auto", "never"])
@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("train.inputs", 18, r"train\.inputs\.npy, row 7: 18, expected 0 to 17"),
        ("val.lengths", -1, r"val\.lengths\.npy, row 7: -1, expected 0 to 136"),
        ("test.lengths", 137, r"test\.lengths\.npy, row 7: 137, expected 0 to 136"),
        ("test.labels", 255, r"test\.labels\.npy, row 7: 255, expected 0 to 9"),
    ],
)
def test_value_out_of_range_is_refused(tmp_path, path, mode, array, value, message):
    change(path, array, 7, value)
    with pytest.raises(DataError, match=rf"{message}; delete the folder {path} and run `lra data "):
        prepare(listops(), tmp_path, verify=mode)


def test_damaged_value_in_range_is_refused_by_its_hash(tmp_path, path):
    change(path, "train.labels", slice(None), 3)
    for mode in ("always", "auto"):
        with pytest.raises(DataError, match=r"train: labels is \[0, 0, 0, 60"):
            prepare(listops(), tmp_path, verify=mode)
    assert prepare(listops(), tmp_path, verify="never").splits["train"].labels[0] == 3


def test_hashes_of_a_small_store_are_checked_at_every_start(tmp_path, path, hashed):
    for _ in range(2):
        prepare(listops(), tmp_path)
    assert len(hashed) == 6


def test_hashes_of_a_large_store_are_checked_once_for_each_state(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(verify_module, "SMALL_BYTES", 0)
    path = prepare(listops(), tmp_path).path  # just written: nothing to check
    prepare(listops(), tmp_path)
    assert hashed == []
    prepare(listops(), tmp_path, verify="always")
    assert len(hashed) == 3
    os.utime(path / "val.labels.npy", ns=(1, 1))
    for _ in range(2):
        prepare(listops(), tmp_path)
    assert len(hashed) == 6
    change(path, "val.labels", slice(None), 3)
    os.utime(path / "val.labels.npy", ns=(2, 2))
    for _ in range(2):
        with pytest.raises(DataError, match="val: labels is"):
            prepare(listops(), tmp_path)


def test_damaged_memory_is_no_reason_to_believe_or_to_stop(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(verify_module, "SMALL_BYTES", 0)
    path = prepare(listops(), tmp_path).path
    memory = path.with_name(f".{path.name}.verified.json")
    for content in (b"", b"[" * 100_000, b"\xff", b'{"train.labels.npy": null}'):
        memory.write_bytes(content)
        prepare(listops(), tmp_path)
    assert len(hashed) == 12


def test_folder_that_cannot_be_written_is_checked_again(tmp_path, monkeypatch, hashed):
    def full(*_):
        raise LraError("read-only file system")

    monkeypatch.setattr(verify_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(verify_module, "write_atomically", full)
    for _ in range(3):
        prepare(listops(), tmp_path)
    assert len(hashed) == 9


def test_link_to_a_damaged_store_names_the_folder_to_delete(tmp_path, path):
    link = path.with_name("elsewhere")
    path.rename(link)
    path.symlink_to(link.name)
    change(path, "test.labels", 0, 99)
    with pytest.raises(DataError, match=rf"delete the folder {link} and run"):
        prepare(listops(), tmp_path)


def test_training_and_verify_refuse_a_damaged_store(tmp_path, capsys):
    words = [*TINY, f"data.root={tmp_path}"]
    cfg = lra.compose(words)
    path = load_store(cfg, build_task(cfg)).path
    change(path, "train.labels", 0, 255)
    with pytest.raises(DataError, match=r"train\.labels\.npy, row 0: 255"):
        load_store(cfg, build_task(cfg))
    data = [word for word in words if word.startswith(("task.", "data."))]
    assert main(["data", "verify", "listops_short", *data]) == 3
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "train.labels.npy, row 0: 255" in err


def test_verify_lists_what_differs_from_the_manifest(path):
    change(path, "train.labels", slice(None), 3)
    problems = [line for line, wrong in verify_lines(listops(), open_store(path)) if wrong]
    assert problems[0].startswith("  NOT SOUND: train: labels is [0, 0, 0, 60,")
    change(path, "train.labels", 5, 99)
    assert verify(open_store(path)).problems == ("train.labels.npy, row 5: 99, expected 0 to 9",)
