"""CIFAR-10 in grey and colour: grey values, splits, model inputs, both file formats, errors."""

import io
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from configured_task import configured_task
from PIL import Image
from publisher_files import write_tfds
from tiny_pictures import cifar, write_batch

from lra.data.store import prepare, settings_key
from lra.data.verify import verify
from lra.errors import ConfigError, DataError
from lra.tasks import pictures
from lra.tasks.base import SPLITS, permutation
from lra.tasks.image import grey_as_pillow, grey_as_tensorflow

PROTOCOLS = {
    "lra2020": {"inputs": "lra2020", "shuffle": False},
    "strict": {"inputs": "s4", "shuffle": True},
    "s4 in order": {"inputs": "s4", "shuffle": False},
}


def make_task(config="image", protocol="strict", data_root="unused", **changes):
    return configured_task(config, PROTOCOLS[protocol], data_root, **changes)


@pytest.fixture(autouse=True)
def nothing_prepared_by_tfds(tmp_path, monkeypatch):
    """Hides the ~/tensorflow_datasets of the user who runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture
def written(tmp_path):
    return cifar(tmp_path)


def read(task, split):
    examples = list(task.examples(split))
    return np.stack([example.inputs for example in examples]), np.array(
        [example.label for example in examples]
    )


@pytest.mark.parametrize(("config", "pool"), [("image", 2), ("scifar", 4), ("scifar", 1)])
def test_pooled_pixels_are_rounded_means_of_squares(written, tmp_path, config, pool):
    whole, _ = read(make_task(config, data_root=tmp_path), "test")
    task = make_task(config, data_root=tmp_path, pool=pool)
    found, _ = read(task, "test")
    side = 32 // pool
    pictures = whole.reshape(len(whole), 32, 32, -1).astype(float)
    for row, column in [(0, 0), (side - 1, 1 % side), (2, side - 1)]:
        square = pictures[:, row * pool : (row + 1) * pool, column * pool : (column + 1) * pool]
        expected = np.floor(square.mean((1, 2)) + 0.5)
        place = found.reshape(len(found), side, side, -1)[:, row, column]
        np.testing.assert_array_equal(place, expected)
    assert (task.seq_len, task.picture_shape) == (side**2, (side, side))


def test_pooling_makes_another_store_and_its_absence_keeps_the_name():
    assert "pool" not in make_task("image").fingerprint()
    assert settings_key(make_task("image", pool=2)) != settings_key(make_task("image"))


@pytest.mark.parametrize("pool", [0, 3, 64])
def test_pool_that_does_not_fit_is_refused(pool):
    with pytest.raises(ConfigError, match=r"task\.pool="):
        make_task("image", pool=pool)


# --- Grey ---


def random_colours():
    corners = np.array(
        [[r, g, b] for r in (0, 1, 254, 255) for g in (0, 1, 254, 255) for b in (0, 1, 254, 255)],
        np.uint8,
    )
    return np.concatenate(
        [corners, np.random.default_rng(0).integers(0, 256, (100_000, 3), np.uint8)]
    )


def test_grey_equals_pillow():
    colours = random_colours()
    expected = np.asarray(Image.fromarray(colours[None]).convert("L"))
    np.testing.assert_array_equal(grey_as_pillow(colours[None]), expected)


def test_grey_equals_tensorflows_formula():
    """Scaled to 1, weighted, scaled by 255.5, floored; no value is near a whole number."""
    colours = random_colours()
    weighted = colours / 255 @ np.array([0.2989, 0.5870, 0.1140])
    np.testing.assert_array_equal(
        grey_as_tensorflow(colours[None])[0], np.floor(weighted * 255.5).astype(np.uint8)
    )


def test_the_two_greys_differ_by_one_in_a_quarter_of_all_colours():
    colours = random_colours()[None]
    difference = grey_as_pillow(colours).astype(int) - grey_as_tensorflow(colours)
    assert np.abs(difference).max() == 1
    assert np.mean(difference != 0) == pytest.approx(0.263, abs=0.01)


# --- Splits ---


@pytest.mark.parametrize(
    ("protocol", "convert"), [("lra2020", grey_as_tensorflow), ("strict", grey_as_pillow)]
)
def test_test_split_is_the_test_file_in_the_protocols_grey(tmp_path, written, protocol, convert):
    inputs, labels = read(make_task("image", protocol, tmp_path), "test")
    rgb, expected = written["test"]
    assert inputs.dtype == np.uint8
    np.testing.assert_array_equal(inputs, convert(rgb))
    np.testing.assert_array_equal(labels, expected)


def test_colour_is_three_values_a_pixel_under_every_protocol(tmp_path, written):
    for protocol in PROTOCOLS:
        inputs, _ = read(make_task("scifar", protocol, tmp_path), "test")
        np.testing.assert_array_equal(inputs, written["test"][0])


def test_lra2020_validates_on_the_end_of_the_training_files(tmp_path, written):
    task = make_task("scifar", "lra2020", tmp_path)
    rgb, labels = written["train"]
    for split, part in (("train", slice(0, 45)), ("val", slice(45, 50))):
        inputs, found = read(task, split)
        np.testing.assert_array_equal(inputs, rgb[part])
        np.testing.assert_array_equal(found, labels[part])


def test_other_protocols_validate_on_a_seeded_tenth_in_the_order_of_the_files(tmp_path, written):
    rgb, labels = written["train"]
    order = permutation(50, 7)
    for split, rows in (("train", np.sort(order[:45])), ("val", np.sort(order[45:]))):
        inputs, found = read(make_task("scifar", "strict", tmp_path, data_seed=7), split)
        np.testing.assert_array_equal(inputs, rgb[rows])
        np.testing.assert_array_equal(found, labels[rows])
    assert not np.array_equal(
        read(make_task("scifar", "strict", tmp_path, data_seed=8), "val")[0], inputs
    )


def test_published_counts_come_out_of_the_published_files():
    for seed in (None, 0):
        parts = pictures.cut(50_000, {"train": 45_000, "val": 5_000}, seed)
        assert [len(part) for part in parts.values()] == [45_000, 5_000]
        assert len(np.unique(np.concatenate(list(parts.values())))) == 50_000
    assert make_task().split_sizes() == {"train": 45_000, "val": 5_000, "test": 10_000}


def test_protocols_share_a_store_unless_their_pictures_differ():
    keys = {
        (config, protocol): settings_key(make_task(config, protocol))
        for config in ("image", "scifar")
        for protocol in PROTOCOLS
    }
    assert keys["scifar", "lra2020"] == keys["scifar", "s4 in order"]
    assert len(set(keys.values())) == 5


# --- What a model is given ---


def test_grey_is_ids_under_lra2020_and_standardised_values_else():
    stored = jnp.array([[0, 122, 255]], jnp.uint8)
    ids, values = make_task("image", "lra2020"), make_task("image", "strict")
    assert (ids.num_tokens, values.num_tokens, ids.vocab) == (256, None, None)
    assert ids.decode(stored).dtype == jnp.int32
    assert ids.decode(stored).tolist() == [[0, 122, 255]]
    decoded = values.decode(stored)
    assert decoded.shape == (1, 3, 1)
    assert decoded.dtype == jnp.float32
    np.testing.assert_allclose(decoded[0, :, 0], [-122.6 / 61, -0.6 / 61, 132.4 / 61], rtol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_colours_are_standardised_one_by_one(protocol):
    task = make_task("scifar", protocol)
    assert (task.num_tokens, task.num_features, task.seq_len, task.picture_shape) == (
        None,
        3,
        1024,
        (32, 32),
    )
    decoded = task.decode(jnp.array([[[0, 128, 255]]], jnp.uint8))
    expected = (np.array([0, 128, 255]) / 255 - [0.4914, 0.4822, 0.4465]) / [0.247, 0.243, 0.261]
    np.testing.assert_allclose(decoded[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"std": 0}, {"std": [1, 2, 0]}, {"mean": [1, 2]}, {"mean": []}, {"mean": float("nan")}],
)
def test_mean_and_std_that_cannot_be_used_are_refused(changes):
    with pytest.raises(ConfigError, match=rf"task\.{next(iter(changes))}="):
        make_task("scifar", **changes)


def test_a_word_for_a_mean_is_refused():
    """`task.mean=grey` on the command line, where annotations are not checked."""
    with pytest.raises(
        ConfigError, match=r"task\.mean=grey: expected a number, or three in brackets"
    ):
        pictures._per_feature("task.mean", "grey", 3)


def test_unknown_inputs_are_refused(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "strict", {"inputs": "s5", "shuffle": True})
    with pytest.raises(ConfigError, match=r"protocol\.inputs=s5"):
        make_task()


@pytest.mark.parametrize("config", ["image", "scifar"])
def test_a_picture_is_drawn_in_shades(config):
    task = make_task(config)
    picture = np.zeros((32, 32, task.num_features), np.uint8)
    picture[:, 16:] = 255
    picture[0, 0] = 128
    first, *others = task.to_text(picture.reshape(1024, -1).squeeze()).split("\n")
    assert first == "++" + " " * 30 + "@" * 32
    assert others == [" " * 32 + "@" * 32] * 31


def test_reference_lines_by_hand():
    """Class 0 is dark, class 1 bright: the mean pixel separates them, the majority does not."""
    rng = np.random.default_rng(0)

    def split(labels):
        inputs = (
            rng.integers(0, 40, (len(labels), 1024)) + 200 * np.array(labels)[:, None]
        ).astype(np.uint8)
        return SimpleNamespace(inputs=inputs, labels=np.array(labels, np.uint8))

    lines = make_task().reference_lines(
        {"train": split([0, 0, 0, 1, 1] * 20), "test": split([0, 1, 1, 1])}
    )
    assert lines == {"majority": 0.25, "mean_pixel": 1.0}


def test_colour_tells_what_brightness_does_not():
    labels = np.arange(60) % 3
    inputs = np.zeros((60, 1024, 3), np.uint8)
    inputs[np.arange(60), :, labels] = 90  # equally bright, in red, green or blue
    split = SimpleNamespace(inputs=inputs, labels=labels)
    assert make_task("scifar").reference_lines({"train": split, "test": split})["mean_pixel"] == 1.0


def test_mean_pixels_do_not_depend_on_the_blocks(monkeypatch):
    inputs = np.random.default_rng(0).integers(0, 256, (7, 12, 3), np.uint8)
    monkeypatch.setattr(pictures, "BLOCK_BYTES", 2 * 36)
    np.testing.assert_allclose(pictures.mean_pixels(inputs, 3), inputs.mean(axis=1))
    np.testing.assert_allclose(
        pictures.mean_pixels(inputs[:, :, 0], 1), inputs[:, :, :1].mean(axis=1)
    )


# --- Files ---


@pytest.mark.parametrize("config", ["image", "scifar"])
def test_store_of_tiny_files_is_partial_and_sound(tmp_path, written, config):
    task = make_task(config, "strict", tmp_path)
    with pytest.raises(DataError, match="45 examples in train.*expected 45,000"):
        prepare(task, tmp_path)
    store = prepare(task, tmp_path, allow_partial=True)
    assert [len(store.splits[split]) for split in SPLITS] == [45, 5, 10]
    assert (store.splits["test"].lengths == 1024).all()
    assert [entry["name"] for entry in store.manifest["source_files"]][-1] == "test_batch"
    assert (store.manifest["source"], store.manifest["notes"]) == ("release", [])
    assert verify(store).problems == ()
    assert set(verify(store).overlaps.values()) == {0}


SPOILT = {
    "no data": ({b"data": None}, "b'data' is NoneType, expected uint8"),
    "floats": ({b"data": np.zeros((10, 3072))}, r"b'data' is float64 \(10, 3072\)"),
    "grey": (
        {b"data": np.zeros((10, 1024), np.uint8)},
        r"b'data' is uint8 \(10, 1024\), expected uint8 \(rows, 3072\)",
    ),
    "a label too few": ({b"labels": [0] * 9}, "b'labels' is 9 long, expected a list of 10"),
    "no labels": ({b"labels": None}, "b'labels' is a NoneType"),
    "label of CIFAR-100": ({b"labels": [0] * 6 + [99, 0, 0, 0]}, "row 6: label 99, expected 0..9"),
    "label below": ({b"labels": [-1] + [0] * 9}, "row 0: label -1"),
    "label that is no number": ({b"labels": [0, b"cat"] + [0] * 8}, "row 1: label b'cat'"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_batch_is_refused_with_its_row(tmp_path, written, fault):
    changes, message = SPOILT[fault]
    sound = {b"data": np.zeros((10, 3072), np.uint8), b"labels": [0] * 10}
    write_batch(tmp_path / "cifar-10-batches-py" / "data_batch_3", sound | changes)
    with pytest.raises(DataError, match=message) as caught:
        list(make_task(data_root=tmp_path).examples("train"))
    assert "data_batch_3" in str(caught.value)


def test_missing_files_say_what_to_get(tmp_path):
    task = make_task(data_root=tmp_path)
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        task.source_files()
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        prepare(task, tmp_path)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_cifar10(root, splits):
    write_tfds(root / "tfds/cifar10/3.0.2", "cifar10", splits)


def as_records(written):
    return {
        split: [
            {"id": b"x", "image": png(rgb.reshape(32, 32, 3)), "label": int(label)}
            for rgb, label in zip(*written[split], strict=True)
        ]
        for split in ("train", "test")
    }


def test_folder_of_tfds_gives_the_same_pictures(tmp_path):
    written = cifar(tmp_path / "batches")
    write_cifar10(tmp_path / "prepared", as_records(written))
    for config in ("image", "scifar"):
        ours, theirs = (
            make_task(config, "strict", tmp_path / place) for place in ("batches", "prepared")
        )
        for split in SPLITS:
            for found, expected in zip(read(theirs, split), read(ours, split), strict=True):
                np.testing.assert_array_equal(found, expected)
    assert len(theirs.source_files()) == 3
    assert (ours.source, theirs.source) == ("release", "tfds")
    assert prepare(theirs, tmp_path / "prepared", allow_partial=True).manifest["source"] == "tfds"
    assert "TFDS" in theirs.notes()[0]


def test_publishers_files_come_before_tfds(tmp_path, written):
    write_cifar10(tmp_path, as_records(cifar(tmp_path / "elsewhere", seed=1)))
    np.testing.assert_array_equal(
        read(make_task("scifar", data_root=tmp_path), "test")[0], written["test"][0]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 10}, "record 1: label 10, expected 0..9"),
        ({"image": b"GIF89a"}, "record 1: not a readable PNG"),
        (
            {"image": png(np.zeros((28, 28), np.uint8))},
            "record 1: a PNG of 28x28 in mode L, expected 32x32",
        ),
    ],
)
def test_spoilt_record_is_refused(tmp_path, changes, message):
    record = {"image": png(np.zeros((32, 32, 3), np.uint8)), "label": 3}
    write_cifar10(tmp_path, {"train": [], "test": [record, record | changes]})
    with pytest.raises(DataError, match=message):
        list(make_task(data_root=tmp_path).examples("test"))


def test_records_of_another_dataset_are_refused(tmp_path):
    write_cifar10(tmp_path, {"train": [], "test": [{"text": b"no picture", "label": 3}]})
    with pytest.raises(DataError, match="record 0: has label, text, expected image"):
        list(make_task(data_root=tmp_path).examples("test"))
