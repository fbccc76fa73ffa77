"""Text: the publisher's and TFDS's files, both encodings, the validation split, errors."""

import hashlib
import os

import numpy as np
import pytest
import tiny_texts
from configured_task import configured_task
from publisher_files import write_tfds

from lra.data.store import prepare, store_name
from lra.errors import ConfigError, DataError
from lra.tasks.characters import IMDB_CHARACTERS, IMDB_UNUSED, Bytes, Characters, frequencies
from lra.tasks.text import Review, held_out

BYTES, CHARACTERS = Bytes(), Characters(IMDB_CHARACTERS, IMDB_UNUSED)


def make_task(data_root="unused", inputs="s4", validation="train", **changes):
    protocol = {"inputs": inputs, "validation": validation}
    return configured_task("text", protocol, data_root, **changes)


@pytest.fixture
def imdb(tmp_path):
    """A data root and the folder of the reviews in it."""
    return tmp_path, tiny_texts.imdb(tmp_path)


# --- Encodings ---


@pytest.mark.parametrize(
    ("inputs", "vocabulary", "seq_len"), [("s4", 135, 4096), ("lra2020", 257, 4000)]
)
def test_vocabulary_and_length_are_the_protocols(inputs, vocabulary, seq_len):
    task = make_task(inputs=inputs)
    assert len(set(task.vocab)) == len(task.vocab) == task.num_tokens == vocabulary
    assert (task.vocab[0], task.seq_len, task.num_classes) == ("<pad>", seq_len, 2)
    assert make_task(inputs=inputs, seq_len=300).seq_len == 300


def test_characters_are_sorted_and_follow_the_special_tokens():
    assert list(IMDB_CHARACTERS) == sorted(set(IMDB_CHARACTERS))
    assert CHARACTERS.vocab == ("<pad>", "<unk>", "<eos>", *IMDB_CHARACTERS, "<bos>")


def test_ids_by_hand():
    text = "\ta\u00e9\u4e2d\x85".encode()
    place = CHARACTERS.vocab.index
    assert CHARACTERS.encode(text, 9).tolist() == [
        3,
        place("a"),
        place("\u00e9"),
        1,
        place("\x85"),
        2,
    ]
    assert BYTES.encode(text, 9).tolist() == [
        10,
        98,
        0xC3 + 1,
        0xA9 + 1,
        0xE4 + 1,
        0xB8 + 1,
        0xAD + 1,
        0xC2 + 1,
        0x85 + 1,
    ]
    assert [BYTES.vocab[i] for i in BYTES.encode(text, 3)] == ["<09>", "a", "<c3>"]


def test_long_text_is_cut_at_its_end():
    text = "\u00e9abc".encode()
    assert CHARACTERS.decode(CHARACTERS.encode(text, 3)) == "\u00e9a"
    assert CHARACTERS.encode(text, 3)[-1] == 2
    assert len(CHARACTERS.encode(text, 5)) == len(CHARACTERS.encode(text, 99)) == 5
    assert BYTES.decode(BYTES.encode(text, 3)) == "\u00e9a"
    assert BYTES.decode(BYTES.encode(text, 1)) == "\ufffd"


def random_text(rng):
    """Characters of the vocabulary, its neighbours, and what takes three and four bytes."""
    codes = [
        rng.integers(0, 300, 20),
        rng.integers(8200, 8240, 5),
        rng.integers(0xE000, 0x11_0000, 5),
    ]
    return "".join(map(chr, rng.permutation(np.concatenate(codes))[: rng.integers(0, 31)]))


@pytest.mark.parametrize("seed", range(20))
def test_encodings_equal_the_loop(seed):
    rng = np.random.default_rng(seed)
    text, limit = random_text(rng), int(rng.integers(2, 40))
    known = {token: i for i, token in enumerate(CHARACTERS.vocab) if len(token) == 1}
    ids = CHARACTERS.encode(text.encode(), limit)
    assert ids.tolist() == [known.get(character, 1) for character in text[: limit - 1]] + [2]
    assert CHARACTERS.decode(ids) == "".join(
        c if c in known else "\ufffd" for c in text[: limit - 1]
    )
    ids = BYTES.encode(text.encode(), limit)
    assert ids.tolist() == [byte + 1 for byte in text.encode()[:limit]]
    assert BYTES.decode(ids) == text.encode()[:limit].decode(errors="replace")


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_stored_review_reads_as_it_was(imdb, inputs):
    task = make_task(imdb[0], inputs, validation="test")
    ids, _ = next(iter(task.examples("train")))
    expected = tiny_texts.review(0, 0)
    assert task.to_text(ids) == (
        expected if inputs == "lra2020" else expected.replace("\u4e2d", "\ufffd")
    )
    assert task.to_text(np.pad(ids, (0, 5))) == task.to_text(ids)


