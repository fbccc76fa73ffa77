"""Trains one STU layer and one LRU layer on the paper's marginally stable system, appendix E.1.

Every step draws a new sequence of standard normal inputs (batch 1); the loss is the squared error,
summed over time and outputs; the optimizer is Adam. A curve has the loss of each new sequence
before the update. All settings of a seed see the same sequences.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lra.studies.lds import PRINTED
from models import lds_layers
from models.lds_layers import LRUSetting, stu_taps
from models.ops.stu import scalar_feedback

RATES = (0.05, 0.1, 0.5, 1.0, 5.0, 10.0)  # of the paper, for both layers
FEEDBACKS = ("none", "own", "true")  # y_{t-2} of equation (4): left out, predicted, observed
LRU_RATES = (0.001, 0.01, *RATES)  # smaller ones, which the paper does not try
LRU_STATES = 32  # 483 parameters; the STU has 477 with 25 filters
GRID: dict[str, tuple[Any, ...]] = {  # appendix E.1; it prints no values for the last three
    "stable": (False, True),
    "log_phase": (False, True),
    "gamma_norm": (False, True),
    "r_min": (0.0, 0.9, 0.99, 0.999),
    "r_max": (0.9, 0.99, 0.999, 1.0),
    "max_phase": (1.57, 3.14, 6.28),
    "rate": RATES,
    "weight_decay": (0.0, 1e-3, 1e-2, 1e-1),
    "cosine": (False, True),  # 10 % warm-up, then cosine to 0; else a constant rate
}
Row = dict[str, Any]


class Runs(NamedTuple):
    """The settings of one layer and their loss curves for each seed."""

    rows: list[Row]
    curves: Float[np.ndarray, "seeds S steps"]


@lru_cache
def train_stu(length: int, steps: int, seeds: int, filters: tuple[int, ...], most: int) -> Runs:
    """Every rate with each number of filters without feedback, and `most` filters with it."""
    rows: list[Row] = [
        {"feedback": feedback, "filters": k, "rate": rate}
        for feedback in FEEDBACKS
        for k in (filters if feedback == "none" else (most,))
        for rate in RATES
    ]
    taps = jnp.asarray(stu_taps(length, max(filters)), jnp.float32)
    columns = np.arange(taps.shape[1])[:, None] < [3 + 2 * row["filters"] for row in rows]
    rates = jnp.asarray([row["rate"] for row in rows])
    groups = [np.array([row["feedback"] == name for row in rows]) for name in FEEDBACKS]
    optimizer = optax.scale_by_adam()

    def loss(m: Float[Array, "S J D D"], u: Array, y: Array) -> tuple[Array, Array]:
        features = lds_layers.convolve_all(u, taps).reshape(length, -1)
        change = y.at[2:].add(-y[:-2])
        losses = []
        for name, x, target in zip(
            FEEDBACKS,
            (features, scalar_feedback(features[None], 1.0, 2)[0], features),
            (y, y, change),
            strict=True,
        ):
            chosen = m[groups[FEEDBACKS.index(name)]].reshape(-1, x.shape[1], m.shape[-1])
            predicted = jnp.einsum("lf,sfo->slo", x, chosen)
            losses.append(jnp.sum((predicted - target) ** 2, axis=(1, 2)))
        each = jnp.concatenate(losses)
        return jnp.sum(each), each

    def step(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        m, state = carry
        (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(m, *inputs)
        update, state = optimizer.update(gradient * columns.T[:, :, None, None], state)
        return (m - rates[:, None, None, None] * update, state), each

    @jax.jit
    def train(seed: Array) -> Array:
        m = jnp.zeros((len(rows), taps.shape[1], 3, 3))
        keys = jax.random.split(jax.random.key(seed), steps)
        draw = partial(sequence, length=length)
        return jax.lax.scan(
            lambda carry, key: step(carry, draw(key)), (m, optimizer.init(m)), keys
        )[1].T

    return Runs(rows, np.stack([np.asarray(train(seed)) for seed in range(seeds)]))


def train_lru(length: int, steps: int, seeds: int, rows: list[Row]) -> Runs:
    """Every setting of `rows`, whose keys are those of `GRID`."""
    columns = {key: jnp.asarray([row[key] for row in rows]) for key in GRID}
    setting = LRUSetting(*(columns[key] for key in LRUSetting._fields))
    optimizer = optax.scale_by_adam()
    warmup = max(1, steps // 10)

    def loss(p: Any, setting: LRUSetting, u: Array, y: Array) -> Array:
        return jnp.sum((lds_layers.lru_output(p, setting, u) - y) ** 2)

    gradients = jax.vmap(jax.value_and_grad(loss), (0, 0, None, None))

    def step(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        p, state = carry
        key, t = inputs
        each, gradient = gradients(p, setting, *sequence(key, length))
        update, state = optimizer.update(gradient, state)
        progress = jnp.maximum(t - warmup, 0) / max(1, steps - warmup)
        cosine = jnp.where(t < warmup, (t + 1) / warmup, 0.5 + 0.5 * jnp.cos(jnp.pi * progress))
        rate = columns["rate"] * jnp.where(columns["cosine"], cosine, 1.0)

        def move(x: Array, change: Array) -> Array:
            each = (-1, *[1] * (x.ndim - 1))
            decay = columns["weight_decay"].reshape(each)
            return x - rate.reshape(each) * (change + decay * x)

        return (jax.tree.map(move, p, update), state), each

    @jax.jit
    def train(seed: Array) -> Array:
        key = jax.random.key(seed)
        inits = jax.random.split(jax.random.fold_in(key, 1), len(rows))
        p = jax.vmap(partial(lds_layers.init_lru, states=LRU_STATES, width=3))(inits, setting)
        inputs = jax.random.split(key, steps), jnp.arange(steps)
        return jax.lax.scan(step, (p, optimizer.init(p)), inputs)[1].T

    return Runs(rows, np.stack([np.asarray(train(seed)) for seed in range(seeds)]))


def random_rows(count: int) -> list[Row]:
    """Random settings of `GRID`; the radii are drawn until r_min < r_max."""
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    while len(rows) < count:
        row = {key: values[rng.integers(len(values))] for key, values in GRID.items()}
        if row["r_min"] < row["r_max"]:
            rows.append(row)
    return rows


def sequence(key: Array, length: int) -> tuple[Array, Array]:
    """Standard normal inputs and the outputs of the paper's system."""
    u = jax.random.normal(key, (length, 3))
    h = jnp.asarray(PRINTED.impulse_response(length), jnp.float32).reshape(length, 9)
    each = lds_layers.convolve_all(u, h).reshape(length, 3, 3, 3)  # (L, D_in, D_out, channel)
    return u, jnp.einsum("liod,id->lo", each, jnp.eye(3))
