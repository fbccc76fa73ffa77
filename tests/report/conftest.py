"""One trained run for all tests of saved runs."""

import shutil

import pytest
from tiny import TINY

import lra


def train_stu(data_root, root, seed=0):
    """The folder of a finished run of a small STU on short rows."""
    model = ["model=stu", "model.num_filters=8", "backbone.depth=1"]
    steps = ["trainer.steps=8", "trainer.eval_every=4", f"seed={seed}"]
    lra.train([*TINY, *model, *steps, f"data.root={data_root}", f"output.root={root}"])
    (record,) = root.rglob("record.json")
    return record.parent


@pytest.fixture(scope="session")
def trained_run(data_root, tmp_path_factory):
    return train_stu(data_root, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def other_seed(data_root, tmp_path_factory):
    """The folder of the same run with seed 1."""
    return train_stu(data_root, tmp_path_factory.mktemp("other_seed"), seed=1)


@pytest.fixture
def copied_run(trained_run, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained_run, tmp_path / "copy")
