"""From a config to what runs on the device: the state, and two jitted functions of it.

`run` takes many steps in one call and draws its batches by index. The order of batches and every random number are functions of
(seed, step) alone, so where a call ends changes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from lra.config import build_task, model_builder
from lra.devices import Layout
from lra.errors import ConfigError
from lra.optim import adamw, averaged


class State(NamedTuple):
    """What changes from step to step; everything a resumed run needs."""

    step: jax.Array  # () int32, steps done
    params: Any  # nnx.Param
    stats: Any  # nnx.BatchStat
    opt: Any
    tally: jax.Array  # (3,) float32: sums of loss, correct, count since the last logged line
    finite: jax.Array  # () bool: no NaN or Inf so far
    average: Any = None  # moving averages of (params, stats), where optim.ema asks for them


class Best(NamedTuple):
    """The weights that a protocol may choose, saved with each state, so that a resumed run chooses as if never stopped."""

    params: Any
    stats: Any
    step: int = 0
    accuracy: float = -1.0  # on validation


class Split(NamedTuple):
    """A split on the device, or as NumPy arrays on the host."""

    inputs: Any
    lengths: Any
    labels: Any  # (n,), or (n, T) where a task asks for several


class Window(NamedTuple):
    """The batches of steps `first`, `first` + 1, ..., for data that stay on the host."""

    first: jax.Array  # () int32
    batches: Split  # each (steps, parts, micro-batch, ...)


class Program(NamedTuple):
    """The jitted functions of one (model, task, optimizer)."""

    run: Callable[..., State]  # (state, fixed, train, until) -> state
    run_window: Callable[..., State]  # (state, fixed, window, until) -> state
    apply: Callable[..., jax.Array]  # (params, stats, fixed, inputs, lengths) -> logits


class Setup:
    """What a config builds before any data is read: task, model, optimizer. Refuses what does not fit together."""

    def __init__(self, cfg: DictConfig):
        self.task, self.precision = build_task(cfg), cfg.trainer.precision
        count = (self.task.split_sizes() or {}).get("train")
        if count is not None:
            check_batch_size(cfg, count)
        model_key, self.order_key, self.dropout_key = jax.random.split(jax.random.key(cfg.seed), 3)
        self.graph, self.params, self.stats, self.fixed = build(model_builder(cfg, self.task), model_key)
        if cfg.trainer.micro_batch == "auto" and jax.tree.leaves(self.stats):
            raise ConfigError(
                "trainer.micro_batch=auto would let the free memory choose the batches that batch norm sees, and so the "
                "result; set trainer.micro_batch to a number or null, or backbone.norm to layer, rms or none"
            )
        self.ema, self.label_smoothing = cfg.optim.ema, cfg.optim.label_smoothing
        self.tx, self.groups = adamw(
            cast(dict[str, Any], OmegaConf.to_container(cfg.optim)), cfg.trainer.steps, self.params
        )


def first_state(setup: Setup) -> tuple[State, Best]:
    """The state before the first step; also the form of every state that is saved."""
    opt = setup.tx.init(setup.params)
    average = copy((setup.params, setup.stats)) if setup.ema else None
    state = State(jnp.int32(0), setup.params, setup.stats, opt, jnp.zeros(3), jnp.bool_(True), average)
    return state, Best(copy(setup.params), copy(setup.stats))  # not the state's arrays, whose memory is given away


def evaluated_weights(state: State) -> tuple[Any, Any]:
    """(params, stats) that are evaluated: their moving averages where the run keeps them, else the newest."""
    return state.average or (state.params, state.stats)


def chosen_weights(rule: str, state: State, best: Best) -> tuple[Any, Any]:
    """(params, stats) that are scored: those best on validation, or the last; a checkpoint holds both."""
    return best[:2] if rule == "best" else evaluated_weights(state)


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


def compile_program(
    setup: Setup, batch_size: int, micro_batch: int | None = None, layout: Layout | None = None
) -> Program:
    """The jitted functions of a run; those that train give their state's memory to their result.

    Args:
        batch_size: examples a step, over all devices.
        micro_batch: examples whose activations are held at once, a divisor of `batch_size`; None for all.
        layout: the devices that share the batch; None for one.
    """
    graph, tx, decode = setup.graph, setup.tx, setup.task.decode
    layout = layout or Layout()
    size = micro_batch or batch_size
    parts = batch_size // size

    def loss(params, stats, fixed, batch: Split, key):
        model = nnx.merge(graph, params, stats, fixed, copy=True)  # batch norm writes to its own variables
        logits = model(decode(batch.inputs), batch.lengths, train=True, rngs=nnx.Rngs(dropout=key))
        losses = cross_entropy(logits, batch.labels, setup.label_smoothing)
        correct = (logits.argmax(axis=-1) == batch.labels).sum()
        tally = jnp.stack([losses.sum(), correct.astype(jnp.float32), jnp.float32(losses.size)])
        return losses.mean(), (nnx.state(model, nnx.BatchStat), tally)

    @contextmanager
    def tracing() -> Iterator[None]:
        with layout.tracing(), matmul_precision(setup.precision):
            yield

    def gradients(state: State, fixed, draw: Callable[[jax.Array | int], Split], key) -> tuple:
        """Mean gradient over the batch, batch statistics and tally; `draw(part)` is a micro-batch."""

        def gradient(params, stats, fixed, batch: Split, key):
            return jax.grad(loss, has_aux=True)(params, stats, fixed, layout.split(batch), key)

        if parts == 1:
            grads, (stats, tally) = gradient(state.params, state.stats, fixed, draw(0), key)
            return grads, stats, tally

        def add(carry, part):
            grads, stats, tally = carry
            more, (stats, seen) = gradient(state.params, stats, fixed, draw(part), jax.random.fold_in(key, part))
            return (jax.tree.map(jnp.add, grads, more), stats, tally + seen), None

        start = (jax.tree.map(jnp.zeros_like, state.params), state.stats, jnp.zeros_like(state.tally))
        (grads, stats, tally), _ = jax.lax.scan(add, start, jnp.arange(parts))
        return jax.tree.map(lambda grad: grad / parts, grads), stats, tally  # of equal parts the mean of means

    def step(state: State, fixed, draw: Callable[[jax.Array | int], Split]) -> State:
        key = jax.random.fold_in(setup.dropout_key, state.step)
        with tracing():
            grads, stats, tally = gradients(state, fixed, draw, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(tally[0]) & jnp.isfinite(optax.tree.norm(grads))
        average = setup.ema and averaged(setup.ema, state.average, (params, stats), state.step + 1)
        return State(state.step + 1, params, stats, opt, state.tally + tally, finite, average)

    def goes_on(state: State, until: jax.Array) -> jax.Array:
        return (state.step < until) & state.finite

    @partial(jax.jit, donate_argnums=0)
    def run(state: State, fixed, data: Split, until: jax.Array) -> State:
        """Steps until `until` or the first loss that is not finite."""
        count = len(data.labels)
        steps_per_epoch = count // batch_size  # the tail of each epoch's order is left out, another one each epoch

        def body(carry):
            state, order = carry
            epoch, position = jnp.divmod(state.step, steps_per_epoch)
            order = jax.lax.cond(position == 0, lambda: epoch_order(setup.order_key, epoch, count), lambda: order)

            def draw(part) -> Split:
                rows = jax.lax.dynamic_slice(order, (position * batch_size + part * size,), (size,))
                return jax.tree.map(lambda x: x[rows], data)

            return step(state, fixed, draw), order

        carry = (state, epoch_order(setup.order_key, state.step // steps_per_epoch, count))
        return jax.lax.while_loop(lambda c: goes_on(c[0], until), body, carry)[0]

    @partial(jax.jit, donate_argnums=0)
    def run_window(state: State, fixed, window: Window, until: jax.Array) -> State:
        """As `run`, to the end of the window at most."""

        def body(state: State) -> State:
            batch = jax.tree.map(lambda x: x[state.step - window.first], window.batches)
            return step(state, fixed, lambda part: jax.tree.map(lambda x: x[part], batch))

        return jax.lax.while_loop(lambda state: goes_on(state, until), body, state)

    @jax.jit
    def apply(params, stats, fixed, inputs, lengths):
        inputs, lengths = layout.split((inputs, lengths))
        with tracing():
            logits = nnx.merge(graph, params, stats, fixed)(decode(inputs), lengths, train=False)
        return layout.gather(logits)

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


def copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def on_device(split) -> Split:
    """A packed split on the device; a CPU reads the mapped file itself, without a copy."""
    inputs = jax.device_put(split.inputs.view(np.ndarray), may_alias=True)
    return Split(inputs, jnp.asarray(split.lengths), jnp.asarray(split.labels.astype(np.int32)))
