"""Describes the keys of the harness: default, help, valid values and effect."""

from collections.abc import Sequence
from functools import reduce

from omegaconf import OmegaConf

from lra.config.compose import composed
from lra.config.messages import nearest_key
from lra.config.rules import format_value
from lra.config.schema import KEYS
from lra.errors import ConfigError


def describe_keys(prefixes: Sequence[str] = ()) -> str:
    """Three lines for each key below one of `prefixes`, or for every key."""
    chosen: dict[str, None] = {}
    for prefix in prefixes:
        below = [key for key in KEYS if f"{key}.".startswith(f"{prefix}.")]
        if not below:
            hint = nearest_key(prefix, list(KEYS))
            raise ConfigError(
                f"unknown key {prefix}{hint}; `lra keys` lists the keys of the harness, conf/task "
                "and conf/model the arguments of tasks and models"
            )
        chosen |= dict.fromkeys(below)
    with composed() as (cfg, _):
        defaults = OmegaConf.to_container(cfg)
    lines = []
    for key in chosen if prefixes else KEYS:
        default = reduce(lambda node, name: node.get(name, {}), key.split("."), defaults)
        lines += [
            f"{key}={format_value(default)}",
            f"    {KEYS[key].help}",
            f"    valid: {KEYS[key].valid.description}; affects: {KEYS[key].affects}",
        ]
    return "\n".join(lines) + "\n"
