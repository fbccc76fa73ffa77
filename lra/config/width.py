"""Chooses `backbone.width` for a number of parameters, `model.param_count`.

model.param_count=200k          200,000 parameters, within 10 %; also 1.5M, 200000
model.param_count=lru           as many as `lra models` prints for that model on this task
model.param_count=lru+-5%       the same, within 5 %
"""

import bisect
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from lra.config.build import build_task
from lra.config.cost import abstract_model, parameters
from lra.config.messages import translated_errors
from lra.config.rules import format_value
from lra.config.schema import check_config
from lra.errors import ConfigError

SMALLEST = 512  # a model that accepts some widths accepts one up to here, and its multiples
COMPOSITE = 2**6 * 3**2 * 5 * 7  # a multiple of every customary number of heads


def parse(value: Any) -> tuple[int | str, float]:
    """Parses `model.param_count`; raises ConfigError if it has another form.

    Returns the number of parameters or the name of the model that has them, and the largest
    relative deviation.
    """
    shown = f"model.param_count={format_value(value)}"
    text = "" if isinstance(value, bool) else str(value)
    if text.startswith("params:"):
        new = text.removeprefix("params:")
        raise ConfigError(f"{shown} has an old form; set model.param_count={new}")
    match = re.fullmatch(r"(?P<target>[\w./-]+?)(\+-(?P<percent>\d+(\.\d+)?)%)?", text)
    if match is None:
        raise ConfigError(
            f"{shown} must be a number of parameters or the name of a model, and a tolerance if "
            "other than 10 %: 200k, lru or 200k+-5%"
        )
    target: int | str = match["target"]
    if number := re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", match["target"]):
        target = round(float(number[1]) * {"": 1, "k": 1e3, "M": 1e6}[number[2]])
    tolerance = float(match["percent"] or 10) / 100
    if target == 0 or not 0 < tolerance < 1:
        raise ConfigError(
            f"{shown}: expected at least 1 parameter, and a tolerance above 0 and below 100 %"
        )
    return target, tolerance


def choose_width(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Sets `backbone.width` of an unresolved config to the width nearest to `model.param_count`.

    Hydra must be initialized. See `finalize` for the arguments.

    Raises:
        ConfigError: an invalid value, no width within the tolerance, or a width on the command
            line as well.
    """
    value = OmegaConf.select(cfg, "model.param_count")
    (target, tolerance), shown = parse(value), f"model.param_count={value}"
    typed = [word for word in overrides if word.lstrip("+").startswith("backbone.width=")]
    if typed:
        raise ConfigError(
            f"{shown} chooses backbone.width; drop {typed[-1]}, or drop model.param_count"
        )
    with translated_errors(overrides):
        default = resolved(cfg)
    task, guess = build_task(default), default.backbone.width
    if isinstance(target, str):
        try:
            target = count(default_model(default, target, choices), task)
        except ConfigError as error:
            raise ConfigError(f"{shown}: {error}") from None

    @cache
    def params(width: int) -> int | None:
        try:
            return count(resolved(cfg, width), task)
        except ConfigError:
            return None

    if params(guess) is None and params(COMPOSITE) is None:
        count(default, task)  # raises the error that does not depend on the width
    near = nearest_widths(params, target, guess)
    if not near:
        raise ConfigError(f"{shown}: the model accepts no backbone.width up to {SMALLEST}")
    best = min(near, key=lambda width: abs(near[width] - target))
    if abs(near[best] - target) > tolerance * target:
        found = " and ".join(f"{width} ({num:,})" for width, num in near.items())
        raise ConfigError(
            f"{shown}: no backbone.width is within {100 * tolerance:g} % of "
            f"{target:,} parameters; the nearest: {found}"
        )
    cfg.backbone.width = best


def nearest_widths(
    params: Callable[[int], int | None], target: int, guess: int = 1
) -> dict[int, int]:
    """The largest width with at most `target` parameters and the next one, with their parameters.

    Args:
        params: parameters at a width, increasing; None if the model refuses the width. Valid
            widths are multiples of one number, for heads and pairs of channels; single multiples
            may be refused.
        target: number of parameters.
        guess: width at which the search starts.
    """
    valid = (w for w in range(1, SMALLEST + 1) if params(w) is not None)
    step = next((w for w in valid if params(2 * w) is not None and params(3 * w) is not None), None)
    if step is None:
        return {}

    def first(k: int) -> int | None:
        """The first valid width from `k` steps on."""
        return next(
            (w for w in range(k * step, (2 * k + 1) * step, step) if params(w) is not None), None
        )

    def beyond(k: int) -> bool:
        width = first(k)
        return width is None or cast(int, params(width)) > target

    low, high = 1, max(guess // step, 1)
    while high * step < 2**16 and not beyond(high):
        low, high = high, 2 * high
    above = low + bisect.bisect_left(range(low, high + 1), True, key=beyond)
    found = [first(k) for k in (above - 1, above) if k]
    return {width: cast(int, params(width)) for width in found if width is not None}


def count(cfg: DictConfig, task) -> int:
    """Number of parameters of a resolved config's model on `task`."""
    return parameters(abstract_model(cfg, task))


def resolved(cfg: DictConfig, width: int | None = None) -> DictConfig:
    """A resolved and checked copy of a config, with another width if one is given."""
    cfg = copy.deepcopy(cfg)
    if width is not None:
        cfg.backbone.width = width
    OmegaConf.resolve(cfg)
    check_config(cfg)
    return cfg


def default_model(cfg: DictConfig, name: str, choices: Mapping[str, Any]) -> DictConfig:
    """The config of model `name` with its defaults, on the task and the protocol of `cfg`."""
    import hydra

    presets = [f"{group}={choices[group]}" for group in ("size", "debug") if choices.get(group)]
    words = [f"task={choices['task']}", f"model='{name}'", *presets]
    with translated_errors(words):
        other = hydra.compose("train", overrides=words)
    with open_dict(other):
        other.task, other.protocol = cfg.task, cfg.protocol  # with their overrides
    return resolved(other)
