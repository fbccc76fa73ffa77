"""From words on the command line to a resolved config, and from a config to a task and a model.

Hydra's `_target_` is the only registry: nothing here knows a task or a model by name.
"""

import difflib
import importlib
import inspect
import math
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lra.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
# parts of a task's or model's section that others read, not constructor arguments
NOT_ARGUMENTS = ("budget", "recipe")
SIMPLE = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
OPTIONAL_GROUPS = ("experiment", "debug")


class Range(NamedTuple):
    """The numbers that a key takes: an interval such as "[0, 1)", in none of which lie inf and NaN."""

    interval: str
    whole: bool = False
    optional: bool = False  # or null
    words: tuple[str, ...] = ()  # or one of these

    def check(self, key: str, value: Any) -> None:
        """Raises: ConfigError, if `value` is none of them."""
        low, high = self.interval[1:-1].split(", ")
        if (value is None and self.optional) or value in self.words:
            return
        if isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool):
            above = float(low) < value or (self.interval[0] == "[" and value == float(low))
            below = value < float(high) or (self.interval[-1] == "]" and value == float(high))
            if above and below:
                return
        kind = "whole " if self.whole else "finite " if value == math.inf else ""
        bound = f"{'of at least' if self.interval[0] == '[' else 'above'} {low}"
        expected = f"a {kind}number {bound if high == 'inf' else f'in {self.interval}'}"
        others = [*self.words, *["null"] * self.optional]
        raise ConfigError(f"{key}={shown(value)} must be {' or '.join([expected, *others])}")


# what the harness asks of numbers; a task's and a model's own are their constructors' business
RANGES = {
    "seed": Range("[0, 4294967295]", whole=True),  # JAX would silently take it modulo 2^32
    "tuning_runs": Range("[1, inf)", whole=True),
    "task.sizes.train": Range("[1, inf)", whole=True),
    "task.sizes.val": Range("[1, inf)", whole=True),
    "task.sizes.test": Range("[1, inf)", whole=True),
    "backbone.depth": Range("[1, inf)", whole=True),
    "backbone.width": Range("[1, inf)", whole=True),
    "backbone.dropout": Range("[0, 1)"),
    "backbone.embedding_dropout": Range("[0, 1)"),
    "backbone.norm_momentum": Range("[0, 1)"),
    "backbone.mlp_ratio": Range("(0, inf)"),
    "optim.lr": Range("(0, inf)"),
    "optim.weight_decay": Range("[0, inf)"),
    "optim.b1": Range("[0, 1)"),
    "optim.b2": Range("[0, 1)"),
    "optim.eps": Range("(0, inf)"),
    "optim.warmup": Range("[0, 1]"),
    "optim.lr_start": Range("[0, inf)"),
    "optim.lr_end": Range("[0, inf)"),
    "optim.clip": Range("(0, inf)", optional=True),
    "optim.plateau.factor": Range("(0, 1)"),
    "optim.plateau.patience": Range("[0, inf)", whole=True),
    "optim.plateau.threshold": Range("[0, 1)"),
    "optim.ema": Range("(0, 1)", optional=True),
    "optim.label_smoothing": Range("[0, 1)"),
    "trainer.steps": Range("[1, inf)", whole=True),
    "trainer.batch_size": Range("[1, inf)", whole=True),
    "trainer.micro_batch": Range("[1, inf)", whole=True, optional=True, words=("auto",)),
    "trainer.devices": Range("[1, inf)", whole=True, optional=True),
    "trainer.distributed_timeout": Range("[1, inf)", whole=True),
    "trainer.eval_batch_size": Range("[1, inf)", whole=True),
    "trainer.train_eval_examples": Range("[1, inf)", whole=True),
    "trainer.eval_examples": Range("[1, inf)", whole=True, optional=True),
    "trainer.eval_every": Range("[1, inf)", whole=True, optional=True),
    "trainer.early_stopping": Range("[1, inf)", whole=True, optional=True),
    "trainer.first_loss_tolerance": Range("(1, inf)", optional=True),
    "trainer.chance_after": Range("[0, 1]", optional=True),
    "trainer.checkpoint_every": Range("[1, inf)", whole=True, optional=True),
    "trainer.log_every": Range("[1, inf)", whole=True, optional=True),
    "trainer.call_seconds": Range("(0, inf)"),
}

