"""A TensorFlow Datasets (TFDS) builder for any task, without TensorFlow.

The builder writes array_record files. Reading them with `as_data_source` needs no TensorFlow;
`as_dataset` and `tfds.load` need it.

    dataset = builder(task)
    dataset.download_and_prepare()
    train = dataset.as_data_source("train")  # train[i] is row i of the packed store
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lra.data.inspect import content_hashes
from lra.data.packed import Store
from lra.data.store import check_count, inputs_dtype, inputs_shape, pad_into, store_name
from lra.tasks.base import SPLITS, Task

FEATURES_VERSION = "1.0.0"  # of the features; other examples have another config name


def builder(task: Task, data_dir: str | Path | None = None, store: Store | None = None) -> Any:
    """A `tfds.core.GeneratorBasedBuilder` named `lra_<task>`; its config has the store's name.

    Features: `inputs`, padded with 0 to (seq_len,), or (2, seq_len) for pairs, with a last axis F
    if F > 1, in the integer type of the packed store; `length`, () or (2,); `label`, () or
    (num_targets,). A split that equals another one (validation is test) is written once.

    Args:
        data_dir: TFDS's data folder; None for its default.
        store: the packed store of this task, if it exists; no source is then read again.
    """
    import tensorflow_datasets as tfds

    # the sources of an existing store may be missing
    config = store_name(task) if store is None else store.path.resolve().name
    metadata = None
    if store is not None:
        keys = ("source", "partial", "source_files", "notes", "versions")
        origin = {key: store.manifest[key] for key in keys}
        metadata = tfds.core.MetadataDict(origin | {"splits": content_hashes(store)})
    label = tfds.features.ClassLabel(num_classes=task.num_classes)
    if task.num_targets > 1:
        label = tfds.features.Tensor(shape=(task.num_targets,), dtype=np.int32)
    features = {
        "inputs": tfds.features.Tensor(
            shape=inputs_shape(task), dtype=inputs_dtype(task).type, encoding="zlib"
        ),
        "length": tfds.features.Tensor(shape=(2,) * task.dual, dtype=np.int32),
        "label": label,
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = f"lra_{task.name}"
        VERSION = tfds.core.Version(FEATURES_VERSION)
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config.removeprefix(f"{task.name}-")),)
        pkg_dir_path = Path(__file__).parent  # holds checksums.tsv, the publishers' files

        def _info(self):
            description = (type(task).__doc__ or task.name).splitlines()[0]
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # record i is row i of the packed store
                metadata=metadata,
            )

        def _split_generators(self, dl_manager):
            return {name: _records(task, name, store) for name in SPLITS if name not in task.same}

        def _generate_examples(self):  # abstract upstream; _split_generators returns the records
            raise NotImplementedError

    return Builder(data_dir=data_dir, file_format="array_record")


def _records(task: Task, split: str, store: Store | None) -> Iterator[tuple[int, dict[str, Any]]]:
    if store is None:
        rows = _rows_read(task, split)
    else:
        packed = store.splits[split]
        rows = zip(packed.inputs, packed.lengths, packed.labels.astype(np.int32), strict=True)
    for key, (inputs, length, label) in enumerate(rows):
        yield key, {"inputs": np.asarray(inputs), "length": length, "label": label}


def _rows_read(task: Task, split: str) -> Iterator[tuple[Any, Any, Any]]:
    count = 0
    for example in task.examples(split):
        inputs = np.zeros(inputs_shape(task), inputs_dtype(task))
        length = pad_into(inputs, example, task)
        count += 1
        yield inputs, length, np.asarray(example.label, np.int32)[()]
    check_count(task, split, count)
