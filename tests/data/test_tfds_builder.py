"""The TFDS builder gives the rows of the packed store, without TensorFlow."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lra.data import tfds_builder
from lra.data.store import prepare
from lra.errors import DataError
from lra.sources import locate
from lra.tasks.base import SPLITS, Example, Task
from lra.tasks.listops import ListOps

# TFDS and its dependencies emit DeprecationWarnings at import and on writing
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def listops(inputs):
    sizes = {"train": 60, "val": 20, "test": 30}
    limits = {"max_depth": 6, "max_args": 6, "min_length": 21, "max_length": 128}
    protocol = {"inputs": inputs, "name": "strict"}
    return ListOps(
        protocol, "unused", "listops_short", "generated", sizes=sizes, data_seed=0, **limits
    )


class Pairs(Task):
    """Two sequences of ids above 255, so that type and shape differ from ListOps."""

    name, inputs, num_classes, seq_len, dual = "pairs", "s4", 2, 3, True
    vocab = tuple(map(str, range(300)))

    def examples(self, split):
        yield Example((np.array([1, 299, 3]), np.array([4])), 1)
        yield Example((np.array([5]), np.array([6, 7])), 0)

    def split_sizes(self):
        return None


class Colours(Task):
    """Three values per position, two labels per example, test as validation."""

    name, inputs, num_classes, seq_len, vocab = "colours", "pixels", 3, 2, None
    num_features, num_targets, same = 3, 2, {"val": "test"}

    def examples(self, split):
        for shade in range(4):
            yield Example(
                np.full((2, 3), 40 * shade + (split == "test"), np.uint8), np.array([shade % 3, 2])
            )

    def split_sizes(self):
        return None


class Short(Colours):
    """Fewer examples than expected."""

    def split_sizes(self):
        return {"train": 4, "test": 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [listops("s4"), listops("lra2020"), Pairs(), Colours()],
    ids=["s4", "lra2020", "pairs", "colours"],
)
def test_builder_reads_back_the_store(tmp_path, task):
    store = prepare(task, tmp_path)
    builder = tfds_builder.builder(task, tmp_path / "tfds")
    builder.download_and_prepare()
    assert (
        builder.info.full_name
        == f"lra_{store.path.name.replace('-', '/', 1)}/{tfds_builder.FEATURES_VERSION}"
    )
    distinct = [name for name in SPLITS if name not in task.same]
    assert len(list(builder.data_path.glob("*.array_record*"))) == len(distinct)
    for name in distinct:
        split, source = store.splits[name], builder.as_data_source(name)
        records = [source[i] for i in range(len(source))]
        np.testing.assert_array_equal(
            np.stack([record["inputs"] for record in records]), split.inputs
        )
        np.testing.assert_array_equal(
            np.stack([record["length"] for record in records]), split.lengths
        )
        np.testing.assert_array_equal(
            np.stack([record["label"] for record in records]), split.labels
        )
        assert records[0]["inputs"].dtype == split.inputs.dtype


def test_missing_examples_are_refused(tmp_path):
    with pytest.raises(DataError, match="4 examples in test, expected 5"):
        tfds_builder.builder(Short(), tmp_path).download_and_prepare()


def test_records_can_come_from_the_store(tmp_path, monkeypatch):
    """Data that takes hours to generate is generated once."""
    task = Colours()
    store = prepare(task, tmp_path)
    monkeypatch.setattr(task, "examples", None)
    builder = tfds_builder.builder(task, tmp_path / "tfds", store)
    builder.download_and_prepare()
    record = builder.as_data_source("test")[3]
    np.testing.assert_array_equal(record["inputs"], store.splits["test"].inputs[3])
    np.testing.assert_array_equal(record["label"], [0, 2])
    metadata = json.loads((builder.data_path / "metadata.json").read_text())
    assert metadata["splits"]["val"] == store.manifest["splits"]["test"]["sha256"]
    assert metadata["partial"] is False


def test_publishers_files_stand_where_tfds_looks(tmp_path):
    known = tfds_builder.builder(Colours(), tmp_path).url_infos
    for remote in (locate.IMDB, locate.CIFAR10):
        assert (known[remote.url].size, known[remote.url].checksum) == (remote.size, remote.sha256)


def test_dataset_of_a_partial_store_says_so_and_needs_no_source(tmp_path, monkeypatch):
    task = Short()
    store = prepare(task, tmp_path, allow_partial=True)
    monkeypatch.setattr(task, "source_signature", None)  # as if gone
    builder = tfds_builder.builder(task, tmp_path / "tfds", store)
    builder.download_and_prepare()
    assert "-partial" in builder.info.full_name


def test_prepared_data_is_reused(tmp_path, monkeypatch):
    task = listops("s4")
    tfds_builder.builder(task, tmp_path).download_and_prepare()
    monkeypatch.setattr(task, "examples", None)
    again = tfds_builder.builder(task, tmp_path)
    again.download_and_prepare()
    assert len(again.as_data_source("test")) == 30


def test_heavy_packages_are_imported_late():
    """`lra --help` is fast because only the functions that need a heavy package import it."""
    check = """if True:
        import sys, lra.data.tfds_builder, lra.data.verify
        sys.exit(bool({"tensorflow_datasets", "pooch", "requests"} & set(sys.modules)))"""
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