# --- Splits ---


def texts_of(task, split):
    return [(task.to_text(example.inputs), example.label) for example in task.examples(split)]


def test_order_is_by_class_then_by_number(imdb):
    task = make_task(imdb[0], "lra2020", "test")
    train = [(tiny_texts.review(label, number), label) for label in (0, 1) for number in range(24)]
    assert texts_of(task, "train") == train
    assert texts_of(task, "test") == [
        (tiny_texts.review(c, 100 + i), c) for c in (0, 1) for i in range(10)
    ]
    assert task.same == {"val": "test"}
    assert texts_of(task, "val") == texts_of(task, "test")


def test_validation_is_a_tenth_of_each_class_of_train(imdb):
    whole = texts_of(make_task(imdb[0], "lra2020", "test"), "train")
    carved = make_task(imdb[0], "lra2020", "train")
    train, val = texts_of(carved, "train"), texts_of(carved, "val")
    assert carved.same == {}
    assert [label for _, label in val] == [0, 0, 1, 1]  # of 24 each
    assert [
        row for row in whole if row not in val
    ] == train  # nothing lost, nothing twice, in the order of the files
    assert [row for row in whole if row in val] == val
    assert texts_of(carved, "test") == texts_of(make_task(imdb[0], "lra2020", "test"), "test")
    assert any(
        texts_of(make_task(imdb[0], "lra2020", data_seed=seed), "val") != val
        for seed in range(1, 4)
    )
    assert texts_of(make_task(imdb[0], "lra2020"), "val") == val


