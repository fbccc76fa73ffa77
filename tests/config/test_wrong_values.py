"""Wrong values of every key end in one line, whatever their type."""

import copy
import math
import sys
from functools import cache

import pytest
from omegaconf import OmegaConf
from tiny import TINY

from lra.cli import main
from lra.config.build import build_task
from lra.config.compose import composed, resolve, run_config, to_container
from lra.config.cost import abstract_model
from lra.config.messages import translated_errors
from lra.config.schema import KEYS, check_config
from lra.errors import ConfigError
from lra.runs.records import run_path
from lra.training.distributed import distributed_arguments
from lra.training.micro_batch import check_micro_batch
from lra.training.setup import check_compatible

VALUES = ["", "a\0b\n", "ü☃", -1, 0.5, 10**30, math.nan, ["a", 1], {"a": 1}, None]


@cache
def unresolved():
    with composed([*TINY, "model=lru", "backbone.depth=1", "backbone.width=4"]) as (cfg, choices):
        OmegaConf.set_struct(cfg, False)
        return cfg, choices


@cache
def resolved():
    cfg, choices = unresolved()
    return to_container(resolve(copy.deepcopy(cfg), choices, []))


def checks(config, key):
    """What `lra train` checks before it makes a folder, as far as it depends on `key`."""
    check_config(config)
    cfg = OmegaConf.create(config)
    check_compatible(cfg)
    check_micro_batch(cfg, 1)
    run_path(cfg.output.root, run_config(cfg), config["names"])
    if cfg.trainer.distributed not in (None, "auto"):
        distributed_arguments(cfg.trainer.distributed)
    if key.startswith(("task", "data", "protocol", "backbone")):
        task = build_task(cfg)
        if key.startswith(("backbone", "protocol")):
            abstract_model(cfg, task)


def assert_one_line(work, *args):
    """Runs `work`, which may accept a value or refuse it."""
    message = ""
    try:
        work(*args)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("key", KEYS)
def test_wrong_value_is_refused_in_one_line_or_accepted(key):
    *sections, name = key.split(".")
    for value in VALUES:
        config = node = copy.deepcopy(resolved())
        for section in sections:
            node = node[section]
        node[name] = value
        assert_one_line(checks, config, key)


@pytest.mark.parametrize("key", ["task.hparams", "protocol.pair_head", "trainer.precision", "seed"])
@pytest.mark.parametrize("value", ["${nowhere}", "${", {"a": 1}, None])
def test_wrong_value_that_other_keys_take_over_is_one_line(key, value):
    def compose():
        cfg, choices = unresolved()
        cfg = copy.deepcopy(cfg)
        with translated_errors():
            OmegaConf.update(cfg, key, value, merge=False)
        resolve(cfg, choices, [])

    assert_one_line(compose)


@pytest.mark.parametrize(
    "words",
    [
        *(["seed=" + value] for value in ("", "9" * 5000, "{a: 1}", "${nowhere}", "[", "a\nb")),
        *(
            ["~protocol"],
            ["~trainer.steps"],
            ["~task.hparams"],
            ["--resolve"],
            ["--cfg", "job", "--run"],
        ),
        *(["-m", "seed=range(0,0)"], ["-m", "model=glob(nothing*)"], ["+anything=1"]),
        *(["+trainer.step=1"], ["backbone.depth=1000000"], ["output.root=''"]),
    ],
)
def test_wrong_word_is_one_line_with_exit_code_2(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(["train", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lra: error: ")
    assert not list(tmp_path.iterdir())
