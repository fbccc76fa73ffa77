"""The training state, and the weights that are evaluated and selected."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lra.training.setup import Setup


class State(NamedTuple):
    """Everything that changes from step to step; a checkpoint holds all of it."""

    step: jax.Array  # () int32, steps done
    params: Any  # nnx.Param
    batch_stats: Any  # nnx.BatchStat
    opt: Any
    metric_sums: jax.Array  # (3,) float32: loss, correct labels, labels since the last log line
    finite: jax.Array  # () bool: loss and gradient of the last step are finite
    ema_params: Any = None  # moving averages of (params, batch_stats) if optim.ema is set


class Best(NamedTuple):
    """The weights with the best validation accuracy so far; saved beside each state."""

    params: Any
    batch_stats: Any
    step: int = 0
    accuracy: float = -1.0  # on validation


class Examples(NamedTuple):
    """A split as arrays on the devices or as NumPy arrays on the host."""

    inputs: Any
    lengths: Any
    labels: Any  # (n,), or (n, T) for tasks with T labels per example


class BatchWindow(NamedTuple):
    """The batches of consecutive steps, for data that stay on the host."""

    first: jax.Array  # () int32, step of the first batch
    batches: Examples  # each (steps, micro-batches, examples, ...)


def initial_state(setup: Setup) -> tuple[State, Best]:
    """The state before the first step; also the structure of every checkpoint."""
    state = State(
        step=jnp.int32(0),
        params=setup.params,
        batch_stats=setup.batch_stats,
        opt=setup.tx.init(setup.params),
        metric_sums=jnp.zeros(3),
        finite=jnp.bool_(True),
        ema_params=copy_tree((setup.params, setup.batch_stats)) if setup.ema else None,
    )
    # copies, because a training step donates the arrays of the state
    return state, Best(copy_tree(setup.params), copy_tree(setup.batch_stats))


def eval_weights(state: State) -> tuple[Any, Any]:
    """(params, batch_stats) to evaluate: the moving averages if the run keeps them."""
    return state.ema_params or (state.params, state.batch_stats)


def selected_weights(rule: str, state: State, best: Best) -> tuple[Any, Any]:
    """(params, batch_stats) that the protocol scores: `rule` best on validation, or last."""
    return best[:2] if rule == "best" else eval_weights(state)


def copy_tree(tree: Any) -> Any:
    """Copies every array of a tree."""
    return jax.tree.map(jnp.copy, tree)