def test_validation_of_the_whole_data_is_fixed():
    """Golden: if it changes, scores under `strict` are not comparable with earlier ones."""
    reviews = [Review("", f"review {i}".encode(), i // 12_500) for i in range(25_000)]
    chosen = held_out(reviews, seed=0)
    assert [chosen[:12_500].sum(), chosen[12_500:].sum()] == [1250, 1250]
    assert np.flatnonzero(chosen)[:5].tolist() == [0, 8, 11, 33, 71]
    assert hashlib.sha256(np.packbits(chosen).tobytes()).hexdigest()[:16] == "554c5a788c9ed62a"
    assert (held_out(reviews, seed=1) != chosen).any()


def test_validation_depends_on_the_text_and_not_on_the_order():
    """TFDS has another order, and no white space at a review's ends."""
    reviews = [Review(f"file {i}", f" review {i}\n".encode(), i % 2) for i in range(200)]
    chosen = held_out(reviews, seed=3)
    order = np.random.default_rng(0).permutation(200)
    again = held_out([Review("record", reviews[i].text.strip(), i % 2) for i in order], seed=3)
    np.testing.assert_array_equal(again, chosen[order])


@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_are_on_one_side(seed):
    """Some texts occur twice, some in both classes; each class still gives exactly a tenth."""
    rows = [(i, i % 2) for i in range(200)]
    rows += [(i, i % 2) for i in range(0, 200, 3)] + [(i, 1 - i % 2) for i in range(0, 200, 5)]
    reviews = [Review("", f"review {i}".encode(), label) for i, label in rows]
    chosen = held_out(reviews, seed)
    val, train = (
        {review.text for review, c in zip(reviews, chosen, strict=True) if c == side}
        for side in (1, 0)
    )
    assert not val & train
    for label in (0, 1):
        of_class = np.array([review.label == label for review in reviews])
        assert chosen[of_class].sum() == of_class.sum() // 10


def test_smallest_data_has_validation_too():
    assert (
        held_out(
            [Review("", str(i).encode(), label) for i, label in enumerate((0, 1, 0, 1, 1))], seed=0
        ).sum()
        == 2
    )


@pytest.mark.parametrize(
    ("validation", "sizes"),
    [("train", (22_500, 2_500, 25_000)), ("test", (25_000, 25_000, 25_000))],
)
def test_published_counts_are_demanded(imdb, validation, sizes):
    task = make_task(imdb[0], validation=validation)
    assert tuple(task.split_sizes()[split] for split in ("train", "val", "test")) == sizes
    with pytest.raises(DataError, match=f"examples in train.*expected {sizes[0]:,}"):
        prepare(task, imdb[0])


@pytest.mark.parametrize("validation", ["train", "test"])
@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
def test_store_holds_the_reviews(imdb, inputs, validation):
    data_root, _ = imdb
    store = prepare(make_task(data_root, inputs, validation), data_root, allow_partial=True)
    counts = {name: entry["labels"] for name, entry in store.manifest["splits"].items()}
    assert counts["train"] == ([22, 22] if validation == "train" else [24, 24])
    assert counts["val"] == ([2, 2] if validation == "train" else [10, 10])
    assert (store.splits["val"] is store.splits["test"]) == (validation == "test")
    assert store.manifest["source"] == "release"
    assert [entry["name"] for entry in store.manifest["source_files"]] == [
        "train/neg",
        "train/pos",
        "test/neg",
        "test/pos",
    ]
    bag = "bag_of_bytes" if inputs == "lra2020" else "bag_of_characters"
    # the words of the two classes differ in their letters
    assert store.manifest["reference"] == {"majority": 0.5, bag: 1.0}


def test_hashes_are_of_names_and_contents(imdb):
    data_root, folder = imdb

    def hashes():
        task = make_task(data_root)
        for split in ("train", "val", "test"):
            list(task.examples(split))
        return {entry["name"]: entry["sha256"] for entry in task.source_hashes()}

    before = hashes()
    os.utime(folder / "test" / "pos" / "3_10.txt", (1, 1))
    assert hashes() == before
    with open(folder / "test" / "pos" / "3_10.txt", "a") as file:
        file.write("!")
    after = hashes()
    assert {name for name in before if after[name] != before[name]} == {"test/pos"}
    (folder / "train" / "neg" / "3_4.txt").rename(folder / "train" / "neg" / "3_3.txt")
    assert {name for name in before if hashes()[name] != after[name]} == {"train/neg"}


def test_added_review_and_other_settings_make_another_store(imdb):
    data_root, folder = imdb
    os.utime(folder / "train" / "pos", (1, 1))
    name = store_name(make_task(data_root))
    assert store_name(make_task(data_root)) == name
    others = [{"data_seed": 1}, {"seq_len": 100}, {"validation": "test"}, {"inputs": "lra2020"}]
    assert len({store_name(make_task(data_root, **other)) for other in others} - {name}) == len(
        others
    )
    (folder / "train" / "pos" / "99_8.txt").write_text("fine")
    assert store_name(make_task(data_root)) != name


def test_a_store_of_the_choice_by_position_is_not_taken():
    """`chosen_by` is in the fingerprint only if validation is chosen from train."""
    assert make_task().fingerprint()["chosen_by"] == "text"
    assert "chosen_by" not in make_task(validation="test").fingerprint()


def test_seed_of_nothing_changes_no_store(imdb):
    tasks = [make_task(imdb[0], validation="test", data_seed=seed) for seed in (0, 1)]
    assert store_name(tasks[0]) == store_name(tasks[1])


# --- TFDS ---


def write_reviews(data_root, splits):
    """Write `imdb_reviews/plain_text` as TFDS prepares it, of (text, label) by split."""
    examples = {
        split: [{"text": text, "label": label} for text, label in rows]
        for split, rows in splits.items()
    }
    write_tfds(data_root / "imdb_reviews/plain_text/1.0.0", "imdb_reviews", examples)


TFDS = {
    "train": [(f"row {i} caf\u00e9".encode(), (0, 1, 1)[i % 3]) for i in range(30)],
    "test": [(f"test {i}".encode(), i % 2) for i in range(6)],
    "unsupervised": [(b"not rated", -1)],
}


@pytest.mark.parametrize("validation", ["train", "test"])
def test_tfds_folder_is_read_in_its_order(tmp_path, validation):
    write_reviews(tmp_path, TFDS)
    task = make_task(tmp_path, "lra2020", validation)
    rows = [(text.decode(), label) for text, label in TFDS["train"]]
    train = texts_of(task, "train")
    assert task.source == "tfds"
    if validation == "train":
        val = texts_of(task, "val")
        assert sorted(label for _, label in val) == [0, 1, 1]
        assert [row for row in rows if row not in val] == train
    else:
        assert train == rows
    assert texts_of(task, "test") == [(text.decode(), label) for text, label in TFDS["test"]]
    manifest = prepare(task, tmp_path, allow_partial=True).manifest
    assert manifest["source"] == "tfds"
    assert "imdb_reviews-train.tfrecord-00000-of-00001" in [
        entry["name"] for entry in manifest["source_files"]
    ]


def test_publishers_folder_comes_before_tfds(imdb):
    write_reviews(imdb[0], TFDS)
    task = make_task(imdb[0], validation="test")
    assert len(list(task.examples("test"))) == 20
    assert task.source == "release"


def test_tfds_record_without_its_class_is_refused(tmp_path):
    write_reviews(tmp_path, TFDS | {"test": [(b"fine", 1), (b"?", -1)]})
    with pytest.raises(DataError, match="split test, record 1: found the label -1"):
        list(make_task(tmp_path).examples("test"))


# --- Refusals ---

SPOILT = {
    "empty": ("7_8.txt", b" \n", "an empty review"),
    "not UTF-8": ("7_8.txt", b"caf\xe9 au lait", r"byte 3 \(0xe9\) is not UTF-8"),
    "rating of the other class": ("8_4.txt", b"dull", "rated 4, but pos has ratings 7 to 10"),
    "no rating": ("8_0.txt", b"unsup", "rated 0"),
    "another name": ("notes.txt", b"hello", "<id>_<rating>.txt"),
}


@pytest.mark.parametrize("inputs", ["s4", "lra2020"])
@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_review_is_refused_with_its_file(imdb, fault, inputs):
    data_root, folder = imdb
    name, content, message = SPOILT[fault]
    (folder / "test" / "pos" / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(make_task(data_root, inputs).examples("test"))
    assert str(folder / "test" / "pos" / name) in str(caught.value)


def test_what_file_managers_leave_is_passed_over(imdb):
    data_root, folder = imdb
    for name in (".DS_Store", "._3_10.txt", "Thumbs.db"):
        (folder / "test" / "pos" / name).write_bytes(b"\x00")
    assert len(list(make_task(data_root).examples("test"))) == 20


def test_missing_reviews_say_what_and_where(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    task = make_task(tmp_path / "nowhere")
    with pytest.raises(DataError, match="lra data prepare text"):
        task.source_files()
    with pytest.raises(DataError, match=r"nowhere.*aclImdb.*aclImdb_v1\.tar\.gz"):
        prepare(task, tmp_path / "nowhere")
    assert task.source == "release"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"inputs": "s5"}, "protocol.inputs=s5"),
        ({"validation": "none"}, "protocol.validation=none"),
        ({"data_seed": -1}, r"task\.data_seed"),
        ({"data_seed": 2**64}, r"task\.data_seed"),
        ({"seq_len": 1}, r"task\.seq_len"),
    ],
)
def test_invalid_values_are_refused(changes, key):
    with pytest.raises(ConfigError, match=key):
        make_task(**changes)


# --- Reference lines ---


def test_frequencies_equal_the_loop(monkeypatch):
    monkeypatch.setattr("lra.tasks.characters.ROWS_PER_COUNT", 3)
    rng = np.random.default_rng(0)
    inputs = rng.integers(1, 6, (8, 12)).astype(np.uint8)
    lengths = rng.integers(1, 13, 8)
    inputs[np.arange(12) >= lengths[:, None]] = 0
    expected = [
        [(row[:n] == i).sum() / n for i in range(1, 7)]
        for row, n in zip(inputs, lengths, strict=True)
    ]
    np.testing.assert_allclose(frequencies(inputs, 7), expected, rtol=1e-15)
