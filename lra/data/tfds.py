"""How does someone who works with TensorFlow Datasets get at our tasks?

`builder(task)` is an ordinary TFDS builder over the task's own reader, so example i of a split is row i of the packed
store. It writes array_record files and needs no TensorFlow, as long as they are read with `as_data_source`;
`as_dataset` and `tfds.load` do need it.

    dataset = builder(task)
    dataset.download_and_prepare()
    train = dataset.as_data_source("train")  # train[i]["inputs"], train[i]["length"], train[i]["label"]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lra.data.store import fill, inputs_dtype, inputs_shape, store_key
from lra.tasks import SPLITS, Task

FEATURES_VERSION = "1.0.0"  # of the features below; what changes the examples changes the name of the config


def builder(task: Task, data_dir: str | Path | None = None) -> Any:
    """A `tfds.core.GeneratorBasedBuilder` named `lra_<task>`, with one config, `<inputs>-<key>` as the packed store.

    Features: `inputs`, padded with 0 to (seq_len,) or (2, seq_len) for pairs, in the integer type of the packed store;
    `length`, () or (2,); `label`.

    Args:
        data_dir: where TFDS keeps its data; None: its own default.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = f"lra_{task.name}"
        VERSION = tfds.core.Version(FEATURES_VERSION)
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=f"{task.inputs}-{store_key(task)[:12]}"),)
        pkg_dir_path = Path(__file__).parent  # where TFDS looks for tags and citations; it finds only its own packages

        def _info(self):
            description = (type(task).__doc__ or task.name).splitlines()[0]
            # In the order of the reader, so that row i here is row i of the packed store.
            return tfds.core.DatasetInfo(
                builder=self, description=description, features=_features(task), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {name: _records(task, name) for name in SPLITS}

        def _generate_examples(self):  # abstract upstream, but unused: _split_generators hands the records over
            raise NotImplementedError

    return Builder(data_dir=data_dir, file_format="array_record")


def _features(task: Task) -> Any:
    import tensorflow_datasets as tfds

    shape = inputs_shape(task)
    inputs = tfds.features.Tensor(shape=shape, dtype=inputs_dtype(task).type, encoding="zlib")
    length = tfds.features.Tensor(shape=shape[:-1], dtype=np.int32)
    return tfds.features.FeaturesDict(
        {"inputs": inputs, "length": length, "label": tfds.features.ClassLabel(num_classes=task.num_classes)}
    )


def _records(task: Task, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    dtype, shape = inputs_dtype(task), inputs_shape(task)
    for key, example in enumerate(task.examples(split)):
        inputs = np.zeros(shape, dtype)
        length = fill(inputs, example, task)
        yield key, {"inputs": inputs, "length": length, "label": example.label}
