"""Values that a constructor refuses, alone or together with others, are one line."""

import sys
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
        (
            ["model=stu", "model.num_filter=3"],
            "model.num_filter: models.stu.STU has no argument num_filter to set (did you mean "
            "num_filters",
        ),
        (["model=stu", "model.width=3"], "models.stu.STU has no argument width to set"),
        (["model=stu", "task.protocol={}"], "ListOps has no argument protocol to set"),
        (["model=stu", "model._partial_=false"], "model._partial_ must be true"),
        (["model=stu", "task._partial_=true"], "task._partial_ must be false"),
        (
            ["model=stu", "model._target_=models.stu.nnx"],
            "model._target_=models.stu.nnx is not a class",
        ),
        (["model=stu", "task._target_=lra.tasks.base.Path"], "lra.tasks.base has no class Path"),
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


@pytest.mark.parametrize("missing", ["task.data_seed", "model.num_filters", "backbone.pool"])
def test_missing_argument_is_named(missing):
    cfg = unresolved("model=stu").copy()
    section, name = missing.split(".")
    del cfg[section][name]
    cfg = resolve(cfg, {}, [])
    with pytest.raises(ConfigError, match=f"^{missing} is missing; .* has no default for it"):
        abstract_model(cfg, build_task(cfg))


MIXERS = """
import pathlib

from flax import nnx

from models.mixer import MixerFactory, MixerModule


class Outer(MixerModule):
    causal = True

    def __init__(self, width: int, seq_len: int, *, inner: MixerFactory, plain, rngs: nnx.Rngs):
        self.inner, self.plain = inner(width=width, seq_len=seq_len, rngs=rngs), plain

    def __call__(self, x, mask, *, train=False, rngs=None):
        return self.inner(x, mask, train=train, rngs=rngs)


class Trap:
    def __init__(self, path):
        pathlib.Path(path).touch()
"""


@pytest.fixture
def mixers(tmp_path, monkeypatch):
    """A module `own_mixers` in the current folder; gives the section of its nested mixer."""
    (tmp_path / "own_mixers.py").write_text(MIXERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    gru = {"_target_": "models.gru.GRU", "_partial_": True, "state_size": 8}
    gru["bidirectional"] = False
    yield {"_target_": "own_mixers.Outer", "_partial_": True, "inner": gru, "plain": None}
    sys.modules.pop("own_mixers", None)


def with_model(section):
    cfg = unresolved("model=stu").copy()
    cfg.model = OmegaConf.create(section)
    return resolve(cfg, {}, [])


def test_a_nested_target_is_built_where_the_constructor_declares_it(mixers):
    cfg = with_model(mixers)
    model = abstract_model(cfg, build_task(cfg))
    assert type(model.blocks[0].mixer.inner).__name__ == "GRU"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("plain",), "Outer does not annotate plain with a protocol or an nnx.Module"),
        (("plain", "deeper"), "model.plain.deeper._target_=own_mixers.Trap is refused"),
        (("zzz",), "own_mixers.Outer has no argument zzz to set; it has: inner, plain"),
        (("inner", "zzz"), "model.inner.zzz: models.gru.GRU has no argument zzz to set"),
    ],
)
def test_a_nested_target_elsewhere_is_refused_before_it_runs(mixers, tmp_path, place, message):
    node = mixers
    for name in place[:-1]:
        node[name] = node.get(name) or {}
        node = node[name]
    node[place[-1]] = {"_target_": "own_mixers.Trap", "path": str(tmp_path / "ran")}
    cfg = with_model(mixers)
    with pytest.raises(ConfigError, match=message):
        abstract_model(cfg, build_task(cfg))
    assert not (tmp_path / "ran").exists()
