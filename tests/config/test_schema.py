"""The schema agrees with conf/, refuses senseless values, and has the intended effects."""

import copy
import re

import pytest
from omegaconf import OmegaConf

import lra
from lra.config.build import build_task
from lra.config.cost import abstract_model
from lra.config.messages import dotted_keys
from lra.config.options import CONF, options
from lra.config.schema import KEYS, check_config, keys_affecting, keys_in_eval
from lra.errors import ConfigError


@pytest.fixture(scope="module")
def default():
    return OmegaConf.to_container(lra.compose())


def leaves(config):
    keys = dotted_keys(config)
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def changed(config, key, value):
    *sections, name = key.split(".")
    node = config = copy.deepcopy(config)
    for section in sections:
        node = node[section]
    node[name] = value
    return config


def test_every_key_of_conf_has_an_entry(default):
    harness = {k: v for k, v in default.items() if k not in ("task", "model", "names")}
    assert leaves(harness) - set(KEYS) == {"backbone._target_"}


def test_every_entry_is_a_key_of_conf(default):
    keys = {*leaves(default), "task.hparams", "model.recipe"}
    assert set(KEYS) - keys == set()


@pytest.mark.parametrize("group", ["tracker", "protocol"])
def test_every_option_of_a_group_has_the_same_keys(default, group):
    for option in options(group):
        config = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
        assert leaves({group: config}) == leaves({group: default[group]})


def test_defaults_are_valid(default):
    check_config(default)


@pytest.mark.parametrize(
    "file",
    [
        "train.yaml",
        *("backbone/default.yaml", "optim/adamw.yaml", "trainer/default.yaml"),
        *(f"{group}/{name}.yaml" for group in ("tracker", "protocol") for name in options(group)),
    ],
)
def test_yaml_does_not_repeat_the_help(file):
    names = {key.rpartition(".")[2] for key in KEYS}
    for line in (CONF / file).read_text().splitlines():
        key, _, rest = line.strip().partition(":")
        assert not (key in names and "#" in rest), line


def test_help_is_one_sentence_a_key():
    for key, entry in KEYS.items():
        assert re.fullmatch(r"[^\n]{1,160}\.", entry.help), key
        assert "\n" not in entry.valid.description


@pytest.fixture(scope="module")
def words_of_the_backbone():
    """Gives the words that the constructor accepts for a key, from its error message."""
    cfg = lra.compose(["task=retrieval", "model=lru", "backbone.depth=1", "backbone.width=4"])
    task = build_task(cfg)

    def words(key):
        wrong = OmegaConf.merge(cfg, {"backbone": {key: "wrong"}})
        with pytest.raises((ConfigError, ValueError), match=f"{key}=wrong is unknown") as caught:
            abstract_model(wrong, task)
        return set(str(caught.value).partition("choose one of ")[2].split(", "))

    return words


@pytest.mark.parametrize(
    "key",
    [
        *("norm", "norm_position", "activation", "glu", "mlp", "pool"),
        *("head", "pair_head", "positions", "precision"),
    ],
)
def test_described_words_are_those_of_the_backbone(words_of_the_backbone, key):
    described = KEYS[f"backbone.{key}"].valid.description
    assert set(re.split(r", | or ", described)) == words_of_the_backbone(key)


