"""Values that a constructor refuses, alone or together with others, are one line."""

from functools import cache

import pytest
from omegaconf import OmegaConf
from tiny import TINY

from lra.config.build import build_task
from lra.config.compose import composed, resolve
from lra.config.cost import abstract_model
from lra.errors import ConfigError


@cache
def unresolved(model):
    with composed([*TINY, model]) as (cfg, _):
        OmegaConf.set_struct(cfg, False)
        return cfg


def build(model, *overrides):
    """The task and the abstract model of a config, as a run builds them."""
    cfg = OmegaConf.merge(unresolved(model), OmegaConf.from_dotlist(list(overrides)))
    cfg = resolve(cfg, {}, overrides)
    return abstract_model(cfg, build_task(cfg))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=stu", "model._target_=models.nope.X"],
            "model._target_=models.nope.X cannot be imported: No module named 'models.nope'",
        ),
        (["model=stu", "model._target_=models.stu.X"], "is not a class: models.stu has no class X"),
        (["model=stu", "model._target_=null"], "model._target_=null cannot be imported"),
        (["model=stu", "model.depth=3"], "its YAML must have every argument of the constructor"),
        (
            ["model=stu", "model.negative_filters=3"],
            "model.negative_filters=3 must be true or false",
        ),
        (["model=stu", "model.num_filters=many"], "model.num_filters=many must be a whole number"),
        (["model=stu", "task.sizes=null"], "task.sizes=null must have exactly train, val and test"),
        (["model=lru", "model.state_size=0"], "model.state_size=0 must be at least 1"),
        (["model=lru", "model.max_phase=-1"], "model.max_phase=-1 must be an angle above 0"),
        (["model=transformer", "model.num_heads=0"], "model.num_heads=0 must be at least 1"),
        (
            ["model=transformer", "backbone.width=18", "model.num_heads=6"],
            "model.positions=rotary needs an even head width",
        ),
        (
            [
                *("model=transformer", "backbone.width=9", "model.num_heads=3"),
                "model.positions=sinusoidal",
            ],
            "backbone.positions=sinusoidal needs an even backbone.width, found 9",
        ),
        (
            ["model=transformer", "model.max_len=20"],
            "task.seq_len=32 is longer than model.max_len=20",
        ),
        (
            ["model=stu", "model.num_filters=33"],
            "lower model.num_filters or raise task.seq_len",
        ),  # K > L
        (["model=stu_t", "model.num_filters=33"], "lower model.num_filters or raise task.seq_len"),
        (
            ["model=ar_stu", "model.k_y=32"],
            "model.k_u=3 and model.k_y=32 reach further back than task.seq_len=32",
        ),
        (["model=stu", "model.k_u=33"], "model.k_u=33 and model.k_y=null reach further back"),
        (
            ["model=lru", "backbone.positions=rotary"],
            "backbone.positions=rotary does not go with this mixer",
        ),
        (
            ["model=transformer", "backbone.positions=learned"],
            "backbone.positions=learned does not go with this mixer",
        ),
        (["model=transformer", "model.positions=rotari"], "model.positions=rotari is unknown"),
    ],
)
def test_refused_value_is_one_line(overrides, message):
    with pytest.raises((ConfigError, ValueError)) as caught:
        build(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
