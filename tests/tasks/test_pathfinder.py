"""Pathfinder: the release's files in all their forms, generation, interruptions, export."""

import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import joblib
import numpy as np
import pytest
import tiny_pictures
from configured_task import configured_task
from deadline import deadline
from PIL import Image

from lra.data.store import Split, prepare, settings_key
from lra.data.verify import verify
from lra.errors import ConfigError, DataError, LraError
from lra.tasks import pathfinder
from lra.tasks.base import SPLITS, permutation
from lra.tasks.parallel import parallel_map
from lra.tasks.pathfinder import (
    Batch,
    generate,
    load_chunk,
    read_metadata,
    refuse_repeats,
)
from lra.tasks.pathfinder_generator import draw

PROTOCOLS = {
    "lra2020": {"inputs": "lra2020", "shuffle": False},
    "strict": {"inputs": "s4", "shuffle": True},
}
SIZES = {"train": 44, "val": 8, "test": 8}


def make_task(config="pathfinder", protocol="strict", data_root="unused", **changes):
    changes = {"sizes": SIZES} | changes
    return configured_task(config, PROTOCOLS[protocol], data_root, **changes)


def release_task(data_root, protocol="lra2020", **changes):
    return make_task("pathfinder", protocol, data_root, source="release", **changes)


def read(task, split):
    examples = list(task.examples(split))
    pixels = np.array([example.inputs for example in examples])
    return pixels.reshape(-1, *task.picture_shape), np.array(
        [example.label for example in examples]
    )


@pytest.fixture
def threads():
    """Runs parallel work in threads, so that a test can observe it."""
    with joblib.parallel_config(backend="threading"):
        yield


# --- The release ---


@pytest.fixture
def release(tmp_path, threads):
    """Pictures and labels of a release with 12 batches, so that 10 sorts before 2 by name."""
    return tiny_pictures.pathfinder(tmp_path)


def level_folder(data_root, level="hard", size=32):
    return data_root / f"pathfinder{size}" / tiny_pictures.LEVELS[level]


def test_lra2020_cuts_the_release_in_the_order_of_its_files(tmp_path, release):
    pictures, labels = release
    task = release_task(tmp_path)
    for split, part in (("train", slice(0, 44)), ("val", slice(44, 52)), ("test", slice(52, 60))):
        found, classes = read(task, split)
        np.testing.assert_array_equal(found, pictures[part])
        np.testing.assert_array_equal(classes, labels[part])


def test_other_protocols_cut_a_seeded_permutation_and_keep_the_order_of_the_files(
    tmp_path, release
):
    pictures, labels = release
    order = permutation(60, 5)
    parts = {"train": order[:44], "val": order[44:52], "test": order[52:]}
    task = release_task(tmp_path, "strict", data_seed=5)
    for split, part in parts.items():
        found, classes = read(task, split)
        np.testing.assert_array_equal(found, pictures[np.sort(part)])
        np.testing.assert_array_equal(classes, labels[np.sort(part)])
    assert not np.array_equal(read(release_task(tmp_path, "strict", data_seed=6), "test")[0], found)


def test_the_three_splits_decode_each_picture_once(tmp_path, release, monkeypatch):
    decoded = []
    decode = pathfinder.decode_png

    def counted(content, shape, mode, where):
        decoded.append(where)
        return decode(content, shape, mode, where)

    monkeypatch.setattr(pathfinder, "decode_png", counted)
    task = release_task(tmp_path, "strict")
    for split in SPLITS:
        list(task.examples(split))
    assert len(decoded) == len(set(decoded)) == 60