@pytest.mark.parametrize("key", ["precision", "remat"])
def test_choices_of_the_trainer_are_those_of_the_backbone(words_of_the_backbone, key):
    choices = KEYS[f"trainer.{key}"].valid.description.removeprefix("one of ")
    assert set(choices.split(", ")) == words_of_the_backbone(key)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 99999999999999999999, "must be a whole number in [0, 4294967295]"),
        ("seed", -1, "must be a whole number in [0, 4294967295]"),
        ("seed", True, "must be a whole number in [0, 4294967295]"),
        ("resume", "always", "resume=always is unknown; choose one of never, auto"),
        ("tuning_runs", 0, "must be a whole number of at least 1"),
        ("data.root", None, "data.root=null must be the path of a folder"),
        ("data.allow_partial", 1, "data.allow_partial=1 must be true or false"),
        ("data.download", "perhaps", "data.download=perhaps must be true or false"),
        ("data.verify", "often", "data.verify=often is unknown; choose one of always, auto, never"),
        ("output.root", 3, "must be the path of a folder"),
        ("optim.lr", float("inf"), "optim.lr=inf must be a finite number above 0"),
        ("optim.lr", float("nan"), "must be a number above 0"),
        ("optim.lr", True, "must be a number above 0"),
        ("optim.lr_start", "x", "must be a number of at least 0"),
        ("optim.warmup", 1.5, "must be a number in [0, 1]"),
        ("optim.b1", "foo", "must be a number in [0, 1)"),
        ("optim.b2", 1, "must be a number in [0, 1)"),
        ("optim.eps", 0, "must be a number above 0"),
        ("optim.clip", -1, "must be a number above 0 or null"),
        ("optim.clip", 0, "must be a number above 0 or null"),
        ("optim.no_decay", "(", "must be a regular expression"),
        ("optim.groups", 3, "must be a mapping"),
        ("optim.plateau", 3, "must have exactly metric, factor, patience and threshold"),
        ("optim", None, "optim=null must have exactly lr, weight_decay, "),
        ("backbone.depth", 0, "must be a whole number of at least 1"),
        ("backbone.width", 0, "must be a whole number of at least 1"),
        ("backbone.dropout", 1.5, "must be a number in [0, 1)"),
        ("backbone.norm_momentum", 2, "must be a number in [0, 1)"),
        ("task.sizes.val", 0, "must be a whole number of at least 1"),
        ("task.sizes.val", "x", "must be a whole number of at least 1"),
        ("protocol.select", "first", "protocol.select=first is unknown; choose one of best, last"),
        ("trainer.progress", 1, "must be true or false"),
        ("trainer.time_limit", "x", "trainer.time_limit=x must be a duration above 0"),
        ("tracker.wandb", "onlin", "is unknown; choose one of auto, online, offline, off"),
        ("tracker.tags", "mine", "must be a list of words"),
    ],
)
def test_senseless_value_is_one_line_with_its_key(default, key, value, message):
    with pytest.raises(ConfigError) as caught:
        check_config(changed(default, key, value))
    assert message in str(caught.value)
    assert str(caught.value).startswith(key)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.clip", None),
        ("optim.no_decay", None),
        ("optim.lr_end", 0),
        ("tracker.wandb", False),
        ("trainer.micro_batch", "auto"),
        ("trainer.time_limit", "3h30m"),
    ],
)
def test_null_words_and_the_ends_of_a_range_are_valid(default, key, value):
    check_config(changed(default, key, value))


@pytest.mark.parametrize("key", ["seed", "trainer.steps", "optim.plateau.metric"])
def test_missing_key_is_named(default, key):
    config = copy.deepcopy(default)
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    del node[name]
    with pytest.raises(ConfigError, match=f"{key} is missing; `lra keys {key}`"):
        check_config(config)


def test_backbone_of_ones_own_may_lack_arguments(default):
    config = copy.deepcopy(default)
    config["backbone"] = {"_target_": "mine.Backbone", "depth": 2, "width": 16}
    check_config(config)


def test_key_that_belongs_to_a_start_leaves_the_run_the_same():
    assert set(keys_affecting("start", "process")) == {
        *("output", "output.root", "resume", "tuning_runs", "model.param_count"),
        *(f"tracker{name}" for name in ("", ".wandb", ".project", ".entity", ".group", ".tags")),
        *("data.root", "data.download", "data.placement", "data.verify"),
        *("trainer.devices", "trainer.distributed", "trainer.distributed_timeout"),
        *("trainer.time_limit", "trainer.profile"),
    }


def test_key_without_effect_on_the_result_makes_no_configuration_in_a_table():
    assert set(keys_affecting("speed")) == {
        *("trainer.progress", "trainer.compilation_cache", "trainer.call_seconds"),
        *("trainer.checkpoint_every", "trainer.eval_batch_size", "trainer.log_every"),
        *("trainer.remat", "trainer.deterministic", "backbone.remat"),
        *("trainer.first_loss_tolerance", "trainer.chance_after"),
    }


def test_keys_that_eval_and_processes_may_set():
    assert set(keys_in_eval()) == {
        *("data.root", "data.download", "data.allow_partial", "data.verify"),
        "trainer.eval_batch_size",
    }
    assert set(keys_affecting("process")) == {
        *("trainer.distributed", "data.root", "output.root", "output"),
    }
