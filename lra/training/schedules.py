"""How does the learning rate change over a run? As a function of the step alone or, `plateau`, of validation too."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import ReduceLROnPlateauState, reduce_on_plateau


def schedule(cfg: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Learning rate of each of `steps`, counted from 0, by the keys of `conf/optim/`.

    Linear warm-up from `lr_start` to `lr` over the share `warmup` of `steps`, W of them, then by `schedule`:

        cosine      to `lr_end` at the last step
        linear      to `lr_end` at the last step
        rsqrt       lr sqrt(W / step), W at least 1: the original code's base / sqrt(step), with lr = base / sqrt(W)
        constant    lr
        plateau     lr, times the factor that `plateau_update` keeps
    """
    lr, warmup_steps = cfg["lr"], round(cfg["warmup"] * steps)
    rest, reference = max(steps - warmup_steps, 1), max(warmup_steps, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=cfg["lr_end"] / lr),
        "linear": lambda: optax.linear_schedule(lr, cfg["lr_end"], rest),
        "rsqrt": lambda: (
            lambda step: lr * jnp.sqrt(reference / jnp.maximum(step + warmup_steps, reference))
        ),
        "constant": lambda: optax.constant_schedule(lr),
        "plateau": lambda: optax.constant_schedule(lr),
    }[cfg["schedule"]]
    warmup = optax.linear_schedule(cfg["lr_start"], lr, reference)
    return optax.join_schedules([warmup, after()], boundaries=[warmup_steps])


def scale_by_plateau() -> optax.GradientTransformation:
    """Multiplies updates by the factor in its state, which `plateau_update` alone changes."""

    def init(params: Any) -> ReduceLROnPlateauState:
        return reduce_on_plateau().init(
            jnp.float32(0)
        )  # which asks only for a dtype; parameters may be complex

    def update(
        updates: Any, state: ReduceLROnPlateauState, params: Any = None
    ) -> tuple[Any, ReduceLROnPlateauState]:
        return optax.tree.scale(state.scale, updates), state

    return optax.GradientTransformation(init, update)


def plateau_update(
    cfg: Mapping[str, Any],
    opt: Any,
    scores: Mapping[str, Any],
    put: Callable[[Any], Any] = lambda x: x,
) -> Any:
    """The optimizer's state after an evaluation: as PyTorch's ReduceLROnPlateau, its factor falls where nothing improves.

    Args:
        cfg: of `optim.plateau`: `factor` is multiplied in after more than `patience` evaluations in a row without a relative
            improvement of `metric` by more than `threshold`; `lr_end` is the least learning rate.
        scores: accuracy (fraction) and loss on validation.
        put: the new state to where `opt` is.
    """
    rule, least = cfg["plateau"], cfg["lr_end"] / cfg["lr"]
    # optax looks for a minimum; -log turns a relative gain of accuracy into a difference. It wants a threshold above 0
    loss, tiny = rule["metric"] == "loss", float(np.finfo(np.float32).tiny)
    value = np.float32(scores["loss"] if loss else -np.log(max(scores["accuracy"], tiny)))
    margin = (
        {"rtol": rule["threshold"]}
        if loss
        else {"rtol": 0.0, "atol": float(np.log1p(rule["threshold"]))}
    )
    if rule["threshold"] == 0:
        margin = {"rtol": 0.0, "atol": tiny}
    reduce = reduce_on_plateau(rule["factor"], rule["patience"] + 1, min_scale=least, **margin)

    def seen(state: ReduceLROnPlateauState) -> ReduceLROnPlateauState:
        state = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x)), state
        )  # from several devices to one
        return put(reduce.update((), state, value=value)[1])

    return jax.tree.map(lambda x: seen(x) if _is_plateau(x) else x, opt, is_leaf=_is_plateau)


def plateau_scale(opt: Any) -> float:
    """The factor on the schedule's learning rate, 1 for every other schedule than plateau."""
    found = [x for x in jax.tree.leaves(opt, is_leaf=_is_plateau) if _is_plateau(x)]
    return float(found[0].scale) if found else 1.0


def _is_plateau(x: Any) -> bool:
    return isinstance(x, ReduceLROnPlateauState)
