"""Errors of Hydra and OmegaConf are one line with the nearest valid names."""

import pytest

import lra
from lra.config.messages import OTHER_NAMES
from lra.config.options import options
from lra.config.schema import KEYS
from lra.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=lru", "model.dtype=bfloat16"], "unknown key model.dtype"),
        (["optim.lrr=1"], "unknown key optim.lrr (did you mean optim.lr"),
        (["optim.learning_rate=1"], "unknown key optim.learning_rate (did you mean optim.lr?)"),
        (["lr=1"], "unknown key lr (did you mean optim.lr?)"),
        (["trainer.max_steps=1"], "(did you mean trainer.steps"),
        (
            ["model=lru", "model.num_filters=16"],
            "model=lru has no num_filters; it has: activation, bidirectional,",
        ),
        (
            ["experiment=listops/lru", "model.num_filters=16"],
            "model=lru has no num_filters; it has: activation, bidirectional",
        ),
        (
            ["model.state_size=16"],
            "model=stu has no state_size; it has: bidirectional, feedback, feedback_scale, "
            "filters, init_m_phi, init_m_u, k_u, k_y, negative_filters, num_filters",
        ),
        (["model.state_size=16", "experiment=mine"], "unknown experiment=mine"),
        (
            ["experiment=listops/quik"],
            "unknown experiment=listops/quik (did you mean listops/quick",
        ),
        (
            ["hydra/launcher=nope"],
            "no installed plugin provides hydra/launcher=nope; pip install -e '.[sweep]'",
        ),
        (["hydra/sweeper=nope"], "no installed plugin provides hydra/sweeper=nope"),
        (["nogroup=x"], "unknown key nogroup"),
        (
            ["optim.groups={a: {match: (, lr_factor: 1, weight_decay: 0}}"],
            "cannot read an override",
        ),
        (["trainer.steps=${nowhere}"], "nowhere"),
        (["optim.no_decay=" + "[" * 3000], "cannot read an override"),
        (['optim.no_decay="' + "(" * 3000 + '"'], "optim.no_decay=((((("),
    ],
)
def test_unknown_name_is_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        lra.compose(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_is_offered_instead_of_an_unknown_one():
    with pytest.raises(ConfigError, match="unknown model=nope") as caught:
        lra.compose(["model=nope"])
    assert str(caught.value).endswith(f"expected one of: {', '.join(options('model'))}")


def test_names_of_other_code_stand_for_keys_that_exist():
    names = {key.rpartition(".")[2] for key in KEYS}
    assert set(OTHER_NAMES.values()) <= names
    assert not names & set(OTHER_NAMES)
