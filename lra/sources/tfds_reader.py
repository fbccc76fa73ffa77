"""Reads the examples of a prepared TensorFlow Datasets (TFDS) folder without TensorFlow.

TFDS itself needs TensorFlow for two things that the tasks need: to read `tfrecord`, the default
format of `tfds.load`, and to decode pictures in any format. So this module reads both formats,
`tfrecord` and `array_record`, whose records are serialized `tf.train.Example`s. A TFRecord is the
length (uint64), its masked CRC-32C, the content, and the masked CRC-32C of the content.
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lra.errors import DataError, first_problem
from lra.sources.locate import open_source, read_source


class _SplitInfo(TypedDict):
    name: str
    shardLengths: list[Annotated[int, Field(ge=0)]]  # written as strings of digits


class _Info(TypedDict):
    name: Annotated[str, Field(pattern=r"^\w+$")]
    fileFormat: NotRequired[str]
    splits: list[_SplitInfo]


INFO = TypeAdapter(_Info)  # the part of dataset_info.json that is read
MAX_INFO_BYTES = 2**26

Value = bytes | int | float | list[bytes] | list[int] | list[float]

VERSION = re.compile(r"\d+\.\d+\.\d+")
RECORDS_PER_READ = 1024


def find_tfds(data_root: str | Path, name: str) -> Path | None:
    """The newest prepared version of `name` ("imdb_reviews/plain_text"), or None.

    Searches, in this order, `data_root`, its folders `tfds` and `tensorflow_datasets`,
    $TFDS_DATA_DIR and ~/tensorflow_datasets; the first of them with any version decides.
    """
    root = Path(data_root)
    others = filter(None, (os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets"))
    places = [root, root / "tfds", root / "tensorflow_datasets"]
    for place in places + [Path(other).expanduser() for other in others]:
        versions = [
            path.parent
            for path in (place / name).glob("*/dataset_info.json")
            if VERSION.fullmatch(path.parent.name)
        ]
        if versions:
            return max(versions, key=lambda path: [int(part) for part in path.name.split(".")])
    return None


def read_tfds(folder: Path, split: str) -> Iterator[dict[str, Value]]:
    """The examples of one split in order; a feature is a value, or a list of several values.

    Raises DataError if a split or a shard is missing, or a shard is damaged or incomplete.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    file_format, shards = _shards(folder, split)
    read = {"tfrecord": _read_tfrecord, "array_record": _read_array_record}[file_format]
    for path, expected in shards:
        count = 0
        for count, record in enumerate(read(path), start=1):
            try:
                example = tf_example_pb2.Example.FromString(record)
            except DecodeError as error:
                raise _damaged(path, f"record {count - 1} is no tf.train.Example") from error
            yield {key: _value(feature) for key, feature in example.features.feature.items()}
        if count != expected:
            raise _damaged(path, f"{count} records, expected {expected}")


def _shards(folder: Path, split: str) -> tuple[str, list[tuple[Path, int]]]:
    """The file format, and each shard's path and number of records."""
    info_path = folder / "dataset_info.json"
    try:
        info = INFO.validate_json(read_source(info_path, MAX_INFO_BYTES))
    except (OSError, ValidationError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise _damaged(info_path, f"cannot be read ({reason})") from error
    file_format = info.get("fileFormat", "tfrecord")  # absent in old versions of TFDS
    counts_of = {entry["name"]: entry["shardLengths"] for entry in info["splits"]}
    if file_format not in ("tfrecord", "array_record"):
        raise DataError(
            f"{info_path}: file format {file_format}; prepare it with TFDS as tfrecord or "
            "array_record"
        )
    if split not in counts_of:
        raise DataError(f"{info_path}: no split {split!r}, it has {', '.join(counts_of)}")
    counts, prefix = counts_of[split], f"{info['name']}-{split}.{file_format}"
    paths = [folder / f"{prefix}-{i:05d}-of-{len(counts):05d}" for i in range(len(counts))]
    for path in paths:
        if not path.is_file():
            raise _damaged(path, "missing")
    return file_format, list(zip(paths, counts, strict=True))


def _read_tfrecord(path: Path) -> Iterator[bytes]:
    with open_source(path) as file:
        number, size = 0, os.fstat(file.fileno()).st_size
        while header := file.read(12):
            if len(header) < 12:
                raise _damaged(path, f"truncated in record {number}")
            length, crc = struct.unpack("<QI", header)
            if crc != masked_crc32c(header[:8]):
                raise _damaged(path, f"record {number} has a wrong checksum of its length")
            if file.tell() + length + 4 > size:  # before the memory for it is reserved
                raise _damaged(path, f"truncated in record {number}")
            record, crc_of_record = file.read(length), file.read(4)
            if crc_of_record != struct.pack("<I", masked_crc32c(record)):
                raise _damaged(path, f"record {number} has a wrong checksum")
            yield record
            number += 1


def masked_crc32c(content: bytes) -> int:
    """CRC-32C as TFRecord stores it: rotated, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _read_array_record(path: Path) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    number = 0
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        while number < count:
            records = reader.read(number, min(number + RECORDS_PER_READ, count))
            yield from records
            number += len(records)
    except RuntimeError as error:
        raise _damaged(path, f"truncated or damaged from record {number} on ({error})") from error


def _value(feature: Any) -> Value:
    kind = feature.WhichOneof("kind")  # bytes_list, int64_list, float_list; None if empty
    values = list(getattr(feature, kind).value) if kind else []
    return values[0] if len(values) == 1 else values


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; delete {path.parent} and prepare it with TFDS again")
