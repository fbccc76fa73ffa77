"""The training state and the weights that a protocol may select."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lra.training.setup import Setup


class State(NamedTuple):
    """What changes from step to step; everything a resumed run needs."""

    step: jax.Array  # () int32, steps done
    params: Any  # nnx.Param
    batch_stats: Any  # nnx.BatchStat
    opt: Any
    metric_sums: jax.Array  # (3,) float32: sums of loss, correct, count since the last logged line
    finite: jax.Array  # () bool: no NaN or Inf so far
    ema_params: Any = None  # moving averages of (params, stats), where optim.ema asks for them


class Best(NamedTuple):
    """The weights that a protocol may choose, saved with each state, so that a resumed run chooses as if never stopped."""

    params: Any
    batch_stats: Any
    step: int = 0
    accuracy: float = -1.0  # on validation


class Examples(NamedTuple):
    """A split on the device, or as NumPy arrays on the host."""

    inputs: Any
    lengths: Any
    labels: Any  # (n,), or (n, T) where a task asks for several


class BatchWindow(NamedTuple):
    """The batches of steps `first`, `first` + 1, ..., for data that stay on the host."""

    first: jax.Array  # () int32
    batches: Examples  # each (steps, parts, micro-batch, ...)


def initial_state(setup: Setup) -> tuple[State, Best]:
    """The state before the first step; also the form of every state that is saved."""
    opt = setup.tx.init(setup.params)
    average = copy_tree((setup.params, setup.batch_stats)) if setup.ema else None
    state = State(
        jnp.int32(0), setup.params, setup.batch_stats, opt, jnp.zeros(3), jnp.bool_(True), average
    )
    return state, Best(
        copy_tree(setup.params), copy_tree(setup.batch_stats)
    )  # not the state's arrays, whose memory is given away


def eval_weights(state: State) -> tuple[Any, Any]:
    """(params, stats) that are evaluated: their moving averages where the run keeps them, else the newest."""
    return state.ema_params or (state.params, state.batch_stats)


def selected_weights(rule: str, state: State, best: Best) -> tuple[Any, Any]:
    """(params, stats) that are scored: those best on validation, or the last; a checkpoint holds both."""
    return best[:2] if rule == "best" else eval_weights(state)


def copy_tree(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