def test_pictures_do_not_depend_on_how_the_reading_is_divided(tmp_path, release, monkeypatch):
    expected = read(release_task(tmp_path, "strict"), "train")
    monkeypatch.setattr(pathfinder, "CALL_BYTES", 2 * 1024)
    monkeypatch.setattr(pathfinder, "CALLS", 3)
    for found, wanted in zip(
        read(release_task(tmp_path, "strict"), "train"), expected, strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_no_more_results_wait_than_asked_for(threads):
    computed = []
    results = parallel_map(lambda i: computed.append(i) or i, [(i,) for i in range(20)], 4)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert sorted(computed) == list(range(8))
    results.close()


def test_other_processes_read_the_same_and_tell_what_is_wrong(tmp_path):
    pictures, _ = tiny_pictures.pathfinder(tmp_path, count=20, per_batch=10)
    sizes = {"train": 16, "val": 2, "test": 2}
    np.testing.assert_array_equal(
        read(release_task(tmp_path, sizes=sizes), "train")[0], pictures[:16]
    )
    (level_folder(tmp_path) / "imgs" / "1" / "sample_3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"imgs/1/sample_3\.png: not a readable PNG"):
        list(release_task(tmp_path, sizes=sizes).examples("train"))


@pytest.mark.parametrize("nesting", [".", "lra_release", "lra_release/lra_release"])
def test_release_is_found_in_any_nesting(tmp_path, nesting, threads):
    pictures, _ = tiny_pictures.pathfinder(tmp_path / nesting)
    task = release_task(tmp_path)
    np.testing.assert_array_equal(read(task, "test")[0], pictures[52:])
    assert task.notes() == []


def test_inner_copy_comes_first_and_the_other_is_noted(tmp_path, threads):
    tiny_pictures.pathfinder(tmp_path / "lra_release", count=10, seed=1)
    pictures, _ = tiny_pictures.pathfinder(tmp_path / "lra_release" / "lra_release")
    task = release_task(tmp_path)
    np.testing.assert_array_equal(read(task, "test")[0], pictures[52:])
    (note,) = task.notes()
    outer = tmp_path / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    assert note.endswith(f"left aside another copy, {outer}")


def test_sizes_and_levels_are_not_confused(tmp_path, release):
    for changes in ({"level": "easy"}, {"size": 64}):
        with pytest.raises(DataError, match=r"no folder pathfinder.*task\.source=generated"):
            release_task(tmp_path, **changes).source_files()


def test_missing_release_says_what_to_get_or_to_generate(tmp_path):
    with pytest.raises(DataError, match=r"lra_release\.gz.*task\.source=generated"):
        prepare(release_task(tmp_path), tmp_path)


def test_metadata_beside_the_batches_is_left_aside(tmp_path, release):
    metadata = level_folder(tmp_path) / "metadata"
    shutil.copy(metadata / "0.npy", metadata / "combined.npy")
    assert [path.name for path in release_task(tmp_path).source_files()] == [
        f"{i}.npy" for i in range(12)
    ]


def test_folder_without_metadata_is_refused(tmp_path, release):
    for path in (level_folder(tmp_path) / "metadata").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no metadata files 0\.npy"):
        release_task(tmp_path).source_files()


ROWS = [["imgs/3", "sample_0.png", "0", "1", "1.8"], ["imgs/3", "sample_1.png", "1", "0", "1.8"]]


@pytest.mark.parametrize(
    "array", [None, np.array(ROWS), np.array(ROWS, "S"), np.asfortranarray(np.array(ROWS))]
)
def test_metadata_is_text_or_a_binary_array_of_strings(tmp_path, array):
    path = tmp_path / "3.npy"
    if array is None:
        path.write_text("".join("  ".join(row) + "\n" for row in ROWS))
    else:
        np.save(path, array)
    batch = read_metadata(path)
    assert batch.files == ["imgs/3/sample_0.png", "imgs/3/sample_1.png"]
    assert batch.labels.tolist() == [1, 0]


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("it-has-run",)


def test_pickled_metadata_is_not_loaded_and_the_way_out_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("0.npy", np.array([[Dangerous()]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"numpy\.savetxt") as caught:
        read_metadata(Path("0.npy"))
    assert not Path("it-has-run").exists()
    np.save(
        "0.npy", np.array([["imgs/0", "sample_0.png", 0, 1, 1.8]], dtype=object), allow_pickle=True
    )
    remedy = re.search(r"numpy\.savetxt\(.*?'%s'\)", str(caught.value))[0]
    eval(remedy, {"numpy": np, "PATH": "0.npy"})
    assert read_metadata(Path("0.npy")).files == ["imgs/0/sample_0.png"]


def test_a_picture_named_twice_is_refused_with_its_row(tmp_path, release):
    metadata = level_folder(tmp_path) / "metadata"
    lines = (metadata / "3.npy").read_text().splitlines(keepends=True)
    (metadata / "3.npy").write_text("".join([*lines, lines[1]]))
    with pytest.raises(
        DataError, match=r"3\.npy, row 5: imgs/3/sample_1\.png again, after 3\.npy, row 1"
    ):
        list(release_task(tmp_path, sizes=SIZES | {"train": 45}).examples("test"))
    (metadata / "3.npy").write_text("".join(lines))
    (metadata / "7.npy").write_text("".join(lines))
    with pytest.raises(
        DataError, match=r"7\.npy, row 0: imgs/3/sample_0\.png again, after 3\.npy, row 0"
    ):
        list(release_task(tmp_path).examples("test"))


def test_equal_names_in_two_folders_are_two_pictures():
    refuse_repeats(
        [
            Batch(Path(f"{i}.npy"), [f"imgs/{i}/sample_0.png"], np.zeros(1, np.uint8))
            for i in range(2)
        ]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"imgs/0 sample_0.png 0 1\nimgs/0 sample_1.png 1\n", "row 1: 3 columns"),
        (b"imgs/0 sample_0.png 0 2 1.8\n", "row 0: label '2' in column 3"),
        (b"imgs/0 sample_0.png 0 1\n\nimgs/0 sample_1.png 1 0\n", "row 1: 0 columns"),
        (b"\x89PNG\r\n", "neither text nor a NumPy array"),
        (b"\x93NUMPY\x01\x00", "cannot be read"),
    ],
)
def test_spoilt_metadata_is_refused_with_its_row(tmp_path, content, message):
    (tmp_path / "4.npy").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_metadata(tmp_path / "4.npy")
    assert "4.npy" in str(caught.value)


def test_numbers_instead_of_strings_are_refused(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((3, 11)))
    with pytest.raises(DataError, match=r"float64 \(3, 11\), expected rows of strings"):
        read_metadata(tmp_path / "0.npy")


GREY = np.arange(1024, dtype=np.uint32).reshape(32, 32) // 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA"])
def test_pictures_in_other_modes_become_grey(tmp_path, release, mode):
    file = level_folder(tmp_path) / "imgs" / "11" / "sample_4.png"
    Image.fromarray(GREY.astype(np.uint8)).convert(mode).save(file)
    np.testing.assert_array_equal(read(release_task(tmp_path), "test")[0][-1], GREY)


def spoil(path, how):
    content = path.read_bytes()
    if how == "another size":
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    elif how == "16 bits":
        Image.fromarray((GREY * 256).astype(np.uint16)).save(path)
    elif how == "missing":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(content[:60] + bytes(50) + content[110:])
    else:
        path.write_bytes({"empty": b"", "cut off": content[:-200], "no picture": b"<html>"}[how])


def test_header_of_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, release):
    path = level_folder(tmp_path) / "imgs" / "10" / "sample_3.png"
    content = path.read_bytes()
    for side in (10_000, 100_000):  # Pillow warns of the first and raises at the second
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        checksum = struct.pack(">I", zlib.crc32(header))
        path.write_bytes(content[:12] + header + checksum + content[33:])
        with pytest.raises(DataError, match=f"a PNG of {side}x{side} in mode L, expected 32x32"):
            list(release_task(tmp_path).examples("test"))


@pytest.mark.parametrize("file", ["../../other.png", "/etc/x.png", "a\0b"])
def test_metadata_that_names_a_file_elsewhere_is_refused(tmp_path, release, file):
    path = level_folder(tmp_path) / "metadata" / "3.npy"
    path.write_text(path.read_text().replace("sample_0.png", file, 1))
    with pytest.raises(DataError, match=r"3\.npy, row 0: .* is no file of this folder"):
        list(release_task(tmp_path).examples("train"))


@pytest.mark.parametrize("name", ["metadata/3.npy", "imgs/3/sample_0.png"])
def test_pipe_in_place_of_a_file_of_the_release(tmp_path, release, name):
    (level_folder(tmp_path) / name).unlink()
    os.mkfifo(level_folder(tmp_path) / name)
    with deadline(10), pytest.raises(DataError, match="is not a regular file"):
        list(release_task(tmp_path).examples("train"))


def test_chunk_that_is_a_pipe_is_drawn_again(tmp_path):
    os.mkfifo(tmp_path / "00000000-00000002.npz")
    with deadline(5):
        assert load_chunk(tmp_path / "00000000-00000002.npz", 2, 32) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another size", "a PNG of 64x64 in mode L, expected 32x32"),
        ("16 bits", "mode I;16, expected 32x32 and 8 bits"),
        ("missing", r"missing, but metadata names it; .*data\.allow_partial=true"),
        ("empty", r"the file is empty; .*data\.allow_partial=true"),
        ("cut off", "not a readable PNG"),
        ("damaged", "not a readable PNG"),
        ("no picture", "not a readable PNG"),
    ],
)
def test_spoilt_picture_is_refused_with_its_name(tmp_path, release, how, message):
    spoil(level_folder(tmp_path) / "imgs" / "10" / "sample_3.png", how)
    with pytest.raises(DataError, match=message) as caught:
        list(release_task(tmp_path).examples("test"))
    assert "imgs/10/sample_3.png" in str(caught.value)


