"""AdamW with a schedule, parameter groups and averaged weights, built from `conf/optim/`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lra.errors import ConfigError
from lra.training.schedules import scale_by_plateau, schedule


@dataclass(frozen=True)
class Group:
    """Parameters that share a factor on the learning rate and a weight decay."""

    name: str
    lr_factor: float
    weight_decay: float
    paths: tuple[str, ...]
    num_params: int


def adamw(
    cfg: Mapping[str, Any], steps: int, params: Any
) -> tuple[optax.GradientTransformation, list[Group]]:
    """Returns the optimizer for `params` and its parameter groups.

    Weight decay is decoupled and multiplied by the group's learning rate, as in `optax.adamw`
    (Loshchilov & Hutter 2019).

    Args:
        cfg: the section `optim`.
        steps: number of steps of the run, for the schedule.
        params: tree of parameters.

    Raises:
        ConfigError: a value is out of range, or a group is malformed or matches no parameter.
    """
    groups, labels = assign_groups(cfg, params)
    parts = [optax.clip_by_global_norm(cfg["clip"])] if cfg["clip"] else []
    parts.append(optax.scale_by_adam(b1=cfg["b1"], b2=cfg["b2"], eps=cfg["eps"]))
    for group in groups:
        mask = jax.tree.map(lambda label, name=group.name: label == name, labels)
        if group.weight_decay:
            parts.append(optax.masked(optax.add_decayed_weights(group.weight_decay), mask))
        if group.lr_factor != 1.0:
            parts.append(optax.masked(optax.scale(group.lr_factor), mask))
    parts.append(optax.scale_by_learning_rate(schedule(cfg, steps)))
    if cfg["schedule"] == "plateau":
        parts.append(scale_by_plateau())
    return optax.chain(*parts), groups


def ema_update(decay: float, average: Any, new: Any, count: jax.Array) -> Any:
    """Updates the bias-corrected exponential moving average of a tree with its `count`-th value.

    A value that is s steps old has the weight decay^s, divided by the sum of all weights (Kingma &
    Ba 2015, section 3). The first average is the first value; the initial `average` has no effect.
    """
    # (1 - decay) / (1 - decay^count), without the cancellation
    step_size = math.expm1(math.log(decay)) / jnp.expm1(count * math.log(decay))
    return optax.incremental_update(new, average, step_size)


def assign_groups(cfg: Mapping[str, Any], params: Any) -> tuple[list[Group], Any]:
    """Assigns each parameter to the first group whose pattern matches its path.

    The groups are those of the config, then `no_decay`, then `default`.

    Returns:
        The non-empty groups in this order, and a tree like `params` with the name of each group.

    Raises:
        ConfigError: a group of the config matches no parameter.
    """
    own = cfg["groups"] or {}
    rules = [
        (name, rule["match"], rule["lr_factor"], rule["weight_decay"]) for name, rule in own.items()
    ]
    if cfg["no_decay"]:
        rules.append(("no_decay", cfg["no_decay"], 1.0, 0.0))
    rules.append(("default", "", 1.0, cfg["weight_decay"]))
    paths = parameter_paths(params)
    labels = jax.tree.map(
        lambda path: next(name for name, match, *_ in rules if re.search(match, path)), paths
    )
    leaves = list(zip(*map(jax.tree.leaves, (paths, labels, params)), strict=True))
    groups = []
    for name, match, lr_factor, weight_decay in rules:
        members = [(path, leaf.size) for path, label, leaf in leaves if label == name]
        if members:
            names, sizes = zip(*members, strict=True)
            groups.append(Group(name, lr_factor, weight_decay, names, sum(sizes)))
        elif name in own:
            raise ConfigError(
                f"optim.groups.{name}.match={match!r} matches no parameter; the paths are: "
                f"{summarize_paths(paths)}"
            )
    return groups, labels


def parameter_paths(params: Any) -> Any:
    """Returns a tree like `params` with the path of each parameter: "blocks/0/mixer/m_u"."""

    def name(path, _):
        return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")

    return jax.tree_util.tree_map_with_path(name, params)


def summarize_paths(paths: Any) -> str:
    """Lists the distinct paths, with `*` for the layer number."""
    return ", ".join(sorted({re.sub(r"/\d+/", "/*/", path) for path in jax.tree.leaves(paths)}))
