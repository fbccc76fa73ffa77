"""Turns errors of Hydra and OmegaConf into one line that names the nearest valid key or option."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lra.config.options import (
    CONF,
    NOT_ARGUMENTS,
    OPTIONAL_GROUPS,
    OTHER_COMMANDS,
    experiment_text,
    options,
)
from lra.errors import ConfigError

# Names that other code gives to our keys. The edit distance of learning_rate is least to lr_end.
OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "base_lr", "max_lr"), "lr"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **{"beta1": "b1", "beta2": "b2", "epsilon": "eps", "warmup_steps": "warmup"},
    **dict.fromkeys(("max_steps", "num_steps", "train_steps", "epochs", "max_epochs"), "steps"),
    **dict.fromkeys(("bs", "bsz", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("eval_interval", "eval_steps", "val_check_interval"), "eval_every"),
    **dict.fromkeys(("num_layers", "n_layers", "layers", "num_blocks"), "depth"),
    **dict.fromkeys(("hidden_size", "hidden_dim", "d_model", "dim"), "width"),
}

# found in the messages of ValueErrors that Hydra raises for its input
HYDRA_INPUT = re.compile(
    "Invalid defaults list|can only be used in conjunction with|Only one of --|Exceeds the limit"
)


@contextmanager
def translated_errors(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Raises errors of Hydra, OmegaConf and YAML files as a ConfigError of one line."""
    try:
        yield
    except Exception as error:
        from hydra.errors import HydraException  # slow to import

        if isinstance(error, (YAMLError, RecursionError)):
            problem = " ".join(str(error).split())
            raise ConfigError(f"cannot read an override or a YAML file: {problem}") from None
        if isinstance(error, (HydraException, OmegaConfBaseException)):
            raise ConfigError(one_line(error, overrides)) from None
        if isinstance(error, ValueError) and "Config group override must be" in str(error):
            raise ConfigError(
                "a config group cannot be null in a sweep; sweep over the names of its options"
            ) from None
        if isinstance(error, ValueError) and HYDRA_INPUT.search(str(error)):
            raise ConfigError(" ".join(str(error).split())) from None
        raise


def one_line(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """The message of an error of Hydra or OmegaConf, with the nearest valid names."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(str(error).split())
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1], overrides)
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, option = match[1].partition("/")
        return unknown_option(group, option)
    if "See https" in text or "viable" in text or "mismatched input" in text:
        return f"cannot read an override: {text.split(' See https')[0]}; expected key=value"
    if root is not error:
        return " ".join(str(root).split())
    return text.split(" Set the environment variable")[0]


def unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Message for an unknown key with the nearest keys, or with those of the chosen option."""
    group, _, name = key.partition(".")
    known = known_keys()
    for option in chosen_options(group, overrides) if key in known else []:
        own = known_keys(group, option)  # empty for an option outside conf/
        if own and key not in own:
            names = dict.fromkeys(path.split(".")[1] for path in own if "." in path)
            arguments = [n for n in names if n[0] != "_" and n not in NOT_ARGUMENTS]
            return f"{group}={option} has no {name}; it has: {', '.join(arguments)}"
    hint = nearest_key(key, [other for other in known if other != key])
    return f"unknown key {key}{hint}; `lra train --help` lists the groups, --cfg job all keys"


def chosen_options(group: str, overrides: Sequence[str]) -> list[str]:
    """The options of a group that `overrides` or the defaults choose; several in a sweep.

    Empty if the experiment is not in conf/.
    """
    chosen = dict(word.split("=", 1) for word in overrides if "=" in word)
    if group in chosen:
        return chosen[group].split(",")
    lines = (CONF / "train.yaml").read_text()
    if "experiment" in chosen:
        own = experiment_text(chosen["experiment"])
        if not own:
            return []
        lines = own + lines
    return re.findall(rf"^ *- (?:override /)?{group}: (\S+)", lines, re.MULTILINE)[:1]


def unknown_option(group: str, option: str) -> str:
    """Message for an unknown option, with the valid ones."""
    if group == "hydra":
        kind, _, plugin = option.partition("/")
        sweep = (
            "; pip install -e '.[sweep]' adds hydra-joblib-launcher (joblib) and "
            "hydra-submitit-launcher (submitit_*)"
        )
        advice = sweep if kind == "launcher" else ""
        return f"no installed plugin provides hydra/{kind}={plugin}{advice}"
    known = options(group) if (CONF / group).is_dir() else []
    if not known:
        return f"unknown config group {group or option}; `lra train --help` lists the groups"
    return f"unknown {group}={option}{nearest(option, known)}; expected one of: {', '.join(known)}"


def nearest_key(key: str, known: Sequence[str]) -> str:
    """`nearest`, but keys of this name in any section, or of one for the same thing, come first."""
    name = key.rpartition(".")[2]
    settable = [other for other in known if not set(other.split(".")[1:2]) & set(NOT_ARGUMENTS)]
    for own in (name, OTHER_NAMES.get(name)):
        if same := [other for other in settable if other.rpartition(".")[2] == own]:
            return did_you_mean(same[:2])
    return nearest(key, known)


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint such as " (did you mean listops?)", or nothing."""
    return did_you_mean(difflib.get_close_matches(word, known, n=2, cutoff=0.6))


def did_you_mean(names: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""


@cache
def known_keys(group: str = "", option: str = "**/*") -> list[str]:
    """Dotted keys of the default config and of every option of its groups, or of one option."""
    keys = set()
    for file in (CONF / group).glob(f"{option}.yaml"):
        parts = file.relative_to(CONF).parent.parts
        if parts and parts[0] in OTHER_COMMANDS:
            continue
        prefix = parts[0] if parts and parts[0] not in OPTIONAL_GROUPS else ""
        keys |= set(dotted_keys(OmegaConf.to_container(OmegaConf.load(file)), prefix))
    return sorted(keys)


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """Keys of an unresolved config, sections included."""
    keys = [prefix] if prefix else []
    for key, value in node.items() if isinstance(node, dict) else ():
        keys += dotted_keys(value, f"{prefix}.{key}" if prefix else str(key))
    return keys
