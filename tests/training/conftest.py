"""Fixtures of the training tests."""

import shutil

import pytest
from run_checks import folder_of
from tiny import TINY

import lra
from lra.config.build import data_arguments
from lra.data.store import prepare
from lra.training.prefetch import on_device
from lra.training.setup import Setup

# 2.5 epochs of 16 steps, with dropout; checkpoints and evaluations at different steps
LONG = [
    *TINY,
    "model=lru",
    "backbone.depth=1",
    "trainer.steps=40",
    "backbone.dropout=0.1",
    "trainer.eval_every=4",
    "trainer.checkpoint_every=10",
]


@pytest.fixture(scope="session")
def finished_run(data_root, tmp_path_factory):
    """An undisturbed run: its overrides without output.root, and its folder."""
    overrides = [*LONG, f"data.root={data_root}"]
    here = [*overrides, f"output.root={tmp_path_factory.mktemp('finished')}"]
    lra.train(here)
    return overrides, folder_of(here)


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the undisturbed run: its overrides with output.root, and its folder."""
    overrides, folder = finished_run
    here = [*overrides, f"output.root={tmp_path}"]
    shutil.copytree(folder, folder_of(here))
    return here, folder_of(here)


@pytest.fixture(scope="session")
def made(data_root):
    """Makes the setup and the training data of a tiny run from more overrides."""

    def make(*overrides):
        cfg = lra.compose([*TINY, f"data.root={data_root}", "trainer.batch_size=8", *overrides])
        setup = Setup(cfg)
        return setup, on_device(prepare(setup.task, **data_arguments(cfg)).splits["train"])

    return make