def test_the_empty_file_of_the_easy_level_is_left_out_and_told(tmp_path, threads):
    pictures, labels = tiny_pictures.pathfinder(
        tmp_path, level="easy", count=200, per_batch=180, empty=True
    )
    sizes = {"train": 160, "val": 20, "test": 20}
    task = release_task(tmp_path, level="easy", sizes=sizes)
    assert task.split_sizes() == {"train": 159, "val": 20, "test": 20}
    store = prepare(task, tmp_path)  # refuses other counts
    kept = np.delete(np.arange(200), 172)
    for split, part in (("train", kept[:159]), ("val", kept[159:179]), ("test", kept[179:])):
        np.testing.assert_array_equal(
            store.splits[split].inputs, pictures[part].reshape(len(part), -1)
        )
        np.testing.assert_array_equal(store.splits[split].labels, labels[part])
    assert "sample_172.png is empty" in store.manifest["notes"][0]


def test_no_other_level_has_an_empty_file(tmp_path, threads):
    tiny_pictures.pathfinder(tmp_path, count=200, per_batch=180, empty=True)
    task = release_task(tmp_path, sizes={"train": 160, "val": 20, "test": 20})
    with pytest.raises(DataError, match=r"sample_172\.png: the file is empty"):
        list(task.examples("val"))


