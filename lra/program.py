"""From a config to what runs on the device: the state, and two jitted functions of it.

`run` takes many steps in one call and draws its batches by index. The order of batches and every random number are functions of
(seed, step) alone, so where a call ends changes nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from lra.config import build_task, model_builder
from lra.errors import ConfigError
from lra.optim import adamw


class State(NamedTuple):
    """What changes from step to step; everything a resumed run needs."""

    step: jax.Array  # () int32, steps done
    params: Any  # nnx.Param
    stats: Any  # nnx.BatchStat
    opt: Any
    tally: jax.Array  # (3,) float32: sums of loss, correct, count since the last logged line
    finite: jax.Array  # () bool: no NaN or Inf so far


class Best(NamedTuple):
    """The weights that a protocol may choose, saved with each state, so that a resumed run chooses as if never stopped."""

    params: Any
    stats: Any
    step: int = 0
    accuracy: float = -1.0  # on validation


class Split(NamedTuple):
    """A split on the device."""

    inputs: jax.Array
    lengths: jax.Array
    labels: jax.Array  # (n,), or (n, T) where a task asks for several


class Program(NamedTuple):
    """The jitted functions of one (model, task, optimizer)."""

    run: Callable[..., State]  # (state, fixed, train, until) -> state
    apply: Callable[..., jax.Array]  # (params, stats, fixed, inputs, lengths) -> logits


class Setup:
    """What a config builds before any data is read: task, model, optimizer. Refuses what does not fit together."""

    def __init__(self, cfg: DictConfig):
        self.task = build_task(cfg)
        count = (self.task.split_sizes() or {}).get("train")
        if count is not None:
            check_batch_size(cfg, count)
        model_key, self.order_key, self.dropout_key = jax.random.split(jax.random.key(cfg.seed), 3)
        self.graph, self.params, self.stats, self.fixed = build(model_builder(cfg, self.task), model_key)
        self.tx, self.groups = adamw(
            cast(dict[str, Any], OmegaConf.to_container(cfg.optim)), cfg.trainer.steps, self.params
        )


def first_state(setup: Setup) -> tuple[State, Best]:
    """The state before the first step; also the form of every state that is saved."""
    opt = setup.tx.init(setup.params)
    state = State(jnp.int32(0), setup.params, setup.stats, opt, jnp.zeros(3), jnp.bool_(True))
    return state, Best(copy(setup.params), copy(setup.stats))  # not the state's arrays, whose memory is given away


def chosen_weights(rule: str, state: State, best: Best) -> tuple[Any, Any]:
    """(params, stats) that are scored: those best on validation, or the last; a checkpoint holds both."""
    return best[:2] if rule == "best" else (state.params, state.stats)


def check_batch_size(cfg: DictConfig, count: int) -> None:
    if count < cfg.trainer.batch_size:
        raise ConfigError(f"trainer.batch_size={cfg.trainer.batch_size} exceeds the {count} training examples")


def build(builder: Callable[..., nnx.Module], key: jax.Array) -> tuple:
    """Make the model; returns (graph, params, batch statistics, everything else that is fixed)."""
    try:
        model = builder(rngs=nnx.Rngs(params=key))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    graph, *variables = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    # a weak type (of `jnp.full(shape, 0.5)`, say) would be lost in the first step, and the second would compile again
    return graph, *jax.tree.map(lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, variables)


def compile_program(setup: Setup, batch_size: int) -> Program:
    """The two jitted functions of a run; `run` gives its state's memory to its result."""
    graph, tx, decode = setup.graph, setup.tx, setup.task.decode

    def loss(params, stats, fixed, batch: Split, key):
        model = nnx.merge(graph, params, stats, fixed, copy=True)  # batch norm writes to its own variables
        logits = model(decode(batch.inputs), batch.lengths, train=True, rngs=nnx.Rngs(dropout=key))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = (logits.argmax(axis=-1) == batch.labels).sum()
        tally = jnp.stack([losses.sum(), correct.astype(jnp.float32), jnp.float32(losses.size)])
        return losses.mean(), (nnx.state(model, nnx.BatchStat), tally)

    def step(state: State, fixed, batch: Split) -> State:
        key = jax.random.fold_in(setup.dropout_key, state.step)
        grads, (stats, tally) = jax.grad(loss, has_aux=True)(state.params, state.stats, fixed, batch, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(tally[0]) & jnp.isfinite(optax.tree.norm(grads))
        return State(state.step + 1, params, stats, opt, state.tally + tally, finite)

    @partial(jax.jit, donate_argnums=0)
    def run(state: State, fixed, data: Split, until: jax.Array) -> State:
        """Steps until `until` or the first loss that is not finite."""
        count = len(data.labels)
        steps_per_epoch = count // batch_size  # the tail of each epoch's order is left out, another one each epoch

        def body(carry):
            state, order = carry
            epoch, position = jnp.divmod(state.step, steps_per_epoch)
            order = jax.lax.cond(position == 0, lambda: epoch_order(setup.order_key, epoch, count), lambda: order)
            rows = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
            return step(state, fixed, jax.tree.map(lambda x: x[rows], data)), order

        carry = (state, epoch_order(setup.order_key, state.step // steps_per_epoch, count))
        return jax.lax.while_loop(lambda c: (c[0].step < until) & c[0].finite, body, carry)[0]

    @jax.jit
    def apply(params, stats, fixed, inputs, lengths):
        return nnx.merge(graph, params, stats, fixed)(decode(inputs), lengths, train=False)

    return Program(run, apply)


def epoch_order(key: jax.Array, epoch: int | jax.Array, count: int) -> jax.Array:
    """The order (n,) in which an epoch draws the examples: a function of (key, epoch) alone."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)


def copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def on_device(split) -> Split:
    """A packed split on the device; a CPU reads the mapped file itself, without a copy."""
    inputs = jax.device_put(split.inputs.view(np.ndarray), may_alias=True)
    return Split(inputs, jnp.asarray(split.lengths), jnp.asarray(split.labels.astype(np.int32)))
