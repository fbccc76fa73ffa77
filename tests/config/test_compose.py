"""What the config accepts, and the one line it answers where it does not."""

import jax
import pytest
from flax import nnx
from omegaconf import OmegaConf
from tiny import TINY

import lra
from lra.config.build import build_task, model_builder
from lra.config.options import options
from lra.config.schema import Range
from lra.errors import ConfigError
from lra.training.optimizer import adamw


def build(*overrides):
    """Everything a run makes of its config before it reads data, without the arrays."""
    owned = any(word.startswith("experiment=listops") for word in overrides)
    cfg = lra.compose([*([] if owned else TINY), *overrides])
    task = build_task(cfg)
    model = nnx.eval_shape(
        lambda: model_builder(cfg, task)(rngs=nnx.Rngs(params=jax.random.key(0)))
    )
    adamw(OmegaConf.to_container(cfg.optim), 4, nnx.state(model, nnx.Param))
    return cfg


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("seed=99999999999999999999", "must be a whole number in [0, 4294967295]"),
        ("seed=-1", "must be a whole number in [0, 4294967295]"),
        ("seed=true", "must be a whole number in [0, 4294967295]"),
        ("tuning_runs=0", "must be a whole number of at least 1"),
        ("data.root=null", "must be the path of a folder"),
        ("data.allow_partial=1", "data.allow_partial=1 must be true or false"),
        ("data.download=perhaps", "data.download=perhaps must be true or false"),
        ("output.root=3", "must be the path of a folder"),
        ("optim.lr=inf", "must be a finite number above 0"),
        ("optim.lr=nan", "must be a number above 0"),
        ("optim.lr=true", "must be a number above 0"),
        ("optim.lr_start=x", "must be a number of at least 0"),
        ("optim.lr_end=abc", "must be a number of at least 0"),
        ("optim.warmup=1.5", "must be a number in [0, 1]"),
        ("optim.b1=foo", "must be a number in [0, 1)"),
        ("optim.b2=1", "must be a number in [0, 1)"),
        ("optim.eps=0", "must be a number above 0"),
        ("optim.clip=-1", "must be a number above 0 or null"),
        ("optim.clip=0", "must be a number above 0 or null"),
        ("optim.clip=abc", "must be a number above 0 or null"),
        ("optim.no_decay='('", "must be a regular expression"),
        ("optim.no_decay=3", "must be a regular expression"),
        ("optim.groups=3", "must be a mapping"),
        ("optim.groups={a: {match: m_u}}", "must have exactly match, lr_factor and weight_decay"),
        (
            "optim.groups={default: {match: m_u, lr_factor: 1, weight_decay: 0}}",
            "has the name of a built-in group",
        ),
        ("optim.groups={a: {match: (, lr_factor: 1, weight_decay: 0}}", "cannot read an override"),
        (
            "optim.groups={a: {match: '(', lr_factor: 1, weight_decay: 0}}",
            "must be a regular expression",
        ),
        (
            "optim.groups={a: {match: m_u, lr_factor: -1, weight_decay: 0}}",
            "must be a number of at least 0",
        ),
        ("backbone.depth=0", "must be a whole number of at least 1"),
        ("backbone.width=0", "must be a whole number of at least 1"),
        ("backbone.dropout=1.5", "must be a number in [0, 1)"),
        ("backbone.norm_momentum=2", "must be a number in [0, 1)"),
        ("model._target_=models.nope.X", "cannot be imported: No module named 'models.nope'"),
        ("model._target_=models.stu.X", "is not a class: models.stu has no class X"),
        ("model._target_=null", "cannot be imported"),
        ("task.sizes=null", "must be a mapping"),
        ("task.sizes.val=0", "must be a whole number of at least 1"),
        ("task.sizes.val=x", "must be a whole number of at least 1"),
        ("tracker=null", "a run needs one; expected one of: none, wandb"),
    ],
)
def test_senseless_value_is_one_line_with_its_key(bad, words):
    with pytest.raises(ConfigError) as caught:
        build(bad)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert bad.partition("=")[0] in str(caught.value) or words.startswith("cannot read")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=lru", "model.state_size=0"], "model.state_size=0 must be at least 1"),
        (["model=lru", "model.max_phase=-1"], "model.max_phase=-1 must be an angle above 0"),
        (["model=transformer", "model.num_heads=0"], "model.num_heads=0 must be at least 1"),
        (["model=transformer", "model.num_heads=-1"], "model.num_heads=-1 must be at least 1"),
        (
            ["model=transformer", "backbone.width=18", "model.num_heads=6"],
            "model.positions=rotary needs an even head width",
        ),
        (
            [
                "model=transformer",
                "backbone.width=9",
                "model.num_heads=3",
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
        (
            ["model=lru", "model.dtype=bfloat16"],
            "unknown key model.dtype",
        ),  # complex states are always complex64
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
            "model=stu has no state_size; it has: bidirectional, filters, init_m_u, k_u, k_y, "
            "negative_filters, num_filters",
        ),
        (
            ["experiment=listops/quik"],
            "unknown experiment=listops/quik (did you mean listops/quick",
        ),
        (
            ["experiment=listops/stu", "model=lru"],
            "experiment=listops/stu owns its task and model; drop model=lru, or",
        ),
        (
            ["task=listops", "experiment=listops/quick"],
            "drop task=listops, or drop experiment=listops/quick",
        ),
        (
            ["hydra/launcher=nope"],
            "no installed plugin provides hydra/launcher=nope; pip install -e '.[sweep]'",
        ),
        (["hydra/sweeper=nope"], "no installed plugin provides hydra/sweeper=nope"),
    ],
)
def test_choices_that_do_not_fit_together_are_one_line(overrides, words):
    with pytest.raises(ConfigError) as caught:
        build(*overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "word", ["experiment=null", "optim.clip=null", "optim.no_decay=null", "optim.lr_end=0"]
)
def test_null_and_the_ends_of_a_range_are_accepted(word):
    build(word)


def test_null_undoes_an_earlier_choice():
    assert build("experiment=listops/nope", "experiment=null").names.experiment is None
    assert lra.compose(["debug=tiny", "debug=null"]) == lra.compose()
    assert lra.compose(["debug=null", "debug=tiny"]).backbone.width == 16


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5), (-0.1, 1)),
        ("(0, 1]", (0.1, 1), (0, 1.1)),
        ("(0, inf)", (1e-9, 1e30), (0, float("inf"))),
    ],
)
def test_range_knows_its_ends(interval, inside, outside):
    for value in inside:
        Range(interval).check("key", value)
    for value in (*outside, float("nan"), "1", None, True):
        with pytest.raises(ConfigError, match="key="):
            Range(interval).check("key", value)
    Range(interval, optional=True).check("key", None)
    with pytest.raises(ConfigError, match="whole number"):
        Range("[0, 9]", whole=True).check("key", 0.5)


@pytest.mark.parametrize("model", options("model"))
def test_every_model_is_offered_where_an_unknown_one_is_asked_for(model):
    with pytest.raises(ConfigError, match=rf"unknown model=nope.*expected one of:.*\b{model}\b"):
        lra.compose(["model=nope"])


def test_debug_has_the_last_word():
    """So that its runs lie apart from those that tables count."""
    cfg = lra.compose(["debug=tiny"])
    assert cfg.output.root == "debug_runs"
    assert lra.compose(["debug=tiny", "output.root=mine"]).output.root == "mine"
