"""Composes the config of a run from command-line overrides, and upgrades recorded configs."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from lra.config.messages import translated_errors, unknown_key
from lra.config.options import CONF, OPTIONAL_GROUPS, options
from lra.config.schema import COMPLETE_SECTIONS, RENAMED, check_config, unknown_keys
from lra.errors import ConfigError

MAX_DEPTH = 16  # of a recorded config; those of conf/ have 4 levels


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The resolved config of `lra train OVERRIDES`; raises ConfigError if it is invalid."""
    with composed(overrides) as (cfg, choices):
        return finalize(cfg, choices, normalize_overrides(overrides))


@contextmanager
def composed(overrides: Sequence[str] = ()) -> Iterator[tuple[DictConfig, dict[str, Any]]]:
    """The unresolved config and the chosen option of each group, while Hydra is initialized."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from lra.config.yaml_files import use_checked_files

    overrides = normalize_overrides(overrides)
    use_checked_files()
    GlobalHydra.instance().clear()
    with translated_errors(overrides), hydra.initialize_config_module("conf", version_base="1.3"):
        cfg = hydra.compose("train", overrides=overrides, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        with open_dict(cfg):
            del cfg["hydra"]
        yield cfg, choices


def normalize_overrides(overrides: Sequence[str]) -> list[str]:
    """Removes `experiment=null`, `debug=null`, which Hydra rejects, and the choices they cancel.

    Raises:
        ConfigError: null for a group that every run needs, an experiment together with a task or
            model, or a key that has a new name.
    """
    words: list[str] = []
    for word in overrides:
        group, _, option = word.partition("=")
        if group in OPTIONAL_GROUPS and option == "null":
            words = [earlier for earlier in words if not earlier.startswith(f"{group}=")]
            continue
        words.append(word)
        key = group.lstrip("+~")
        for old, new in RENAMED.items():
            if key == old or key.startswith(f"{old}."):
                raise ConfigError(f"{word}: {old} is now {new}; set {key.replace(old, new, 1)}")
        if option == "null" and (CONF / group).is_dir():
            expected = ", ".join(options(group))
            raise ConfigError(f"{word}: a run needs one; expected one of: {expected}")
    experiments = [word for word in words if word.startswith("experiment=")]
    owned = [word for word in words if word.startswith(("task=", "model="))]
    if experiments and owned:
        raise ConfigError(
            f"{experiments[-1]} owns its task and model; drop {' and '.join(owned)}, "
            f"or drop {experiments[-1]}"
        )
    return words


def finalize(
    cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str], flags: Sequence[str] = ()
) -> DictConfig:
    """Resolves and checks a composed config, and chooses its width if `model.param_count` is set.

    Args:
        choices: the chosen option of each config group.
        flags: flags of Hydra that stand before `overrides` on the command line.

    Raises:
        ConfigError: an invalid value, or a number of parameters that no width gives.
    """
    for old, new in RENAMED.items():
        if OmegaConf.select(cfg, old) is not None:
            raise ConfigError(f"{old} in a config file is now {new}; rename the key")
    for key in unknown_keys(to_container(cfg)):
        raise ConfigError(unknown_key(key, overrides))
    if OmegaConf.select(cfg, "model.param_count") is not None:
        from lra.config.width import choose_width  # imports JAX

        choose_width(cfg, choices, overrides)
    return resolve(cfg, choices, overrides, flags)


def resolve(
    cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str], flags: Sequence[str] = ()
) -> DictConfig:
    """Resolves a config in place, checks it, and adds the names of its options and its command.

    The arguments and errors are those of `finalize`.
    """
    with translated_errors(overrides):
        with open_dict(cfg):
            cfg.names = {key: choices.get(key) for key in ("task", "model", "experiment")}
            cfg.names.protocol = cfg.protocol.name
            cfg.names.command = shlex.join(["lra", "train", *flags, *overrides])
        OmegaConf.resolve(cfg)
    check_config(cfg)
    return cfg


def run_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as a record holds it; `names` are recorded beside it."""
    config = to_container(cfg)
    del config["names"]
    return config


def to_container(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg))


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrades the config of a record: renames keys and adds missing ones with today's values."""
    upgraded = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    for old, new in RENAMED.items():
        (section, old_name), new_name = old.split("."), new.split(".")[1]
        if old_name in upgraded.get(section, {}):
            upgraded[section][new_name] = upgraded[section].pop(old_name)
    if isinstance(size := upgraded.get("model", {}).get("param_count"), str):
        upgraded["model"]["param_count"] = size.removeprefix("params:")
    for section in {"backbone", *COMPLETE_SECTIONS} & upgraded.keys():
        upgraded[section] = {**_defaults()[section], **upgraded[section]}
    return upgraded


@cache
def _defaults() -> dict[str, Any]:
    """The default config; read without Hydra, whose start takes longer than a table."""
    train = cast(DictConfig, OmegaConf.load(CONF / "train.yaml"))
    entries = [entry for entry in train.pop("defaults") if isinstance(entry, Mapping)]
    chosen = {group: name for entry in entries for group, name in entry.items()}
    groups = {
        group: OmegaConf.load(CONF / group / f"{name}.yaml")
        for group, name in chosen.items()
        if name is not None and "hydra" not in group
    }
    del train["hydra"]
    cfg = OmegaConf.merge(groups, train)
    OmegaConf.resolve(cfg)
    return cast(dict[str, Any], OmegaConf.to_container(cfg))


def check_resolved(value: Any, key: str = "config", depth: int = 0) -> None:
    """Checks that a recorded config holds plain values, which resolving leaves as they are.

    Raises:
        ConfigError: an interpolation such as ${oc.env:HOME}, a missing value, or deep nesting.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{key.partition('.')[0]} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise ConfigError(
            f"{key}={value} is refused: a record holds resolved values, no interpolation"
        )
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_resolved(item, f"{key}.{name}", depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            check_resolved(item, f"{key}.{index}", depth + 1)
