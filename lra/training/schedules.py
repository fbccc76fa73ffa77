"""Learning-rate schedules: functions of the step and, for `plateau`, of validation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import ReduceLROnPlateauState, reduce_on_plateau


def schedule(cfg: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    A linear warm-up from `lr_start` to `lr` over W = round(warmup * steps) steps is followed by:

        cosine      half a cosine to `lr_end` at the last step
        linear      to `lr_end` at the last step
        rsqrt       lr sqrt(max(W, 1) / step); the original LRA code's base / sqrt(step) with
                    lr = base / sqrt(W)
        constant    lr
        plateau     lr, multiplied by the factor of `plateau_update` in the optimizer

    Args:
        cfg: the section `optim`.
        steps: number of steps of the run.
    """
    lr, warmup_steps = cfg["lr"], round(cfg["warmup"] * steps)
    decay_steps, reference = max(steps - warmup_steps, 1), max(warmup_steps, 1)

    def rsqrt(step: Any) -> jax.Array:
        return lr * jnp.sqrt(reference / jnp.maximum(step + warmup_steps, reference))

    after_warmup = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, decay_steps, alpha=cfg["lr_end"] / lr),
        "linear": lambda: optax.linear_schedule(lr, cfg["lr_end"], decay_steps),
        "rsqrt": lambda: rsqrt,
        "constant": lambda: optax.constant_schedule(lr),
        "plateau": lambda: optax.constant_schedule(lr),
    }[cfg["schedule"]]()
    warmup = optax.linear_schedule(cfg["lr_start"], lr, reference)
    return optax.join_schedules([warmup, after_warmup], boundaries=[warmup_steps])


def scale_by_plateau() -> optax.GradientTransformation:
    """Multiplies updates by the factor in its state, which only `plateau_update` changes."""

    def init(params: Any) -> ReduceLROnPlateauState:
        # optax only reads the dtype of the parameters, which may be complex
        return reduce_on_plateau().init(jnp.float32(0))

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
    """Returns the optimizer state after an evaluation, with PyTorch's ReduceLROnPlateau rule.

    The factor in the state is multiplied by `factor` after more than `patience` evaluations in a
    row without a relative improvement of `metric` by more than `threshold`. The learning rate does
    not fall below `lr_end`.

    Args:
        cfg: the section `optim`; the rule is its `plateau`.
        opt: optimizer state; unchanged unless it contains `scale_by_plateau`.
        scores: validation accuracy (fraction) and loss.
        put: places the new state on the devices of `opt`.
    """
    rule, min_scale = cfg["plateau"], cfg["lr_end"] / cfg["lr"]
    # optax minimizes an absolute value: -log turns a relative gain of accuracy into a difference
    use_loss, tiny = rule["metric"] == "loss", float(np.finfo(np.float32).tiny)
    value = np.float32(scores["loss"] if use_loss else -np.log(max(scores["accuracy"], tiny)))
    if rule["threshold"] == 0:  # optax requires a positive threshold
        threshold = {"rtol": 0.0, "atol": tiny}
    elif use_loss:
        threshold = {"rtol": rule["threshold"]}
    else:
        threshold = {"rtol": 0.0, "atol": float(np.log1p(rule["threshold"]))}
    reduce = reduce_on_plateau(
        rule["factor"], rule["patience"] + 1, min_scale=min_scale, **threshold
    )

    def update(state: ReduceLROnPlateauState) -> ReduceLROnPlateauState:
        state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)  # to a single device
        return put(reduce.update((), state, value=value)[1])

    return jax.tree.map(lambda x: update(x) if _is_plateau(x) else x, opt, is_leaf=_is_plateau)


def plateau_scale(opt: Any) -> float:
    """Returns the factor on the schedule's learning rate, 1.0 for schedules other than plateau."""
    found = [x for x in jax.tree.leaves(opt, is_leaf=_is_plateau) if _is_plateau(x)]
    return float(found[0].scale) if found else 1.0


def _is_plateau(x: Any) -> bool:
    return isinstance(x, ReduceLROnPlateauState)
