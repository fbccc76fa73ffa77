"""`model.param_count`: which width gives a model as many parameters as it may have?

    model.param_count=params:200k          200,000 parameters, within 10 %; also 1.5M, 200000
    model.param_count=params:lru           as many as `lra models` shows for that model on this task
    model.param_count=params:lru+-5%       within 5 % of them

The width found stands in `backbone.width` of the resolved config, as if it had been typed.
"""

import bisect
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from lra.errors import ConfigError

GRAMMAR = re.compile(r"params:(?P<target>[\w./-]+?)(\+-(?P<percent>\d+(\.\d+)?)%)?")
NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kM]?)")
TOLERANCE = 0.1
SMALLEST = 512  # a model that accepts some widths accepts one up to here, and its multiples
WIDEST = 2**16
COMPOSITE = 2**6 * 3**2 * 5 * 7  # a width for every customary number of heads


class Budget(NamedTuple):
    """Parameters that a model may have: a count, or the name of the model that has them; and how far off is near."""

    target: int | str
    tolerance: float


def parse(text: Any) -> Budget:
    """Raises: ConfigError, if `text` is no budget."""
    match = GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(
            f"model.param_count={text} must be a number of parameters or a model's name, with a tolerance if other than 10 %: "
            "params:200k, params:lru or params:200k+-5%"
        )
    number = NUMBER.fullmatch(match["target"])
    target: int | str = match["target"]
    if number:
        target = round(float(number[1]) * {"": 1, "k": 1e3, "M": 1e6}[number[2]])
    tolerance = float(match["percent"]) / 100 if match["percent"] else TOLERANCE
    if target == 0 or not 0 < tolerance < 1:
        raise ConfigError(
            f"model.param_count={text}: expected at least 1 parameter, and a tolerance above 0 and below 100 %"
        )
    return Budget(target, tolerance)


def choose_width(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Set `backbone.width` of `cfg`, which is not resolved yet, to the width that meets its `model.param_count`.

    Args:
        choices: the chosen options of each group. overrides: what the user typed.

    Raises:
        ConfigError: no budget, no width near it, or a width that the user typed too.
    """
    from lra.config.build import build_task

    text = OmegaConf.select(cfg, "model.param_count")
    budget = parse(text)
    typed = [word for word in overrides if word.lstrip("+").startswith("backbone.width=")]
    if typed:
        raise ConfigError(
            f"model.param_count={text} chooses backbone.width; drop {typed[-1]}, or drop model.param_count"
        )
    task = build_task(resolved(cfg))
    target = budget.target
    if isinstance(target, str):
        target = count(reference(cfg, target, choices, text), task)

    @cache
    def params(width: int) -> int | None:
        """Parameters at a width; None where the model does not take it."""
        try:
            return count(resolved(cfg, width), task)
        except ConfigError:
            return None

    guess = resolved(cfg).backbone.width
    if params(guess) is None and params(COMPOSITE) is None:
        count(resolved(cfg), task)  # not the width is wrong; this says what is
    near = nearest_widths(params, target, guess)
    if not near:
        raise ConfigError(
            f"model.param_count={text}: the model takes no backbone.width up to {SMALLEST}"
        )
    best = min(near, key=lambda width: abs(near[width] - target))
    if abs(near[best] - target) > budget.tolerance * target:
        found = " and ".join(f"{width} ({num:,})" for width, num in near.items())
        raise ConfigError(
            f"model.param_count={text}: no backbone.width is within {100 * budget.tolerance:g} % of {target:,} parameters; "
            f"the nearest: {found}"
        )
    cfg.backbone.width = best


def nearest_widths(
    params: Callable[[int], int | None], target: int, guess: int = 1
) -> dict[int, int]:
    """The last width with at most `target` parameters and the first with more, each with its parameters, where they exist.

    `params` grows with the width and is None for one that the model refuses. Those that it takes are multiples of one number,
    as heads and pairs of channels ask for; single multiples may be refused. The search starts at `guess`.
    """
    taken = (w for w in range(1, SMALLEST + 1) if params(w) is not None)
    step = next((w for w in taken if params(2 * w) is not None and params(3 * w) is not None), None)
    if step is None:
        return {}

    def first(k: int) -> int | None:
        """The first width from `k` steps on that the model takes."""
        return next(
            (w for w in range(k * step, (2 * k + 1) * step, step) if params(w) is not None), None
        )

    def beyond(k: int) -> bool:
        width = first(k)
        return width is None or cast(int, params(width)) > target

    low, high = 1, max(guess // step, 1)
    while high * step < WIDEST and not beyond(high):
        low, high = high, 2 * high
    above = low + bisect.bisect_left(range(low, high + 1), True, key=beyond)
    found = [first(k) for k in (above - 1, above) if k]
    return {width: cast(int, params(width)) for width in found if width is not None}


def count(cfg: DictConfig, task) -> int:
    from lra.config.cost import abstract_model, parameters

    return parameters(abstract_model(cfg, task))


def resolved(cfg: DictConfig, width: int | None = None) -> DictConfig:
    """A resolved copy of `cfg`, of another width."""
    from lra.config.schema import check_ranges

    cfg = copy.deepcopy(cfg)
    if width is not None:
        cfg.backbone.width = width
    OmegaConf.resolve(cfg)
    check_ranges(cfg)
    return cfg


def reference(cfg: DictConfig, name: str, choices: Mapping[str, Any], text: str) -> DictConfig:
    """The config of the model `name` as it is by default, on the task of `cfg`."""
    import hydra

    from lra.config.messages import translated_errors

    debug = [f"debug={choices['debug']}"] if choices.get("debug") else []
    words = [f"task={choices['task']}", f"model='{name}'", *debug]
    try:
        with translated_errors(words):
            other = hydra.compose("train", overrides=words)
    except ConfigError as error:
        raise ConfigError(f"model.param_count={text}: {error}") from None
    with open_dict(other):
        other.task, other.protocol = (
            cfg.task,
            cfg.protocol,
        )  # with what was typed and what an experiment says
    return resolved(other)
