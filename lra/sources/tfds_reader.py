"""How are the folders that TensorFlow Datasets has prepared read without TensorFlow?

    for example in read_tfds(find_tfds(data_root, "imdb_reviews/plain_text"), "train"):
        example["text"], example["label"]  # bytes, int

Both of TFDS's file formats: `tfrecord` (per record: length, masked CRC-32C of the length, content, masked CRC-32C of
the content) and `array_record`. A record is a tf.train.Example.
"""

import functools
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from lra.errors import DataError

Value = bytes | int | float | list[bytes] | list[int] | list[float]

VERSION = re.compile(r"\d+\.\d+\.\d+")
RECORDS_PER_READ = 1024
CRC_BLOCK = 1024  # bytes looked up at once, with a table of 1 KiB for each
CRC_ROWS = 256 * np.arange(CRC_BLOCK)


def find_tfds(data_root: str | Path, name: str) -> Path | None:
    """The newest prepared version of `name` ("imdb_reviews/plain_text"), in the first place that has one.

    Places: `data_root`, its folders `tfds` and `tensorflow_datasets`, $TFDS_DATA_DIR and ~/tensorflow_datasets.
    """
    root = Path(data_root)
    places = [
        root,
        root / "tfds",
        root / "tensorflow_datasets",
        Path("~/tensorflow_datasets").expanduser(),
    ]
    if "TFDS_DATA_DIR" in os.environ:
        places.insert(3, Path(os.environ["TFDS_DATA_DIR"]).expanduser())
    for place in places:
        versions = [
            path.parent
            for path in (place / name).glob("*/dataset_info.json")
            if VERSION.fullmatch(path.parent.name)
        ]
        if versions:
            return max(
                versions, key=lambda version: [int(number) for number in version.name.split(".")]
            )
    return None


def read_tfds(folder: Path, split: str) -> Iterator[dict[str, Value]]:
    """The examples of one split, shard after shard; a feature of one value is that value, of several a list.

    Raises:
        DataError: no such split or shard, or a file that is cut off, damaged or has not the promised records.
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
    """The file format, and of each shard the path and the number of records."""
    info_path = folder / "dataset_info.json"
    try:
        info = json.loads(info_path.read_text("utf-8"))
        file_format = info.get("fileFormat", "tfrecord")  # which older TFDS did not say
        lengths = {entry["name"]: entry["shardLengths"] for entry in info["splits"]}
        prefix = f"{info['name']}-{split}.{file_format}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(info_path, f"cannot be read ({type(error).__name__}: {error})") from error
    if file_format not in ("tfrecord", "array_record"):
        raise DataError(
            f"{info_path}: file format {file_format}; prepare it with TFDS as tfrecord or array_record"
        )
    if split not in lengths:
        raise DataError(f"{info_path}: no split {split!r}, it has {', '.join(lengths)}")
    paths = [
        folder / f"{prefix}-{i:05d}-of-{len(lengths[split]):05d}"
        for i in range(len(lengths[split]))
    ]
    for path in paths:
        if not path.is_file():
            raise _damaged(path, "missing")
    return file_format, [
        (path, int(length)) for path, length in zip(paths, lengths[split], strict=True)
    ]


def _read_tfrecord(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        number = 0
        while header := file.read(12):
            if len(header) < 12:
                raise _damaged(path, f"cut off in record {number}")
            length, crc = struct.unpack("<QI", header)
            if crc != masked_crc32c(header[:8]):
                raise _damaged(path, f"record {number} has a wrong checksum of its length")
            record, crc_of_record = file.read(length), file.read(4)
            if len(record) < length or len(crc_of_record) < 4:
                raise _damaged(path, f"cut off in record {number}")
            if crc_of_record != struct.pack("<I", masked_crc32c(record)):
                raise _damaged(path, f"record {number} has a wrong checksum")
            yield record
            number += 1


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
        raise _damaged(path, f"cut off or damaged from record {number} on ({error})") from error


def _value(feature: Any) -> Value:
    kind = feature.WhichOneof(
        "kind"
    )  # bytes_list, int64_list, float_list, or None for a feature left empty
    values = list(getattr(feature, kind).value) if kind else []
    return values[0] if len(values) == 1 else values


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; delete {path.parent} and prepare it with TFDS again")


# --- CRC-32C -------------------------------------------------------------------------------------------------------


@functools.cache
def _crc_table() -> UInt32[np.ndarray, " entries"]:
    """Entry 256 k + byte: the register, 0 before, after `byte` and CRC_BLOCK - 1 - k zeros, the bytes behind it."""
    table = np.empty((CRC_BLOCK, 256), np.uint32)
    table[-1] = np.arange(256)
    for _ in range(8):  # bits; Castagnoli's polynomial, lowest bit first
        table[-1] = (table[-1] >> 1) ^ np.uint32(0x82F63B78) * (table[-1] & 1)
    for k in range(CRC_BLOCK - 1, 0, -1):
        table[k - 1] = (table[k] >> 8) ^ table[-1, table[k] & 255]
    return table.ravel()


def masked_crc32c(content: bytes) -> int:
    """CRC-32C as TFRecord stores it: rotated and shifted, so that the CRC of data holding CRCs stays a good one.

    The register after a block is the sum (xor) of what each of its bytes alone would leave, so NumPy looks up all of
    them at once: a loop over bytes takes a second for 10 MB.
    """
    table, crc = _crc_table(), 0xFFFFFFFF
    for first in range(0, len(content), CRC_BLOCK):
        block = np.frombuffer(content[first : first + CRC_BLOCK], np.uint8).astype(np.intp)
        block[:4] ^= np.frombuffer(struct.pack("<I", crc), np.uint8)[: len(block)]
        left = crc >> 8 * len(block)  # of the register, where the block is shorter than it
        crc = int(np.bitwise_xor.reduce(table[block + CRC_ROWS[-len(block) :]])) ^ left
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
