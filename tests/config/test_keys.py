"""`lra keys` and `lra train --help KEY` print the entries of the schema."""

import pytest

from lra.cli import main
from lra.config.keys import describe_keys
from lra.config.schema import KEYS
from lra.errors import ConfigError


def test_every_key_is_described():
    lines = describe_keys().splitlines()
    assert [line.partition("=")[0] for line in lines[::3]] == list(KEYS)


def test_prefix_is_a_key_or_a_section():
    text = describe_keys(["optim.plateau", "seed", "optim.plateau.factor"])
    assert text == (
        "optim.plateau.metric=accuracy\n"
        "    Validation metric of schedule=plateau, which follows PyTorch's ReduceLROnPlateau.\n"
        "    valid: one of accuracy, loss; affects: result\n"
        "optim.plateau.factor=0.1\n"
        "    Factor by which plateau lowers the learning rate.\n"
        "    valid: a number in (0, 1); affects: result\n"
        "optim.plateau.patience=10\n"
        "    Number of evaluations without an improvement before plateau lowers the rate.\n"
        "    valid: a whole number of at least 0; affects: result\n"
        "optim.plateau.threshold=0.0001\n"
        "    Smallest relative change that counts as an improvement.\n"
        "    valid: a number in [0, 1); affects: result\n"
        "seed=0\n"
        "    Seed of the parameters, of the batch order and of dropout.\n"
        "    valid: a whole number in [0, 4294967295]; affects: result\n"
    )


def test_default_that_follows_another_key_is_shown_as_such():
    assert describe_keys(["trainer.steps"]).startswith("trainer.steps=${task.hparams.steps}\n")


@pytest.mark.parametrize("prefix", ["optim.lrr", "opti", "see"])
def test_unknown_prefix_is_one_line(prefix):
    with pytest.raises(ConfigError, match=f"unknown key {prefix}"):
        describe_keys([prefix])


def test_two_commands_print_the_same(capsys):
    assert main(["keys", "trainer.remat"]) == 0
    listed = capsys.readouterr().out
    assert main(["train", "--help", "trainer.remat"]) == 0
    assert capsys.readouterr().out == listed == describe_keys(["trainer.remat"])