# sections that a record of an older version may hold in part
FILLED = ("backbone", "optim", "trainer", "data", "tracker")

# keys that take one word of a few
WORDS = {
    "optim.schedule": ("cosine", "linear", "rsqrt", "constant", "plateau"),
    "optim.plateau.metric": ("accuracy", "loss"),
    "trainer.precision": ("float32", "tf32", "bf16"),
    "trainer.remat": (
        *("none", "block", "dots", "everything_saveable", "nothing_saveable", "dots_saveable"),
        "dots_with_no_batch_dims_saveable",
    ),
    "data.placement": ("auto", "device", "host"),
}


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

    overrides = tidy(overrides)
    GlobalHydra.instance().clear()
    with translated_errors(overrides), hydra.initialize_config_module("conf", version_base="1.3"):
        cfg = hydra.compose("train", overrides=overrides, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        with open_dict(cfg):
            del cfg["hydra"]
        return with_names(cfg, choices, overrides)


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
            filled[section][key] = OmegaConf.select(resolved, f"{section}.{key}", throw_on_resolution_failure=False)
            if OmegaConf.is_config(filled[section][key]):
                filled[section][key] = OmegaConf.to_container(filled[section][key])
    return filled


@cache
def _defaults() -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(compose()))


def tidy(overrides: Sequence[str]) -> list[str]:
    """`overrides` without `experiment=null` and `debug=null`, which Hydra does not take, and what they undo.

    Raises:
        ConfigError: no task, model, ... is chosen; or an experiment together with a task or model, which it owns.
    """
    words = list(overrides)
    for group in OPTIONAL_GROUPS:
        undone = max((i for i, word in enumerate(words) if word == f"{group}=null"), default=-1)
        words = [word for i, word in enumerate(words) if i > undone or not word.startswith(f"{group}=")]
    for folder in CONF.iterdir():
        if folder.is_dir() and f"{folder.name}=null" in words:
            expected = ", ".join(options(folder.name))
            raise ConfigError(f"{folder.name}=null: a run needs one; expected one of: {expected}")
    experiments = [word for word in words if word.startswith("experiment=")]
    owned = [word for word in words if word.startswith(("task=", "model="))]
    if experiments and owned:
        experiment = experiments[-1]
        raise ConfigError(f"{experiment} owns its task and model; drop {' and '.join(owned)}, or drop {experiment}")
    return words


def with_names(
    cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str], flags: Sequence[str] = ()
) -> DictConfig:
    """`cfg`, resolved, with `names`: the chosen task, model and experiment, and the command that composes it.

    Where `model.budget` is set, `backbone.width` becomes what meets it.

    Raises:
        ConfigError: a number out of its range, a folder without a name, or a budget that no width meets.
    """
    with open_dict(cfg):
        cfg.names = {key: choices.get(key) for key in ("task", "model", "experiment")}
        cfg.names.protocol = cfg.protocol.name
        cfg.names.command = shlex.join(["lra", "train", *flags, *overrides])
    with translated_errors(overrides):
        if OmegaConf.select(cfg, "model.budget") is not None:
            from lra.budget import choose_width

            choose_width(cfg, choices, overrides)
        OmegaConf.resolve(cfg)
        check_ranges(cfg)
    for key in ("data.root", "output.root"):
        if not isinstance(root := OmegaConf.select(cfg, key), str):
            raise ConfigError(f"{key}={shown(root)} must be the path of a folder")
    for key in ("data.download", "data.allow_partial"):
        if not isinstance(switch := OmegaConf.select(cfg, key), bool):
            raise ConfigError(f"{key}={shown(switch)} must be true or false")
    return cfg


def check_ranges(section: Mapping[Any, Any], prefix: str = "") -> None:
    """Refuse a number outside of `RANGES` and a word that is none of `WORDS`.

    `prefix` is the dotted key of `section`, with a dot at its end.
    """
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            check_ranges(value, f"{key}.")
        elif key in RANGES:
            RANGES[key].check(key, value)
        elif key in WORDS and value not in WORDS[key]:
            raise ConfigError(f"{key}={shown(value)} is unknown; choose one of {', '.join(WORDS[key])}")


def shown(value: Any) -> str:
    """`value` as one types it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


@contextmanager
def translated_errors(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turns the errors of Hydra and OmegaConf into one ConfigError line; `overrides` are what the user typed."""
    from hydra.errors import HydraException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error, overrides)) from None
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        raise ConfigError("a config group cannot be null in a sweep; sweep over its names alone") from None


