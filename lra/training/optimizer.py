"""AdamW with a schedule, parameter groups and an average of the weights, all from the config."""

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
    """Parameters that share a rate: their paths, a factor on the learning rate and a weight decay."""

    name: str
    lr_factor: float
    weight_decay: float
    paths: tuple[str, ...]
    num_params: int


def adamw(
    cfg: Mapping[str, Any], steps: int, params: Any
) -> tuple[optax.GradientTransformation, list[Group]]:
    """The optimizer of `conf/optim/` for `params`, and its groups as they were assigned.

    Decay is decoupled and multiplied by the group's learning rate, as in Loshchilov & Hutter 2019 and optax.adamw.

    Raises:
        ConfigError: a group whose pattern matches no parameter.
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
    """The exponential moving average of a tree after its `count`-th value, in which a value s steps old weighs decay^s.

    Normalised by the sum of these weights: a true average from the first value on, which it equals, as in a bias-corrected
    one (Kingma & Ba 2015, section 3).
    """
    # (1 - decay) / (1 - decay^count), without the cancellation
    weight = math.expm1(math.log(decay)) / jnp.expm1(count * math.log(decay))
    return optax.incremental_update(new, average, weight)


def assign_groups(cfg: Mapping[str, Any], params: Any) -> tuple[list[Group], Any]:
    """Groups of the config in order, and a tree like `params` with each parameter's group name."""
    own = cfg["groups"] or {}
    rules = [
        (name, rule["match"], rule["lr_factor"], rule["weight_decay"]) for name, rule in own.items()
    ]
    rules += [("no_decay", cfg["no_decay"], 1.0, 0.0)] if cfg["no_decay"] else []
    rules += [("default", "", 1.0, cfg["weight_decay"])]
    paths = parameter_paths(params)
    labels = jax.tree.map(
        lambda path: next(name for name, match, *_ in rules if re.search(match, path)), paths
    )
    groups = []
    for name, match, lr_factor, weight_decay in rules:
        chosen = [
            (path, leaf.size)
            for path, label, leaf in zip(
                *map(jax.tree.leaves, (paths, labels, params)), strict=True
            )
            if label == name
        ]
        if not chosen and name in own:
            raise ConfigError(
                f"optim.groups.{name}.match={match!r} fits no parameter; the paths are: {summary(paths)}"
            )
        if chosen:
            groups.append(
                Group(
                    name,
                    lr_factor,
                    weight_decay,
                    tuple(path for path, _ in chosen),
                    sum(size for _, size in chosen),
                )
            )
    return groups, labels


def parameter_paths(params: Any) -> Any:
    """A tree like `params` with each parameter's path, as "blocks/0/mixer/m_u"."""

    def name(path, _):
        return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")

    return jax.tree_util.tree_map_with_path(name, params)


def summary(paths: Any) -> str:
    """Paths with the layer number left out, each once."""
    return ", ".join(sorted({re.sub(r"/\d+/", "/*/", path) for path in jax.tree.leaves(paths)}))
