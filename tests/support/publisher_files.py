"""Helpers that write folders of files, archives and TFDS folders like those of the publishers."""

import io
import json
import struct
import tarfile

from lra.sources.locate import IMDB, LRA_RELEASE, Source
from lra.sources.tfds_reader import masked_crc32c

TEXTS = Source("IMDB reviews", "aclImdb", ("train/pos", "test/neg"), (IMDB.filename,), IMDB)
PAIRS = Source("AAN pairs", "tsv_data", ("pairs.train.tsv",), ("lra_release.gz",), LRA_RELEASE)
PATHS = Source(
    "Path-X",
    "pathfinder128/curv_contour_length_14",
    ("imgs", "metadata"),
    ("lra_release.gz",),
    LRA_RELEASE,
)

TWICE = {
    "lra_release/tsv_data/pairs.train.tsv": b"outer",
    "lra_release/lra_release/tsv_data/pairs.train.tsv": b"inner",
    "lra_release/lra_release/tsv_data/deep/x": b"x",
    "lra_release/lra_release/listops-1000/basic_train.tsv": b"other",
}


def make(folder, *names):
    """Write files below `folder`; a name that ends in / is a folder."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(name)
    return folder


def make_archive(path, members, mode="w:gz"):
    """Write a tar of `members`: name -> content, or a TarInfo of a link or device."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def files_in(folder):
    """All files and folders below `folder` except the empty lock files."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock"
    )


def serialize(example):
    """A `tf.train.Example` of {name: value or list of values}; values are bytes, int or float."""
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for key, value in example.items():
        values = value if isinstance(value, list) else [value]
        feature = message.features.feature[key]
        kinds = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}
        if values:
            kinds[type(values[0])].value.extend(values)
    return message.SerializeToString()


def write_tfrecord(path, records):
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            crcs = [struct.pack("<I", masked_crc32c(part)) for part in (length, record)]
            file.write(length + crcs[0] + record + crcs[1])


def write_tfds(folder, name, splits):
    """A version folder as TFDS prepares it, one tfrecord file per split of example dicts."""
    folder.mkdir(parents=True)
    for split, examples in splits.items():
        path = folder / f"{name}-{split}.tfrecord-00000-of-00001"
        write_tfrecord(path, map(serialize, examples))
    entries = [{"name": split, "shardLengths": [str(len(x))]} for split, x in splits.items()]
    info = {"name": name, "fileFormat": "tfrecord", "splits": entries}
    (folder / "dataset_info.json").write_text(json.dumps(info))
