"""Both file formats of TFDS are read without TensorFlow; damaged files are refused by name."""

import copy
import json
import os
import re
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from deadline import deadline
from publisher_files import serialize, write_tfrecord

from lra.errors import DataError
from lra.sources import tfds_reader
from lra.sources.tfds_reader import find_tfds, masked_crc32c, read_tfds

EXAMPLES = [
    {"text": f"né {i}".encode(), "label": i % 2, "pair": [i, -1], "score": i / 2, "none": []}
    for i in range(5)
]


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


WRITERS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


def make(folder, file_format="tfrecord", shards=(3, 2), name="toy", version="1.0.0", **info):
    folder = folder / name / version
    folder.mkdir(parents=True)
    records = iter([serialize(example) for example in EXAMPLES])
    for i, count in enumerate(shards):
        path = folder / f"{name}-train.{file_format}-{i:05d}-of-{len(shards):05d}"
        WRITERS[file_format](path, [next(records) for _ in range(count)])
    split = {"name": "train", "shardLengths": [str(count) for count in shards]}
    info = {"name": name, "fileFormat": file_format, "splits": [split], "version": version} | info
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("file_format", WRITERS)
@pytest.mark.parametrize("shards", [(5,), (3, 2), (0, 4, 1)])
def test_reads_back(tmp_path, monkeypatch, file_format, shards):
    monkeypatch.setattr(tfds_reader, "RECORDS_PER_READ", 2)
    assert list(read_tfds(make(tmp_path, file_format, shards), "train")) == EXAMPLES