def one_line(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """What went wrong in a config, in one line, with the nearest known names."""
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
    return " ".join(str(root).split()) if root is not error else text.split(" Set the environment variable")[0]


def unknown_key(key: str, overrides: Sequence[str]) -> str:
    """The arguments of the chosen option where `key` is one of another option of its group, else the nearest keys."""
    group, _, name = key.partition(".")
    known = known_keys()
    for option in chosen(group, overrides) if key in known else []:
        own = known_keys(group, option)  # none of an option in a user's own folder
        names = dict.fromkeys(part for path in own for part in path.split(".")[1:2] if part[0] != "_")
        if own and key not in own:
            return f"{group}={option} has no {name}; it has: {', '.join(n for n in names if n not in NOT_ARGUMENTS)}"
    hint = nearest(key, [other for other in known if other != key])
    return f"unknown key {key}{hint}; `lra train --help` lists the groups, --cfg job all keys"


def chosen(group: str, overrides: Sequence[str]) -> list[str]:
    """The task or model that `overrides` choose, several in a sweep; empty where conf/ cannot tell."""
    words = [word.partition("=")[2] for word in overrides if word.startswith(f"{group}=")]
    if words:
        return words[-1].split(",")
    try:
        return [compose([word for word in overrides if word.startswith("experiment=")]).names[group]]
    except (ConfigError, OmegaConfBaseException):  # of a user's own config folder, or of a group without a name
        return []


def unknown_option(group: str, option: str) -> str:
    if group == "hydra":
        group, option = f"hydra/{option.split('/')[0]}", option.split("/")[-1]
        extra = "pip install -e '.[sweep]' adds hydra-joblib-launcher (joblib) and hydra-submitit-launcher (submitit_*)"
        return f"no installed plugin provides {group}={option}{f'; {extra}' if group == 'hydra/launcher' else ''}"
    known = options(group) if (CONF / group).is_dir() else []
    if not known:
        return f"unknown config group {group or option}; `lra train --help` lists the groups"
    return f"unknown {group}={option}{nearest(option, known)}; expected one of: {', '.join(known)}"


def nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def known_keys(group: str = "", option: str = "**/*") -> list[str]:
    """Dotted keys of the default config and of every option of its groups, or of one option."""
    keys = set()
    for file in (CONF / group).glob(f"{option}.yaml"):
        parts = file.relative_to(CONF).parent.parts
        prefix = parts[0] if parts and parts[0] not in OPTIONAL_GROUPS else ""
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


def data_arguments(cfg: DictConfig) -> dict[str, Any]:
    """What `lra.data.store.prepare` takes besides the task."""
    return {
        "data_root": Path(cfg.data.root),
        "download": cfg.data.download,
        "allow_partial": cfg.data.allow_partial,
    }


def model_builder(cfg: DictConfig, task) -> Callable[..., Any]:
    """`build(rngs=...)` makes the model of a config for a task; sizes that the task fixes are filled in here."""
    mixer = instantiate("model", arguments(cfg.model))
    shape = {
        "num_classes": task.num_classes,
        "seq_len": task.seq_len,
        "vocab_size": task.num_tokens,
        "num_features": task.num_features,
        "num_pairs": 2 if task.dual else 1,
        "num_targets": task.num_targets,
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
    """Refuse a value where the constructor's annotation asks for another simple type or for a mapping."""
    parameters = inspect.signature(inspect.getattr_static(target_class(group, section), "__init__")).parameters
    for key, value in ((str(key), value) for key, value in section.items()):
        hint = parameters[key].annotation if key in parameters else None
        if typing.get_origin(hint) is Mapping and not isinstance(value, Mapping):
            raise ConfigError(f"{group}.{key}={shown(value)} must be a mapping, {{name: value, ...}}")
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not all(kind in SIMPLE for kind in allowed):
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{group}.{key}={shown(value)} must be {' or '.join(SIMPLE[kind] for kind in allowed)}")


def target_class(group: str, section: DictConfig) -> type:
    """The class that `_target_` names.

    Raises:
        ConfigError: there is no such class.
    """
    target = section.get("_target_")
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{group}._target_={shown(target)} cannot be imported: {error}") from error
    if not inspect.isclass(found):
        raise ConfigError(f"{group}._target_={target} is not a class: {module} has no class {name}")
    return found
