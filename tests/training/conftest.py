"""Fixtures of the training tests."""

import pytest
from tiny import TINY

import lra
from lra.config.build import data_arguments
from lra.data.store import prepare
from lra.training.prefetch import on_device
from lra.training.setup import Setup


@pytest.fixture(scope="session")
def made(data_root):
    """Makes the setup and the training data of a tiny run from more overrides."""

    def make(*overrides):
        cfg = lra.compose([*TINY, f"data.root={data_root}", "trainer.batch_size=8", *overrides])
        setup = Setup(cfg)
        return setup, on_device(prepare(setup.task, **data_arguments(cfg)).splits["train"])

    return make
