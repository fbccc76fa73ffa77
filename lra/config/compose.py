"""From words on the command line to a resolved config, and from a config to a task and a model.

Hydra's `_target_` is the only registry: nothing here knows a task or a model by name.
"""

import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from lra.config.messages import translated_errors
from lra.config.options import CONF, OPTIONAL_GROUPS, options
from lra.config.schema import FILLED, check_ranges, format_value
from lra.errors import ConfigError


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The config that `lra train OVERRIDES` would run.

    Raises:
        ConfigError: an unknown key, option or value; one line with the nearest known names.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    overrides = normalize_overrides(overrides)
    GlobalHydra.instance().clear()
    with translated_errors(overrides), hydra.initialize_config_module("conf", version_base="1.3"):
        cfg = hydra.compose("train", overrides=overrides, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        with open_dict(cfg):
            del cfg["hydra"]
        return finalize(cfg, choices, overrides)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config with today's defaults for keys that the version which wrote it did not know."""
    filled, missing = dict(config), []
    for section in FILLED:
        if section in config:
            filled[section] = {**_defaults()[section], **config[section]}
            missing += [(section, key) for key in filled[section] if key not in config[section]]
    if missing:
        resolved = OmegaConf.create(filled)
        for section, key in missing:  # defaults may refer to other keys
            filled[section][key] = OmegaConf.select(
                resolved, f"{section}.{key}", throw_on_resolution_failure=False
            )
            if OmegaConf.is_config(filled[section][key]):
                filled[section][key] = OmegaConf.to_container(filled[section][key])
    return filled


@cache
def _defaults() -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(compose()))


def normalize_overrides(overrides: Sequence[str]) -> list[str]:
    """`overrides` without `experiment=null` and `debug=null`, which Hydra does not take, and what they undo.

    Raises:
        ConfigError: no task, model, ... is chosen; or an experiment together with a task or model, which it owns.
    """
    words = list(overrides)
    for group in OPTIONAL_GROUPS:
        undone = max((i for i, word in enumerate(words) if word == f"{group}=null"), default=-1)
        words = [
            word for i, word in enumerate(words) if i > undone or not word.startswith(f"{group}=")
        ]
    for folder in CONF.iterdir():
        if folder.is_dir() and f"{folder.name}=null" in words:
            expected = ", ".join(options(folder.name))
            raise ConfigError(f"{folder.name}=null: a run needs one; expected one of: {expected}")
    experiments = [word for word in words if word.startswith("experiment=")]
    owned = [word for word in words if word.startswith(("task=", "model="))]
    if experiments and owned:
        experiment = experiments[-1]
        raise ConfigError(
            f"{experiment} owns its task and model; drop {' and '.join(owned)}, or drop {experiment}"
        )
    return words


def finalize(
    cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str], flags: Sequence[str] = ()
) -> DictConfig:
    """`cfg`, resolved, with `names`: the chosen task, model and experiment, and the command that composes it.

    Where `model.param_count` is set, `backbone.width` becomes what meets it.

    Raises:
        ConfigError: a number out of its range, a folder without a name, or a budget that no width meets.
    """
    with open_dict(cfg):
        cfg.names = {key: choices.get(key) for key in ("task", "model", "experiment")}
        cfg.names.protocol = cfg.protocol.name
        cfg.names.command = shlex.join(["lra", "train", *flags, *overrides])
    with translated_errors(overrides):
        if OmegaConf.select(cfg, "model.param_count") is not None:
            from lra.config.width import choose_width

            choose_width(cfg, choices, overrides)
        OmegaConf.resolve(cfg)
        check_ranges(cfg)
    for key in ("data.root", "output.root"):
        if not isinstance(root := OmegaConf.select(cfg, key), str):
            raise ConfigError(f"{key}={format_value(root)} must be the path of a folder")
    for key in ("data.download", "data.allow_partial"):
        if not isinstance(switch := OmegaConf.select(cfg, key), bool):
            raise ConfigError(f"{key}={format_value(switch)} must be true or false")
    return cfg


def run_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as a record holds it; `names` are recorded beside it."""
    config = to_container(cfg)
    del config["names"]
    return config


def to_container(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg))