def test_a_part_of_the_release_is_refused_or_cut_in_proportion(tmp_path, threads):
    tiny_pictures.pathfinder(tmp_path, count=30)
    with pytest.raises(DataError, match="22 examples in train"):
        prepare(release_task(tmp_path), tmp_path)
    store = prepare(release_task(tmp_path), tmp_path, allow_partial=True)
    assert [len(store.splits[split]) for split in SPLITS] == [22, 4, 4]


def spoil_some(data_root):
    """Remove or empty pictures 0, 7 and all of batch 3; returns the indices of the others."""
    images = level_folder(data_root) / "imgs"
    (images / "0" / "sample_0.png").unlink()
    (images / "1" / "sample_2.png").write_bytes(b"")
    shutil.rmtree(images / "3")
    return np.delete(np.arange(60), [0, 7, *range(15, 20)])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_splits_are_cut_from_the_pictures_that_are_there(tmp_path, release, protocol):
    pictures, labels = release
    kept = spoil_some(tmp_path)
    with pytest.raises(DataError, match=r"data\.allow_partial=true"):
        prepare(release_task(tmp_path, protocol), tmp_path)
    store = prepare(release_task(tmp_path, protocol), tmp_path, allow_partial=True)
    assert store.manifest["partial"]
    assert store.manifest["notes"] == [
        "7 pictures that metadata names are missing or empty: left out"
    ]
    order = np.arange(53) if protocol == "lra2020" else permutation(53, 0)
    for split, part in (("train", order[:39]), ("val", order[39:46]), ("test", order[46:])):
        rows = kept[np.sort(part)]
        np.testing.assert_array_equal(
            store.splits[split].inputs, pictures[rows].reshape(len(rows), -1)
        )
        np.testing.assert_array_equal(store.splits[split].labels, labels[rows])


def test_pictures_that_arrive_later_make_another_store(tmp_path, release):
    pictures, _ = release
    spoil_some(tmp_path)
    first = prepare(release_task(tmp_path), tmp_path, allow_partial=True)
    Image.fromarray(pictures[0]).save(level_folder(tmp_path) / "imgs" / "0" / "sample_0.png")
    second = prepare(release_task(tmp_path), tmp_path, allow_partial=True)
    assert second.path.resolve() != first.path.resolve()
    assert sum(map(len, second.splits.values())) == 1 + sum(map(len, first.splits.values()))


