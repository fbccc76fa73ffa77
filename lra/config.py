"""From words on the command line to a resolved config, and from a config to a task and a model.

Hydra's `_target_` is the only registry: nothing here knows a task or a model by name.
"""

import difflib
import inspect
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lra.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
# sections of a task's or model's YAML that other groups read, not constructor arguments
NOT_ARGUMENTS = ("budget", "recipe")
SIMPLE = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def options(group: str) -> list[str]:
    """Names that `group=` accepts, from the files in conf/."""
    folder = CONF / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The config that `lra train OVERRIDES` would run.

    Raises:
        ConfigError: an unknown key, option or value; one line with the nearest known names.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with translated_errors(), hydra.initialize_config_module("conf", version_base="1.3"):
        cfg = hydra.compose("train", overrides=list(overrides), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return with_names(cfg, choices, overrides)


def with_names(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """`cfg`, resolved, with `names`: the chosen task, model and experiment, and the command that composes it."""
    with open_dict(cfg):
        cfg.names = {key: choices.get(key) for key in ("task", "model", "experiment")}
        cfg.names.protocol = cfg.protocol.name
        cfg.names.command = shlex.join(["lra", "train", *overrides])
    with translated_errors():
        OmegaConf.resolve(cfg)
    return cfg


class translated_errors:
    """Turns the errors of Hydra and OmegaConf into one ConfigError line."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        from hydra.errors import HydraException

        if isinstance(error, (HydraException, OmegaConfBaseException)):
            raise ConfigError(one_line(error)) from None


def one_line(error: BaseException) -> str:
    """What went wrong in a config, in one line, with the nearest known names."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(str(error).split())
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        return f"unknown key {key}{nearest(key, known_keys())}; `lra train --help` lists the groups, --cfg job all keys"
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, option = match[1].partition("/")
        return unknown_option(group, option)
    if "See https" in text or "viable" in text or "mismatched input" in text:
        return f"cannot read an override: {text.split(' See https')[0]}; expected key=value"
    return " ".join(str(root).split()) if root is not error else text.split(" Set the environment variable")[0]


def unknown_option(group: str, option: str) -> str:
    known = options(group) if (CONF / group).is_dir() else []
    if not known:
        return f"unknown config group {group or option}; `lra train --help` lists the groups"
    return f"unknown {group}={option}{nearest(option, known)}; expected one of: {', '.join(known)}"


def nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def known_keys() -> list[str]:
    """Dotted keys of the default config and of every option of its groups."""
    keys = set()
    for file in CONF.rglob("*.yaml"):
        group = file.relative_to(CONF).parent.parts
        prefix = group[0] if group and group[0] not in ("experiment", "debug") else ""
        keys |= set(dotted(OmegaConf.load(file), prefix))
    return sorted(keys)


def dotted(node: Any, prefix: str) -> list[str]:
    if not isinstance(node, DictConfig):
        return [prefix]
    keys = [prefix] if prefix else []
    for key in map(str, node):
        path = f"{prefix}.{key}" if prefix else key
        keys += (
            [path]
            if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)
            else dotted(node[key], path)
        )
    return keys


def arguments(section: Mapping[str, Any]) -> DictConfig:
    """A task's or model's section without the parts that are not constructor arguments."""
    return OmegaConf.create({key: value for key, value in section.items() if key not in NOT_ARGUMENTS})


def build_task(cfg: DictConfig):
    """The task object of a config.

    Raises:
        ConfigError: its constructor refuses a value.
    """
    return instantiate(
        "task", arguments(cfg.task), protocol=OmegaConf.to_container(cfg.protocol), data_root=Path(cfg.data.root)
    )


def model_builder(cfg: DictConfig, task) -> Callable[..., Any]:
    """`build(rngs=...)` makes the model of a config for a task; sizes that the task fixes are filled in here."""
    mixer = instantiate("model", arguments(cfg.model))
    shape = {
        "num_classes": task.num_classes,
        "seq_len": task.seq_len,
        "vocab_size": None if task.vocab is None else len(task.vocab),
        "num_pairs": 2 if task.dual else 1,
    }

    def build(rngs):
        return instantiate("backbone", cfg.backbone, mixer=mixer, **shape, rngs=rngs)

    return build


def instantiate(group: str, section: DictConfig, **extra):
    """`hydra.utils.instantiate` of a config group whose errors are one line.

    Raises:
        ConfigError: a value of the wrong type, or one that the constructor refuses with a ValueError or TypeError.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    if os.getcwd() not in sys.path:  # a user's own mixer lies beside the shell, not in the package
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
                f"{section._target_}: {cause}; its YAML has to carry every constructor argument"
            ) from cause
        raise ConfigError(" ".join(str(error).split())) from error


def check_types(group: str, section: DictConfig) -> None:
    """Refuse a number or word where the constructor's annotation asks for another simple type."""
    from hydra.utils import get_class

    hints = {
        p.name: p.annotation
        for p in inspect.signature(inspect.getattr_static(get_class(section._target_), "__init__")).parameters.values()
    }
    for key, value in ((str(key), value) for key, value in section.items()):
        hint = hints.get(key)
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not all(kind in SIMPLE for kind in allowed):
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{group}.{key}={value} must be {' or '.join(SIMPLE[kind] for kind in allowed)}")
