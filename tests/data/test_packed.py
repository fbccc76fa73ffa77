"""Files of a packed store that are damaged or come from elsewhere: one line, nothing else."""

import copy
import json
import os
import shutil
from contextlib import suppress

import numpy as np
import pytest
from deadline import deadline
from tiny_listops import SIZES, listops

from lra.data.inspect import info_lines
from lra.data.packed import open_store
from lra.data.store import prepare
from lra.errors import DataError
from lra.tasks.base import SPLITS

# fields that tell of the origin, and whose other values change no example
DESCRIPTIVE = ("source", "notes", "reference", "source_files", "fingerprint", "versions", "partial")
WRONG = (None, True, -1, 2**70, 0.5, "", "../../x", "\x1b[2J", [], {"a": [[]]})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare(listops(), tmp_path_factory.mktemp("store"))


@pytest.fixture
def root(store, tmp_path):
    """A data root with a copy of the store."""
    shutil.copytree(store.path, tmp_path / "packed" / store.path.name)
    return tmp_path


def places(node, place=()):
    """The path of each field of a JSON value, the whole included, and of the first of each list."""
    yield place
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node[:1]):
            yield from places(value, (*place, key))


def replaced(node, place, value):
    if not place:
        return value
    node = copy.copy(node)
    node[place[0]] = replaced(node[place[0]], place[1:], value)
    return node


def check_one_line(message):
    assert message.isprintable()
    assert "delete the folder" in message
    assert "`lra data prepare listops_short`" in message


def test_any_wrong_field_of_a_manifest_is_one_line_or_harmless(store, root):
    """Each field is replaced by each of ten wrong values."""
    (path,) = (root / "packed").iterdir()
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    refused = 0
    for place in places(manifest):
        for value in WRONG:
            file.write_text(json.dumps(replaced(manifest, place, value)))
            with deadline(5):
                try:
                    found = prepare(listops(), root)
                except DataError as error:
                    check_one_line(str(error))
                    refused += 1
                    continue
            assert place[0] in DESCRIPTIVE
            for name in SPLITS:
                assert np.array_equal(found.splits[name].inputs, store.splits[name].inputs)
        assert "\n" not in "".join(info_lines(listops(), "strict", root))
    assert refused > 300


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"null", b'"x"', b"NaN", b'{"task": "\\ud800"}'],
)
def test_manifest_that_is_no_json_object_is_one_line(root, content):
    (path,) = (root / "packed").iterdir()
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="manifest.json cannot be read") as caught:
        prepare(listops(), root)
    check_one_line(str(caught.value))
    assert "DAMAGED" in "".join(info_lines(listops(), "strict", root))


@pytest.mark.parametrize(
    "field", ["task", "splits", "versions", "key", "vocab", "partial", "reference"]
)
def test_missing_field_is_named(root, field):
    (path,) = (root / "packed").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest[field]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"cannot be read: {field}: Field required"):
        prepare(listops(), root)


@pytest.mark.parametrize("accuracy", [36.3, -0.1])
def test_reference_line_that_is_no_fraction_is_refused(root, accuracy):
    """A record would not hold it."""
    (path,) = (root / "packed").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["reference"]["majority"] = accuracy
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="cannot be read: reference.majority: Input should be"):
        prepare(listops(), root)


@pytest.mark.parametrize(
    ("field", "value"),
    [("task", "copy"), ("seq_len", 64), ("num_classes", 11), ("vocab", ["<pad>"]), ("dual", True)],
)
def test_manifest_of_another_task_is_refused(root, field, value):
    (path,) = (root / "packed").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(DataError):
        prepare(listops(), root)


def test_split_described_as_another_one_is_refused(root):
    """`same_as` would let a run train on its test split."""
    (path,) = (root / "packed").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    for other in ("test", "other"):
        manifest["splits"]["train"]["same_as"] = other
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=f"train is the same as '{other}'"):
            open_store(path)
    manifest["splits"]["train"] = manifest["splits"]["test"] | {"same_as": "test"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="describes another task: splits"):
        prepare(listops(), root)


def rewrite(file, array, manifest_file):
    """Replace an array and its size in the manifest."""
    np.save(file, array, allow_pickle=True)
    manifest = json.loads(manifest_file.read_text())
    name, kind, _ = file.name.split(".")
    manifest["splits"][name]["bytes"][kind] = file.stat().st_size
    manifest_file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["inputs", "lengths", "labels"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.astype(np.float32),
        lambda x: x.astype(">i8"),
        lambda x: x.astype(bool),
        lambda x: x[:-1],
        lambda x: x[..., None],
        lambda x: x.ravel()[0],
        lambda x: np.array([{}] * len(x)),
    ],
)
def test_array_of_another_type_or_shape_is_one_line(root, kind, spoil):
    (path,) = (root / "packed").iterdir()
    file = path / f"val.{kind}.npy"
    rewrite(file, spoil(np.load(file)), path / "manifest.json")
    with deadline(5), pytest.raises(DataError) as caught:
        prepare(listops(), root)
    check_one_line(str(caught.value))


def test_any_damage_of_a_header_is_one_line(root):
    """Each byte of a header set to each of two values, at the size of the file."""
    (path,) = (root / "packed").iterdir()
    file = path / "val.labels.npy"
    content, rows = file.read_bytes(), SIZES["val"]
    for place in range(len(content) - rows):
        for byte in (0, ord("9")):
            file.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            with suppress(DataError):
                found = prepare(listops(), root).splits["val"].labels
                assert np.array_equal(found, np.load(file))
    file.write_bytes(content)
    prepare(listops(), root)


@pytest.mark.parametrize("name", ["manifest.json", "train.inputs.npy", "val.labels.npy"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to itself"])
def test_file_that_is_no_file_is_one_line(root, name, kind):
    (path,) = (root / "packed").iterdir()
    (path / name).unlink()
    make = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "device": lambda x: os.symlink("/dev/null", x),
        "link to itself": lambda x: os.symlink(x, x),
    }[kind]
    make(path / name)
    with deadline(5), pytest.raises(DataError) as caught:
        prepare(listops(), root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_store_that_is_no_folder_is_one_line(root, kind):
    (path,) = (root / "packed").iterdir()
    shutil.rmtree(path)
    os.mkfifo(path) if kind == "pipe" else path.write_text("x")
    with deadline(5), pytest.raises(DataError):
        prepare(listops(), root)
    assert "DAMAGED" in "".join(info_lines(listops(), "strict", root))
