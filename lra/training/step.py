"""Jitted functions of a run: many training steps in one call, and the logits of a batch.

The order of the examples and every random number are functions of (seed, step), so the number of
steps per call does not change a result.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lra.training.data_parallel import DataParallel
from lra.training.optimizer import ema_update
from lra.training.setup import Setup
from lra.training.state import BatchWindow, Examples, State

GetMicroBatch = Callable[[jax.Array | int], Examples]  # index of the micro-batch -> its examples


class StepFunctions(NamedTuple):
    """Jitted functions; `constants` are the model's variables that never change.

    Attributes:
        train_steps: (state, constants, train, until) -> state, from a split on the devices.
        train_window: (state, constants, window, until) -> state, with the batches of a few steps.
        predict: (params, batch_stats, constants, inputs, lengths) -> logits.
    """

    train_steps: Callable[..., State]
    train_window: Callable[..., State]
    predict: Callable[..., jax.Array]


def make_step_functions(
    setup: Setup,
    batch_size: int,
    micro_batch: int | None = None,
    devices: DataParallel | None = None,
) -> StepFunctions:
    """The jitted functions of a run. The training functions donate the state they take.

    Args:
        batch_size: examples per step, over all devices.
        micro_batch: examples whose activations are held at once, a divisor of `batch_size`; None
            for all.
        devices: the devices that share a batch; None for one.
    """
    graph, tx, decode = setup.graph, setup.tx, setup.task.decode
    devices = devices or DataParallel()
    size = micro_batch or batch_size
    num_micro_batches = batch_size // size

    def loss(params, batch_stats, constants, batch: Examples, key):
        # a copy, because batch norm writes to the variables of its model
        model = nnx.merge(graph, params, batch_stats, constants, copy=True)
        logits = model(decode(batch.inputs), batch.lengths, train=True, rngs=nnx.Rngs(dropout=key))
        losses = cross_entropy(logits, batch.labels, setup.label_smoothing)
        correct = (logits.argmax(axis=-1) == batch.labels).sum()
        sums = jnp.stack([losses.sum(), correct.astype(jnp.float32), jnp.float32(losses.size)])
        return losses.mean(), (nnx.state(model, nnx.BatchStat), sums)

    @contextmanager
    def tracing_context() -> Iterator[None]:
        with devices.mesh_context(), matmul_precision(setup.precision):
            yield

    def gradient(params, batch_stats, constants, batch: Examples, key):
        batch = devices.shard_batch(batch)
        return jax.grad(loss, has_aux=True)(params, batch_stats, constants, batch, key)

    def mean_gradient(state: State, constants, get_micro_batch: GetMicroBatch, key) -> tuple:
        """Gradient averaged over the batch, new batch statistics, and metric sums."""
        if num_micro_batches == 1:
            batch = get_micro_batch(0)
            grads, (batch_stats, sums) = gradient(
                state.params, state.batch_stats, constants, batch, key
            )
            return grads, batch_stats, sums

        def accumulate(carry, index):
            grads, batch_stats, sums = carry
            batch, own_key = get_micro_batch(index), jax.random.fold_in(key, index)
            more, (batch_stats, new_sums) = gradient(
                state.params, batch_stats, constants, batch, own_key
            )
            return (jax.tree.map(jnp.add, grads, more), batch_stats, sums + new_sums), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        start = (zeros, state.batch_stats, jnp.zeros_like(state.metric_sums))
        indices = jnp.arange(num_micro_batches)
        (grads, batch_stats, sums), _ = jax.lax.scan(accumulate, start, indices)
        # micro-batches have equal sizes, so the mean of their means is the mean of the batch
        return jax.tree.map(lambda grad: grad / num_micro_batches, grads), batch_stats, sums

    def step(state: State, constants, get_micro_batch: GetMicroBatch) -> State:
        key = jax.random.fold_in(setup.dropout_key, state.step)
        with tracing_context():
            grads, batch_stats, sums = mean_gradient(state, constants, get_micro_batch, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt=opt,
            metric_sums=state.metric_sums + sums,
            finite=jnp.isfinite(sums[0]) & jnp.isfinite(optax.tree.norm(grads)),
            ema_params=setup.ema
            and ema_update(setup.ema, state.ema_params, (params, batch_stats), state.step + 1),
        )

    def keep_going(state: State, until: jax.Array) -> jax.Array:
        return (state.step < until) & state.finite

    @partial(jax.jit, donate_argnums=0)
    def train_steps(state: State, constants, train: Examples, until: jax.Array) -> State:
        """Trains to step `until`, or to the first loss that is not finite."""
        count = len(train.labels)
        # drops the last count % batch_size examples of each epoch's order
        steps_per_epoch = count // batch_size

        def body(carry):
            state, order = carry
            epoch, position = jnp.divmod(state.step, steps_per_epoch)
            order = jax.lax.cond(
                position == 0, lambda: epoch_order(setup.order_key, epoch, count), lambda: order
            )

            def get_micro_batch(index) -> Examples:
                first = position * batch_size + index * size
                rows = jax.lax.dynamic_slice(order, (first,), (size,))
                return jax.tree.map(lambda x: x[rows], train)

            return step(state, constants, get_micro_batch), order

        carry = (state, epoch_order(setup.order_key, state.step // steps_per_epoch, count))
        return jax.lax.while_loop(lambda c: keep_going(c[0], until), body, carry)[0]

    @partial(jax.jit, donate_argnums=0)
    def train_window(state: State, constants, window: BatchWindow, until: jax.Array) -> State:
        """Trains to step `until`, which the window has to contain."""

        def body(state: State) -> State:
            batch = jax.tree.map(lambda x: x[state.step - window.first], window.batches)
            return step(state, constants, lambda index: jax.tree.map(lambda x: x[index], batch))

        return jax.lax.while_loop(lambda state: keep_going(state, until), body, state)

    @jax.jit
    def predict(params, batch_stats, constants, inputs, lengths):
        inputs, lengths = devices.shard_batch((inputs, lengths))
        with tracing_context():
            model = nnx.merge(graph, params, batch_stats, constants)
            logits = model(decode(inputs), lengths, train=False)
        return devices.replicate_under_jit(logits)

    return StepFunctions(train_steps, train_window, predict)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy of each label, in nats.

    Args:
        smoothing: share of each label that is spread over all classes (Szegedy et al. 2016).
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def matmul_precision(precision: str) -> AbstractContextManager:
    """Context in which float32 matrix products use full precision, or TF32 on GPUs."""
    if jax.default_backend() == "cpu":  # CPUs multiply in float32 only
        return nullcontext()
    return jax.default_matmul_precision("float32" if precision == "float32" else "tensorfloat32")


def epoch_order(key: jax.Array, epoch: int | jax.Array, count: int) -> jax.Array:
    """The order (n,) of the examples in an epoch, a function of (key, epoch)."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)
