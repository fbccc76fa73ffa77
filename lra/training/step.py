"""From a config to what runs on the device: the state, and two jitted functions of it.

`run` takes many steps in one call and draws its batches by index. The order of batches and every random number are functions of
(seed, step) alone, so where a call ends changes nothing.
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


class Program(NamedTuple):
    """The jitted functions of one (model, task, optimizer)."""

    run: Callable[..., State]  # (state, fixed, train, until) -> state
    run_window: Callable[..., State]  # (state, fixed, window, until) -> state
    apply: Callable[..., jax.Array]  # (params, stats, fixed, inputs, lengths) -> logits


def compile_program(
    setup: Setup,
    batch_size: int,
    micro_batch: int | None = None,
    layout: DataParallel | None = None,
) -> Program:
    """The jitted functions of a run; those that train give their state's memory to their result.

    Args:
        batch_size: examples a step, over all devices.
        micro_batch: examples whose activations are held at once, a divisor of `batch_size`; None for all.
        layout: the devices that share the batch; None for one.
    """
    graph, tx, decode = setup.graph, setup.tx, setup.task.decode
    layout = layout or DataParallel()
    size = micro_batch or batch_size
    parts = batch_size // size

    def loss(params, stats, fixed, batch: Examples, key):
        model = nnx.merge(
            graph, params, stats, fixed, copy=True
        )  # batch norm writes to its own variables
        logits = model(decode(batch.inputs), batch.lengths, train=True, rngs=nnx.Rngs(dropout=key))
        losses = cross_entropy(logits, batch.labels, setup.label_smoothing)
        correct = (logits.argmax(axis=-1) == batch.labels).sum()
        tally = jnp.stack([losses.sum(), correct.astype(jnp.float32), jnp.float32(losses.size)])
        return losses.mean(), (nnx.state(model, nnx.BatchStat), tally)

    @contextmanager
    def tracing() -> Iterator[None]:
        with layout.mesh_context(), matmul_precision(setup.precision):
            yield

    def gradients(state: State, fixed, draw: Callable[[jax.Array | int], Examples], key) -> tuple:
        """Mean gradient over the batch, batch statistics and tally; `draw(part)` is a micro-batch."""

        def gradient(params, stats, fixed, batch: Examples, key):
            return jax.grad(loss, has_aux=True)(
                params, stats, fixed, layout.shard_batch(batch), key
            )

        if parts == 1:
            grads, (stats, tally) = gradient(state.params, state.batch_stats, fixed, draw(0), key)
            return grads, stats, tally

        def add(carry, part):
            grads, stats, tally = carry
            more, (stats, seen) = gradient(
                state.params, stats, fixed, draw(part), jax.random.fold_in(key, part)
            )
            return (jax.tree.map(jnp.add, grads, more), stats, tally + seen), None

        start = (
            jax.tree.map(jnp.zeros_like, state.params),
            state.batch_stats,
            jnp.zeros_like(state.metric_sums),
        )
        (grads, stats, tally), _ = jax.lax.scan(add, start, jnp.arange(parts))
        return (
            jax.tree.map(lambda grad: grad / parts, grads),
            stats,
            tally,
        )  # of equal parts the mean of means

    def step(state: State, fixed, draw: Callable[[jax.Array | int], Examples]) -> State:
        key = jax.random.fold_in(setup.dropout_key, state.step)
        with tracing():
            grads, stats, tally = gradients(state, fixed, draw, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(tally[0]) & jnp.isfinite(optax.tree.norm(grads))
        average = setup.ema and ema_update(
            setup.ema, state.ema_params, (params, stats), state.step + 1
        )
        return State(state.step + 1, params, stats, opt, state.metric_sums + tally, finite, average)

    def goes_on(state: State, until: jax.Array) -> jax.Array:
        return (state.step < until) & state.finite

    @partial(jax.jit, donate_argnums=0)
    def run(state: State, fixed, data: Examples, until: jax.Array) -> State:
        """Steps until `until` or the first loss that is not finite."""
        count = len(data.labels)
        steps_per_epoch = (
            count // batch_size
        )  # the tail of each epoch's order is left out, another one each epoch

        def body(carry):
            state, order = carry
            epoch, position = jnp.divmod(state.step, steps_per_epoch)
            order = jax.lax.cond(
                position == 0, lambda: epoch_order(setup.order_key, epoch, count), lambda: order
            )

            def draw(part) -> Examples:
                rows = jax.lax.dynamic_slice(order, (position * batch_size + part * size,), (size,))
                return jax.tree.map(lambda x: x[rows], data)

            return step(state, fixed, draw), order

        carry = (state, epoch_order(setup.order_key, state.step // steps_per_epoch, count))
        return jax.lax.while_loop(lambda c: goes_on(c[0], until), body, carry)[0]

    @partial(jax.jit, donate_argnums=0)
    def run_window(state: State, fixed, window: BatchWindow, until: jax.Array) -> State:
        """As `run`, to the end of the window at most."""

        def body(state: State) -> State:
            batch = jax.tree.map(lambda x: x[state.step - window.first], window.batches)
            return step(state, fixed, lambda part: jax.tree.map(lambda x: x[part], batch))

        return jax.lax.while_loop(lambda state: goes_on(state, until), body, state)

    @jax.jit
    def apply(params, stats, fixed, inputs, lengths):
        inputs, lengths = layout.shard_batch((inputs, lengths))
        with tracing():
            logits = nnx.merge(graph, params, stats, fixed)(decode(inputs), lengths, train=False)
        return layout.replicate_under_jit(logits)

    return Program(run, run_window, apply)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Loss of each label, in nats, of which the share `smoothing` is spread over all classes (Szegedy et al. 2016)."""
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def matmul_precision(precision: str) -> AbstractContextManager:
    """How float32 matrices are multiplied by what is traced inside: in full, or on GPUs with 10 bits of mantissa."""
    if jax.default_backend() == "cpu":  # which knows float32 alone
        return nullcontext()
    return jax.default_matmul_precision("float32" if precision == "float32" else "tensorfloat32")


def epoch_order(key: jax.Array, epoch: int | jax.Array, count: int) -> jax.Array:
    """The order (n,) in which an epoch draws the examples: a function of (key, epoch) alone."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)
