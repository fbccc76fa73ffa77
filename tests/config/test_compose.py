"""Overrides become one resolved config, and recorded configs are upgraded to today's keys."""

import copy
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import TINY

import lra
from lra.config.compose import (
    check_resolved,
    normalize_overrides,
    upgrade_config,
)
from lra.errors import ConfigError
from lra.runs.records import config_hash

RECORDS = sorted((Path(__file__).parents[1] / "support" / "first_version").rglob("record.json"))


@pytest.fixture(scope="module")
def today():
    """A recorded config of this version."""
    cfg = OmegaConf.to_container(lra.compose([*TINY, "model=lru", "backbone.width=24"]))
    del cfg["names"]
    return cfg


def test_null_undoes_an_earlier_choice():
    assert normalize_overrides(["experiment=listops/nope", "experiment=null"]) == []
    assert normalize_overrides(["debug=tiny", "seed=1", "debug=null"]) == ["seed=1"]
    assert normalize_overrides(["debug=null", "debug=tiny"]) == ["debug=tiny"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["experiment=listops/stu", "model=lru"],
            "experiment=listops/stu owns its task and model; drop model=lru, or",
        ),
        (
            ["task=listops", "experiment=listops/quick"],
            "drop task=listops, or drop experiment=listops/quick",
        ),
        (["tracker=null"], "tracker=null: a run needs one; expected one of: none, wandb"),
        (["model.budget=params:lru"], "model.budget is now model.param_count"),
        (["+model.budget=200k"], "model.budget is now model.param_count"),
        (["task.budget.steps=9"], "task.budget is now task.hparams; set task.hparams.steps"),
        (["~task.budget"], "task.budget is now task.hparams"),
    ],
)
def test_overrides_that_cannot_be_meant_are_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        normalize_overrides(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_key_of_a_user_s_yaml_with_an_old_name_is_named(tmp_path):
    (tmp_path / "task").mkdir()
    old = "_target_: lra.tasks.synthetic.Copy\nname: mine\nbudget: {depth: 2}\n"
    (tmp_path / "task" / "mine.yaml").write_text(old)
    with pytest.raises(ConfigError, match=r"task\.budget in a config file is now task\.hparams"):
        lra.compose([f"hydra.searchpath=[file://{tmp_path}]", "task=mine"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+anything=1", "unknown key anything;"),
        ("+trainr.steps=1", "unknown key trainr (did you mean trainer"),
        ("+optim.learning_rate=1", "unknown key optim.learning_rate"),
        ("+trainer.step=9", "unknown key trainer.step (did you mean trainer.steps"),
    ],
)
def test_keys_that_nothing_reads_make_no_other_configuration(word, message):
    with pytest.raises(ConfigError) as caught:
        lra.compose([word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x${seed}", "???"])
def test_interpolations_in_a_record_are_refused(value):
    check_resolved({"model": {"a": [1, "$x"]}})
    with pytest.raises(ConfigError, match=r"config\.model\.a\.1="):
        check_resolved({"model": {"a": [1, value]}})


def test_deep_nesting_in_a_record_is_refused():
    node: object = 1
    for _ in range(150):
        node = [node]
    with pytest.raises(ConfigError, match="nested more than 16 levels"):
        check_resolved({"model": node})


def test_names_and_command_of_a_composed_config():
    cfg = lra.compose(["experiment=listops/quick", "seed=3"])
    assert cfg.names == {
        "task": "listops_short",
        "model": "ar_stu",
        "experiment": "listops/quick",
        "protocol": "strict",
        "command": "lra train experiment=listops/quick seed=3",
    }


def test_debug_is_applied_last_and_lies_apart_from_the_results():
    assert lra.compose(["debug=tiny"]).output.root == "debug_runs"
    assert lra.compose(["debug=tiny", "output.root=mine"]).output.root == "mine"


@pytest.mark.parametrize(
    "words",
    [["task=pathx", "model=s5"], ["task=text", "model=lru"], ["experiment=listops/transformer"]],
)
def test_small_size_replaces_the_sizes_of_task_and_experiment(words):
    cfg, full = lra.compose([*words, "size=small"]), lra.compose(words)
    for key in ("depth", "width"):
        assert cfg.backbone[key] < full.backbone[key]
    for key in ("steps", "batch_size"):
        assert cfg.trainer[key] < full.trainer[key]
    for key in {"state_size", "num_heads"} & set(cfg.model):
        assert cfg.model[key] == cfg.task.hparams[key] < full.model[key]
    assert cfg.trainer.eval_examples == 500
    assert lra.compose([*words, "size=small", "debug=tiny"]).trainer.steps == 4


def test_invalid_value_is_refused():
    with pytest.raises(ConfigError, match="optim.lr=-1 must be a number above 0"):
        lra.compose(["optim.lr=-1"])


def test_old_names_and_missing_keys_are_upgraded(today):
    old = copy.deepcopy(today)
    old["task"]["budget"] = old["task"].pop("hparams")
    old["model"]["budget"] = "params:lru+-5%"
    del old["model"]["param_count"], old["optim"]["ema"], old["data"]["placement"]
    del old["tracker"], old["backbone"]["remat"]
    before = copy.deepcopy(old)
    upgraded = upgrade_config(old)
    assert old == before
    assert upgraded["model"]["param_count"] == "lru+-5%"
    assert upgraded["backbone"]["width"] == 24
    assert upgraded["optim"]["ema"] is None
    assert config_hash(upgraded) == config_hash(today) != config_hash(old)
    assert upgrade_config(today) == today


@pytest.mark.parametrize("file", RECORDS[:1])
def test_record_of_the_first_version_is_upgraded(file):
    config = json.loads(file.read_text())["config"]
    upgraded = upgrade_config(config)
    assert upgraded["task"]["hparams"] == config["task"]["budget"]
    assert "budget" not in upgraded["task"]
    assert set(upgraded["trainer"]) == set(lra.compose().trainer)
    assert upgraded["optim"]["clip"] == config["optim"]["clip"] == 1.0  # today's default is null
    # keys of the backbone that are newer than the record have the values of its time
    newer = {"tie_dropout": False, "pair_head_ratio": 2, "head_activation": None, "init": "flax"}
    assert {key: upgraded["backbone"][key] for key in newer} == newer
    assert upgraded["backbone"]["mask_zeros"] is False
