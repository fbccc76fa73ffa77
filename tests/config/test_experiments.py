"""Every file of conf/experiment: its head, its config, and one full-size block, abstractly."""

import copy
import json
import re
from collections import defaultdict
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx
from omegaconf import OmegaConf

import lra
import models.stu
from lra.config.build import build_task
from lra.config.cost import abstract_model, cost
from lra.config.messages import chosen_options
from lra.config.options import CONF, experiment_text, options
from lra.errors import ConfigError
from lra.report.experiments import COST, PUBLISHED, TASKS, experiments, read_experiment
from lra.report.published import published_path, read_results
from lra.training.optimizer import assign_groups

ALL = options("experiment")
OF_A_PAPER = [each.name for each in experiments() if each.task in TASKS]
EACH = [  # those of ListOps stand for all in a run without the slow tests
    pytest.param(name, marks=() if name.startswith("listops/") else pytest.mark.slow)
    for name in ALL
]
BASED = re.compile(r"^  - (\w+/\w+)$", re.M)  # an experiment that changes another one


@pytest.fixture(autouse=True)
def no_filters(monkeypatch):
    """Filters are constants, of no parameter; those of Path-X take seconds."""
    for name in models.stu.FILTERS:
        monkeypatch.setitem(
            models.stu.FILTERS, name, lambda length, k: (np.ones(k), np.ones((length, k)))
        )


def own_text(name):
    return (CONF / "experiment" / f"{name}.yaml").read_text("utf-8")


compose = cache(lambda name: lra.compose([f"experiment={name}"]))
load = cache(lambda group, option: OmegaConf.load(CONF / group / f"{option}.yaml"))


BLOCKS = {}


def first_block_of(name):
    """Abstract parameters of the model with one block; experiments of equal sizes share them."""
    cfg = copy.deepcopy(compose(name))
    cfg.backbone.depth = 1
    sections = {key: OmegaConf.to_container(cfg[key]) for key in ("task", "model", "backbone")}
    sections["model"].pop("recipe")
    key = json.dumps([sections, cfg.protocol.inputs], sort_keys=True)
    if key not in BLOCKS:
        BLOCKS[key] = nnx.state(abstract_model(cfg, build_task(cfg)), nnx.Param)
    return BLOCKS[key]


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def parameters(name):
    """Of the whole model, whose blocks are alike."""
    params = first_block_of(name)
    return count(params) + (compose(name).backbone.depth - 1) * count(params["blocks"])


@pytest.mark.parametrize("name", OF_A_PAPER)
def test_head_has_command_source_score_and_cost(name):
    head = own_text(name).partition("defaults:")[0]
    assert re.search(rf"^#   lra train -m experiment={name} seed=0(,\d)+$", head, re.M)
    assert re.search(r"^# Source: \S", head, re.M)
    assert len(PUBLISHED.findall(head)) == len(COST.findall(head)) == 1
    assert "Not yet run by this project." in head
    assert all(line.startswith("#") and len(line) <= 100 for line in head.splitlines())


def test_published_scores_are_those_of_the_csv():
    known = read_results(published_path())
    rows = {(row["model"], row["task"], row["accuracy"].rstrip("0")) for row in known}
    found = [each for each in experiments() if each.score]
    assert not [e for e in found if (e.row, e.task, e.score.rstrip("0")) not in rows]
    assert len(found) > 100


def test_every_published_cell_of_these_models_has_an_experiment():
    """Of the LRU paper's ablation, rows and tasks are left out (docs/experiments.md)."""
    of_row, cells = defaultdict(set), set()
    for each in experiments():
        of_row[each.row].add(each.model)
        cells.add((each.model, each.task))
    missing = [
        (row["model"], row["task"])
        for row in read_results(published_path())
        if row["model"] in of_row.keys() - {None, "LRU-ablation"}
        and row["task"] in TASKS
        and row["trust"] != "low"
        and not any((model, row["task"]) in cells for model in of_row[row["model"]])
    ]
    assert missing == []


@pytest.mark.parametrize("name", EACH)
def test_composes_and_its_model_builds(name):
    """The parameters have the count of the head, and every parameter group has members."""
    cfg = compose(name)
    assert (cfg.names.task, cfg.names.model) == read_experiment(name)[1:3]
    assign_groups(OmegaConf.to_container(cfg.optim), first_block_of(name))
    if (stated := read_experiment(name).params) is not None:
        assert parameters(name) == stated


@pytest.mark.parametrize("name", EACH)
def test_file_repeats_no_default(name):
    """A key that repeats a default would hide a later change of the default."""
    file = OmegaConf.create(own_text(name))
    bases = BASED.findall(own_text(name))
    if bases:
        assert file.pop("defaults") == bases
        default = compose(*bases)
    else:
        chosen = {
            key.removeprefix("override /"): option
            for choice in file.pop("defaults")
            for key, option in choice.items()
        }
        assert chosen.get("protocol") != "strict"
        groups = {"protocol": "strict", "backbone": "default", "optim": "adamw"}
        groups |= {"trainer": "default"} | chosen
        default = OmegaConf.create({group: load(group, name) for group, name in groups.items()})
    for section, keys in file.items():
        for key, value in keys.items():
            assert default[section].get(key) != value, f"{section}.{key}"


def test_an_experiment_names_the_task_and_model_of_its_base():
    assert "- pathx/lru" in own_text("pathx/lru_ring")
    assert "override /model: lru" in experiment_text("pathx/lru_ring")
    assert chosen_options("model", ["experiment=pathx/lru_ring"]) == ["lru"]
    with pytest.raises(ConfigError, match="model=lru has no num_filters"):
        lra.compose(["experiment=pathx/lru_ring", "model.num_filters=3"])


@pytest.mark.parametrize("name", ["image/linear", "pathx/transformer_lra", "listops/lru"])
def test_cost_of_the_head_is_near_that_of_the_model(name):
    cfg = compose(name)
    examples = cfg.trainer.batch_size * cfg.trainer.steps
    assert read_experiment(name).flops == pytest.approx(3 * cost(cfg).flops * examples, rel=0.5)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("scifar/stu_official", 12_199_434),  # shapes of the published code
        # fluderm/MLRA, Mamba_report.pdf, Table 3; the first two with one more layer of D x D
        ("listops/mamba", 634_000 - 128 * 129),
        ("text/mamba", 648_000 - 128 * 129),
        ("retrieval/mamba", 692_000),
        ("image/mamba", 116_000),
    ],
)
def test_parameters_are_those_that_are_printed(name, printed):
    assert parameters(name) == pytest.approx(printed, rel=0.02)