def test_pictures_are_looked_for_by_folder_and_only_where_asked(tmp_path, release, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda folder: listed.append(Path(folder)) or scandir(folder)
    )
    for allow_partial, expected in ((False, []), (True, [str(i) for i in range(12)])):
        listed.clear()
        task = release_task(tmp_path)
        task.allow_partial = allow_partial
        for split in SPLITS:
            list(task.examples(split))
        assert [folder.name for folder in listed if folder.parent.name == "imgs"] == expected
        assert task.notes() == []


def test_no_picture_at_all_is_refused(tmp_path, release):
    shutil.rmtree(level_folder(tmp_path) / "imgs")
    (level_folder(tmp_path) / "imgs").mkdir()
    with pytest.raises(DataError, match="0 examples in train"):
        prepare(release_task(tmp_path), tmp_path, allow_partial=True)


def test_more_pictures_than_expected_are_refused(tmp_path, release):
    with pytest.raises(DataError, match=r"60 pictures, more than the 40 of task\.sizes"):
        list(release_task(tmp_path, sizes={"train": 32, "val": 4, "test": 4}).examples("train"))


def test_store_of_the_release_knows_its_files(tmp_path, release):
    store = prepare(release_task(tmp_path, "strict"), tmp_path)
    assert verify(store).problems == ()
    hashes = {entry["name"]: entry["sha256"] for entry in store.manifest["source_files"]}
    assert list(hashes) == [
        *(f"{i}.npy" for i in range(12)),
        *(f"pictures of {split}" for split in SPLITS),
    ]
    assert store.manifest["source"] == "release"
    file = level_folder(tmp_path) / "imgs" / "0" / "sample_0.png"
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    task = release_task(tmp_path, "strict")
    for split in SPLITS:
        list(task.examples(split))
    again = {entry["name"]: entry["sha256"] for entry in task.source_hashes()}
    assert (
        sum(again[name] != hashes[name] for name in hashes) == 1
    )  # of the split which has that picture


# --- Generated ---


def test_generated_pictures_are_one_stream_with_test_first(tmp_path, threads):
    task = make_task(data_root=tmp_path, level="easy")
    images, labels = draw(0, 60, 32, "easy", 0)
    for split, part in (("test", slice(0, 8)), ("val", slice(8, 16)), ("train", slice(16, 60))):
        found, classes = read(task, split)
        np.testing.assert_array_equal(found, images[part])
        np.testing.assert_array_equal(classes, labels[part])
    more = make_task(data_root=tmp_path, level="easy", sizes=SIZES | {"train": 50})
    np.testing.assert_array_equal(read(more, "test")[0], images[:8])
    np.testing.assert_array_equal(read(more, "train")[0][:44], images[16:])


def test_protocols_share_generated_pictures_but_not_the_cut_of_the_release():
    keys = {
        (protocol, source): settings_key(make_task("pathfinder", protocol, source=source))
        for protocol in PROTOCOLS
        for source in ("generated", "release")
    }
    assert keys["lra2020", "generated"] == keys["strict", "generated"]
    assert len(set(keys.values())) == 3


@pytest.fixture
def drawn(threads, monkeypatch):
    """Sets chunks of ten pictures and lists the drawn ones."""
    calls = []

    def counted(first, last, *settings):
        calls.append((first, last))
        return draw(first, last, *settings)

    monkeypatch.setattr(pathfinder, "draw", counted)
    monkeypatch.setattr(pathfinder, "PICTURES_PER_CHUNK", 10)
    return calls


