"""Builds the task and the model of a config. Hydra's `_target_` is the only registry of them."""

import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from lra.config.messages import nearest
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
RESERVED = ("_target_", "_partial_")  # keys of a section that are no arguments
MIXER_ARGUMENTS = ("width", "seq_len", "rngs")  # supplied by the backbone
OWN_PACKAGES = {"task": "lra.tasks.", "model": "models.", "backbone": "models."}


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


def check_recorded_targets(cfg: Mapping[str, Any], allowed: Sequence[str] = ()) -> None:
    """Checks that a recorded config names classes of this package only, before one is imported.

    Args:
        allowed: further targets, which the user trusts.

    Raises:
        ConfigError: another target, with the flag that allows it.
    """
    for group, package in OWN_PACKAGES.items():
        for key, target in _targets(group, cfg.get(group)):
            own = isinstance(target, str) and target.startswith(package)
            if not own and target not in allowed:
                raise ConfigError(
                    f"{key}={format_value(target)} of this record is no class of {package}*, and "
                    f"its code would run; if you trust it, add --allow-target {target}"
                )


def _targets(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of each `_target_` in a node."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            path = f"{key}.{name}"
            yield from [(path, value)] if name == "_target_" else _targets(path, value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _targets(f"{key}.{index}", value)


def instantiate(group: str, section: DictConfig, **extra: Any) -> Any:
    """Calls the constructor that a section names in `_target_`, with its other keys and `extra`.

    With `_partial_: true` returns a function that takes the remaining arguments. A nested section
    with a `_target_` is built too if the constructor annotates its argument with a protocol or an
    `nnx.Module`, such as `models.mixer.MixerFactory`.

    Raises:
        ConfigError: a key that the constructor does not have, a value of the wrong type, or one
            that the constructor refuses. All keys and types are checked before anything is built.
    """
    if os.getcwd() not in sys.path:  # for a mixer in the user's current folder
        sys.path.append(os.getcwd())
    values = cast(dict[str, Any], OmegaConf.to_container(section, resolve=True))
    if bool(values.get("_partial_")) != (group == "model"):
        raise ConfigError(f"{group}._partial_ must be {format_value(group == 'model')}")
    check_section(group, values, [*extra, *(MIXER_ARGUMENTS if group == "model" else ())])
    return _build(group, values, **extra)


def _build(key: str, section: Mapping[str, Any], **extra: Any) -> Any:
    built = {
        name: _build(f"{key}.{name}", value) if _is_nested(value) else value
        for name, value in section.items()
        if name not in RESERVED
    }
    target = section["_target_"]
    call = partial(target_class(key, section), **built, **extra)
    if section.get("_partial_"):
        return call
    try:
        return call()
    except (ConfigError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{target}: {message}") from error


def check_section(key: str, section: Mapping[str, Any], supplied: Sequence[str] = ()) -> None:
    """Checks a section and its nested sections against the constructors; builds nothing.

    Args:
        supplied: arguments that the harness adds.
    """
    constructor = inspect.getattr_static(target_class(key, section), "__init__")
    parameters = inspect.signature(constructor).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [
        name
        for name, parameter in list(parameters.items())[1:]
        if name not in supplied and parameter.kind not in variadic
    ]
    for name in own if key in OWN_PACKAGES else ():  # others may supply those of nested sections
        if name not in section and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(
                f"{key}.{name} is missing; {section['_target_']} has no default for it"
            )
    for name, value in section.items():
        if name in RESERVED:
            continue
        path, hint = f"{key}.{name}", None
        if name in own:
            hint = parameters[name].annotation
        elif not open_ended or name in supplied:
            raise ConfigError(
                f"{path}: {section['_target_']} has no argument {name} to set"
                f"{nearest(name, own)}; it has: {', '.join(own)}"
            )
        if _is_nested(value) and _declares_object(hint):
            check_section(path, value)
        elif found := next(_targets(path, value), None):
            raise ConfigError(
                f"{found[0]}={format_value(found[1])} is refused: {section['_target_']} does not "
                f"annotate {name} with a protocol or an nnx.Module"
            )
        else:
            check_type(path, value, hint)


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _declares_object(hint: Any) -> bool:
    """Whether an annotation is a protocol or a module, or a union with one."""
    from flax import nnx

    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(
        inspect.isclass(kind)
        and (issubclass(kind, nnx.Module) or getattr(kind, "_is_protocol", False))
        for kind in kinds
    )


def check_type(key: str, value: Any, hint: Any) -> None:
    """Checks a value against an annotation of simple types or a mapping."""
    if typing.get_origin(hint) is Mapping and not isinstance(value, Mapping):
        raise ConfigError(f"{key}={format_value(value)} must be a mapping, {{name: value, ...}}")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not all(kind in SIMPLE for kind in allowed):
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join(SIMPLE[kind] for kind in allowed)
        raise ConfigError(f"{key}={format_value(value)} must be {expected}")


def target_class(key: str, section: Mapping[str, Any]) -> type:
    """The class that a section's `_target_` names; raises ConfigError if there is none."""
    target = section.get("_target_")
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{key}._target_={format_value(target)} cannot be imported: {error}"
        ) from error
    own = module.startswith(tuple(OWN_PACKAGES.values()))
    # a name that a module of this package imports, such as pathlib.Path, is none of its classes
    if not inspect.isclass(found) or (own and found.__module__ != module):
        raise ConfigError(f"{key}._target_={target} is not a class: {module} has no class {name}")
    return found
