"""Builds the task and the model of a config. Hydra's `_target_` is the only registry of them."""

import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lra.config.options import NOT_ARGUMENTS
from lra.config.rules import format_value
from lra.errors import ConfigError

SIMPLE = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    type(None): "null",
}


def constructor_arguments(section: Mapping[str, Any]) -> DictConfig:
    """A task's or model's section without the keys that the harness reads."""
    return OmegaConf.create(
        {key: value for key, value in section.items() if key not in NOT_ARGUMENTS}
    )


def build_task(cfg: DictConfig):
    """The task object of a config; raises ConfigError if its constructor refuses a value."""
    return instantiate(
        "task",
        constructor_arguments(cfg.task),
        protocol=OmegaConf.to_container(cfg.protocol),
        data_root=Path(cfg.data.root),
    )


def data_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Keyword arguments of `lra.data.store.prepare`, from the section `data`."""
    return {
        "data_root": Path(cfg.data.root),
        "download": cfg.data.download,
        "allow_partial": cfg.data.allow_partial,
        "verify": cfg.data.verify,
    }


def model_builder(cfg: DictConfig, task) -> Callable[..., Any]:
    """Returns `build(rngs=...)`, which makes the model of a config with the task's sizes."""
    mixer = instantiate("model", constructor_arguments(cfg.model))
    shape = {
        "num_classes": task.num_classes,
        "seq_len": task.seq_len,
        "vocab_size": task.num_tokens,
        "num_features": task.num_features,
        "num_pairs": 2 if task.dual else 1,
        "num_targets": task.num_targets,
    }

    return partial(instantiate, "backbone", cfg.backbone, mixer=mixer, **shape)


def instantiate(group: str, section: DictConfig, **extra):
    """`hydra.utils.instantiate` of a config group, with errors of one line.

    Raises:
        ConfigError: a value of the wrong type, or one that the constructor refuses with a
            ValueError or TypeError.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    if os.getcwd() not in sys.path:  # for a mixer in the user's current folder
        sys.path.append(os.getcwd())
    try:
        check_types(group, section)
        return hydra_instantiate(section, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ConfigError, ValueError)):
            raise ConfigError(" ".join(str(cause).split())) from None
        if isinstance(cause, TypeError):
            raise ConfigError(
                f"{section._target_}: {cause}; its YAML must have every argument of the constructor"
            ) from cause
        raise ConfigError(" ".join(str(error).split())) from error


def check_types(group: str, section: DictConfig) -> None:
    """Checks values against the constructor's annotations that are simple types or mappings."""
    constructor = inspect.getattr_static(target_class(group, section), "__init__")
    parameters = inspect.signature(constructor).parameters
    for key, value in ((str(key), value) for key, value in section.items()):
        hint = parameters[key].annotation if key in parameters else None
        if typing.get_origin(hint) is Mapping and not isinstance(value, Mapping):
            raise ConfigError(
                f"{group}.{key}={format_value(value)} must be a mapping, {{name: value, ...}}"
            )
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not all(kind in SIMPLE for kind in allowed):
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            expected = " or ".join(SIMPLE[kind] for kind in allowed)
            raise ConfigError(f"{group}.{key}={format_value(value)} must be {expected}")


def target_class(group: str, section: DictConfig) -> type:
    """The class that a section's `_target_` names; raises ConfigError if there is none."""
    target = section.get("_target_")
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{group}._target_={format_value(target)} cannot be imported: {error}"
        ) from error
    if not inspect.isclass(found):
        raise ConfigError(f"{group}._target_={target} is not a class: {module} has no class {name}")
    return found