def test_interrupted_preparation_goes_on(tmp_path, drawn, monkeypatch):
    task = make_task(data_root=tmp_path, level="easy")
    expected = read(task, "train")
    assert sorted(drawn) == [(16, 26), (26, 36), (36, 46), (46, 56), (56, 60)]
    chunks = sorted((tmp_path / "generated").glob("*/*"))
    assert [chunk.parent.name for chunk in chunks] == ["32-easy-0-44-8-8-v1"] * 5

    chunks[0].unlink()
    chunks[1].write_bytes(chunks[1].read_bytes()[:-100])
    chunks[2].write_bytes(b"")
    np.savez(chunks[3], images=np.zeros((10, 16, 16), np.uint8), labels=np.zeros(10, np.uint8))
    del drawn[:]
    for found, wanted in zip(
        read(make_task(data_root=tmp_path, level="easy"), "train"), expected, strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    assert sorted(drawn) == [(16, 26), (26, 36), (36, 46), (46, 56)]


def test_complete_store_leaves_no_chunks(tmp_path, drawn):
    interrupted = make_task(data_root=tmp_path, level="easy")
    list(interrupted.examples("train"))
    store = prepare(make_task(data_root=tmp_path, level="easy"), tmp_path)
    assert len(drawn) == 5 + 2  # train was there, val and test are a chunk each
    assert not (tmp_path / "generated").exists()
    assert verify(store).problems == ()
    assert store.manifest["source_files"] == []


def test_a_small_store_leaves_the_chunks_of_an_unfinished_large_one(tmp_path, drawn):
    list(make_task(data_root=tmp_path, level="easy").examples("train"))
    small = make_task(data_root=tmp_path, level="easy", sizes={"train": 4, "val": 8, "test": 8})
    prepare(small, tmp_path)
    del drawn[:]
    prepare(make_task(data_root=tmp_path, level="easy"), tmp_path)
    assert sorted(drawn) == [(0, 8), (8, 16)]  # train was there


def test_chunks_removed_by_another_process_are_drawn_again(tmp_path, drawn, monkeypatch):
    expected = read(make_task(data_root=tmp_path, level="easy"), "val")
    load = load_chunk

    def removed_meanwhile(path, count, size):
        shutil.rmtree(path.parent, ignore_errors=True)
        return load(path, count, size)

    monkeypatch.setattr(pathfinder, "load_chunk", removed_meanwhile)
    for found, wanted in zip(
        read(make_task(data_root=tmp_path, level="easy"), "val"), expected, strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_exported_pictures_are_read_back(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(pathfinder, "PICTURES_PER_BATCH", 7)
    generated = make_task(data_root=tmp_path)
    splits = {}
    for split in SPLITS:
        pictures, labels = read(generated, split)
        splits[split] = Split(
            pictures.reshape(-1, 1024),
            np.full(len(labels), 1024, np.int32),
            labels.astype(np.uint8),
        )
    assert generated.export(splits, tmp_path / "out") == tmp_path / "out"
    released = release_task(tmp_path / "out")
    for split in SPLITS:
        pictures, labels = read(released, split)
        np.testing.assert_array_equal(pictures.reshape(-1, 1024), splits[split].inputs)
        np.testing.assert_array_equal(labels, splits[split].labels)
    row = (level_folder(tmp_path / "out") / "metadata" / "8.npy").read_text().splitlines()[3]
    assert row == f"imgs/8 sample_3.png 3 {splits['test'].labels[-1]} 1.0 14 4 2 0.5 1 1"


@pytest.mark.parametrize("there", ["imgs/0/sample_0.png", "metadata/5.npy"])
def test_export_writes_nothing_beside_other_files(tmp_path, there):
    file = level_folder(tmp_path) / there
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    split = Split(np.zeros((1, 1024), np.uint8), np.full(1, 1024, np.int32), np.zeros(1, np.uint8))
    with pytest.raises(
        LraError, match=r"curv_contour_length_14 is not empty; choose an empty folder"
    ):
        make_task().export(dict.fromkeys(SPLITS, split), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_bytes() == b"mine"


def test_archives_of_one_size_are_taken_before_the_whole_release(tmp_path, threads):
    for size in (32, 64, 128, 256):
        assert make_task(size=size, source="release").publisher.archives == (
            f"pathfinder{size}.tar.gz",
            "lra_release.gz",
        )
    tiny_pictures.pathfinder(tmp_path / "made")
    with tarfile.open(tmp_path / "pathfinder32.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made" / "pathfinder32", "pathfinder32")
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "lra_release.gz").write_bytes(b"not looked at")
    prepare(release_task(tmp_path), tmp_path)


# --- What a model is given ---


def test_pixels_are_ids_under_lra2020_and_between_0_and_1_else():
    stored = jnp.array([[0, 51, 255]], jnp.uint8)
    ids, values = make_task("pathfinder", "lra2020"), make_task()
    assert (ids.num_tokens, values.num_tokens, values.vocab, values.num_features) == (
        256,
        None,
        None,
        1,
    )
    assert ids.decode(stored).tolist() == [[0, 51, 255]]
    np.testing.assert_allclose(values.decode(stored), [[[0.0], [0.2], [1.0]]], rtol=1e-6)
    np.testing.assert_allclose(
        make_task(mean=127.5, std=127.5).decode(stored), [[[-1.0], [-0.6], [1.0]]], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("config", "size", "length"),
    [
        ("pathfinder", 32, 1024),
        ("pathfinder64", 64, 4096),
        ("pathx", 128, 16384),
        ("path256", 256, 65536),
    ],
)
def test_published_sizes_of_each_task(config, size, length):
    sizes = {"train": 160_000, "val": 20_000, "test": 20_000}
    task = make_task(config, sizes=sizes)
    assert (task.name, task.picture_shape, task.seq_len, task.level) == (
        config,
        (size, size),
        length,
        "hard",
    )
    assert task.split_sizes() == sizes


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_bright_pixel_is_seen_however_small_the_text(size):
    picture = np.zeros((size, size), np.uint8)
    picture[-1, 0] = 255
    text = make_task(size=size).to_text(picture.ravel())
    assert text == "\n".join([" " * 64] * 31 + ["@" + " " * 63])


def test_reference_lines_by_hand():
    labels = np.array([0, 1] * 30)
    inputs = np.zeros((60, 1024), np.uint8)
    inputs[labels == 1, :300] = 200
    split = SimpleNamespace(inputs=inputs, labels=labels)
    test = SimpleNamespace(
        inputs=inputs[:4], labels=np.array([0, 1, 0, 0])
    )  # the last picture is bright
    assert make_task().reference_lines({"train": split, "test": test}) == {
        "majority": 0.75,
        "mean_pixel": 0.75,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, r"task\.source=web"),
        ({"size": 300}, r"size=300; expected one of 32, 64, 128, 256"),
        ({"level": "curv_baseline"}, r"level=curv_baseline; expected one of easy"),
        ({"sizes": {"train": 1, "test": 1}}, r"task\.sizes="),
        ({"sizes": SIZES | {"val": 0}}, r"task\.sizes\.val=0"),
        ({"data_seed": -1}, r"task\.data_seed=-1"),
        ({"data_seed": 2**64}, r"task\.data_seed="),
        ({"std": -1}, r"task\.std=-1"),
    ],
)
def test_values_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_task(**changes)


def test_generate_gives_the_pictures_of_the_tasks_stream(threads, monkeypatch):
    monkeypatch.setattr(pathfinder, "PICTURES_PER_CHUNK", 4)
    images, labels = generate(10, 32, "easy", 7)
    expected = draw(0, 10, 32, "easy", 7)
    np.testing.assert_array_equal(images, expected[0])
    np.testing.assert_array_equal(labels, expected[1])
    assert [part.shape for part in generate(0, 64)] == [(0, 64, 64), (0,)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 48}, "size=48; expected one of 32, 64, 128, 256"),
        ({"level": "medium"}, "level=medium; expected one of easy, intermediate, hard"),
        ({"seed": -1}, "seed=-1 is outside 0..2\\^64-1"),
        ({"seed": 2**64}, "is outside 0..2\\^64-1"),
        ({"n": -1}, "n=-1: expected 0 or more"),
    ],
)
def test_generate_refuses_invalid_arguments(wrong, message):
    with pytest.raises(ConfigError, match=message):
        generate(**({"n": 1} | wrong))


@pytest.mark.slow
def test_generate_needs_no_main_guard(tmp_path):
    """Workers start from a script without `if __name__ == "__main__"`, and from `python -c`."""
    code = """if True:
        import lra.tasks.pathfinder as pathfinder
        pathfinder.PICTURES_PER_CHUNK = 8
        print(pathfinder.generate(16, 32, "easy")[0].shape)"""
    script = tmp_path / "script.py"
    script.write_text(code)
    for command in ([script], ["-c", code]):
        ran = subprocess.run(
            [sys.executable, "-W", "error", *command], capture_output=True, text=True, timeout=120
        )
        assert (ran.stdout, ran.stderr) == ("(16, 32, 32)\n", "")


def test_killed_worker_is_one_line(monkeypatch):
    monkeypatch.setattr(
        joblib, "cpu_count", lambda: 2
    )  # with one, the work would be done, and end, in here
    with pytest.raises(DataError, match="a worker process was killed"):
        list(parallel_map(os._exit, [(9,), (9,)], 4))