def test_old_info_without_a_format(tmp_path):
    folder = make(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    del info["fileFormat"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(list(read_tfds(folder, "train"))) == 5


WRONG = (None, True, -1, 2**70, 0.5, "", "../../x", "\x1b[2J", [], {"a": [[]]})


@pytest.mark.parametrize("field", ["name", "fileFormat", "splits", "split", "shards", "count"])
def test_any_wrong_field_of_the_info_is_one_line(tmp_path, field):
    folder = make(tmp_path)
    file = folder / "dataset_info.json"
    info = json.loads(file.read_text())
    for value in WRONG if field != "shards" else [x for x in WRONG if x != []]:
        wrong = copy.deepcopy(info)
        if field in info:
            wrong[field] = value
        elif field == "count":
            wrong["splits"][0]["shardLengths"][0] = value
        else:
            wrong["splits"][0][{"split": "name", "shards": "shardLengths"}[field]] = value
        file.write_text(json.dumps(wrong))
        with deadline(5), pytest.raises(DataError) as caught:
            list(read_tfds(folder, "train"))
        assert "\n" not in str(caught.value)


def test_length_beyond_the_file_is_refused_before_it_is_read(tmp_path):
    folder = make(tmp_path)
    file = next(folder.glob("*00000-of*"))
    length = struct.pack("<Q", 2**62)
    file.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + bytes(100))
    with pytest.raises(DataError, match="truncated in record 0"):
        list(read_tfds(folder, "train"))


@pytest.mark.parametrize("name", ["dataset_info.json", "toy-train.tfrecord-00000-of-00002"])
def test_pipe_in_place_of_a_file(tmp_path, name):
    folder = make(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with deadline(5), pytest.raises(DataError, match=re.escape(name)):
        list(read_tfds(folder, "train"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TFDS and etils warn of themselves
def test_reads_what_tfds_itself_wrote(tmp_path):
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION, pkg_dir_path = "toy", tfds.core.Version("1.2.3"), tmp_path

        def _info(self):
            text, label = tfds.features.Text(), tfds.features.ClassLabel(num_classes=2)
            image = tfds.features.Tensor(shape=(2,), dtype=np.float32)
            features = tfds.features.FeaturesDict({"text": text, "label": label, "image": image})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                yield i, {"text": f"é{i}", "label": i % 2, "image": [i, 0.5]}

    Builder(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    folder = find_tfds(tmp_path, "toy")
    assert folder == tmp_path / "tfds/toy/1.2.3"
    expected = [{"text": f"é{i}".encode(), "label": i % 2, "image": [i, 0.5]} for i in range(3)]
    assert list(read_tfds(folder, "test")) == expected


def test_masked_crc():
    for content, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA)):  # RFC 3720, B.4
        rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
        assert masked_crc32c(content) == (rotated + 0xA282EAD8) % 2**32


@pytest.mark.parametrize(
    "place", [20, -10, -1]
)  # in the first record, in the last one, and in its checksum
def test_tfrecord_with_changed_content(tmp_path, place):
    folder = make(tmp_path)
    path = folder / "toy-train.tfrecord-00000-of-00002"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=f"00000-of-00002: record {0 if place > 0 else 2} has a wrong checksum;"
    ):
        list(read_tfds(folder, "train"))


@pytest.mark.parametrize(("keep", "record"), [(5, 0), (14, 0), (-1, 2), (-10, 2)])
def test_cut_off_tfrecord(tmp_path, keep, record):
    folder = make(tmp_path)
    path = folder / "toy-train.tfrecord-00000-of-00002"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"00000-of-00002: truncated in record {record}"):
        list(read_tfds(folder, "train"))


def test_tfrecord_with_a_wrong_length(tmp_path):
    folder = make(tmp_path)
    path = folder / "toy-train.tfrecord-00001-of-00002"
    content = bytearray(path.read_bytes())
    content[7] ^= 1  # else a record of 2^56 bytes would be asked for
    path.write_bytes(content)
    with pytest.raises(DataError, match="00001-of-00002: record 0 has a wrong checksum"):
        list(read_tfds(folder, "train"))


@pytest.mark.parametrize("keep", [0, 100, 65536, -1])
def test_cut_off_array_record(tmp_path, keep):
    folder = make(tmp_path, "array_record", (5,))
    path = folder / "toy-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=path.name):
        list(read_tfds(folder, "train"))


def test_damaged_array_record(tmp_path):
    folder = make(tmp_path, "array_record", (5,))
    path = folder / "toy-train.array_record-00000-of-00001"
    path.write_bytes(
        path.read_bytes().replace(EXAMPLES[3]["text"], b"damage"[: len(EXAMPLES[3]["text"])])
    )
    with pytest.raises(
        DataError, match=f"{path.name}: truncated or damaged from record 0 on .*hash mismatch"
    ):
        list(read_tfds(folder, "train"))


def test_records_are_missing(tmp_path):
    folder = make(tmp_path, shards=(3, 1))
    write_tfrecord(folder / "toy-train.tfrecord-00001-of-00002", [])
    with pytest.raises(DataError, match="00001-of-00002: 0 records, expected 1"):
        list(read_tfds(folder, "train"))
    write_tfrecord(folder / "toy-train.tfrecord-00001-of-00002", [b"\xff\xff"])
    with pytest.raises(DataError, match="record 0 is no tf.train.Example"):
        list(read_tfds(folder, "train"))
    (folder / "toy-train.tfrecord-00000-of-00002").unlink()
    with pytest.raises(DataError, match="00000-of-00002: missing"):
        list(read_tfds(folder, "train"))


def test_unusable_info(tmp_path):
    with pytest.raises(DataError, match="no split 'val', it has train"):
        list(read_tfds(make(tmp_path / "a"), "val"))
    with pytest.raises(DataError, match="file format riegeli"):
        list(read_tfds(make(tmp_path / "b", fileFormat="riegeli"), "train"))
    for content in ("", "{}", '{"name": "toy", "splits": [{"name": "train"}]}'):
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(DataError, match="dataset_info.json: cannot be read"):
            list(read_tfds(tmp_path, "train"))


def test_find_newest(tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        make(tmp_path / "imdb_reviews", name="plain_text", version=version)
    (tmp_path / "imdb_reviews/plain_text/2.0.0").mkdir()  # not prepared to the end
    make(tmp_path / "imdb_reviews", name="plain_text", version="3.0.0.incompleteABC")
    assert find_tfds(tmp_path, "imdb_reviews/plain_text").name == "1.10.0"


def test_find_places(tmp_path, monkeypatch):
    places = [
        tmp_path / place
        for place in ("root", "root/tfds", "root/tensorflow_datasets", "env", "home")
    ]
    monkeypatch.setenv("HOME", str(places[4]))
    assert find_tfds(places[0], "toy") is None
    for i, place in reversed(list(enumerate(places))):
        folder = make(place / ("tensorflow_datasets" if i == 4 else ""))
        if i == 3:
            monkeypatch.setenv("TFDS_DATA_DIR", str(place))
        assert find_tfds(places[0], "toy") == folder
