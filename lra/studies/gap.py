"""Prediction error against the spectral gap at an equal number of parameters.

A system with one input and one output and eigenvalues of modulus up to 1 - delta, white inputs and
a zero initial state. Predictors of y_t from u_1..u_t: autoregression on the last inputs, spectral
filtering, a learned diagonal system (LRU), and the Kalman predictor that knows the system and sees
y_1..y_{t-1} as well.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.signal import fftconvolve

from lra.studies.figures import panels
from lra.studies.lds import System, kalman_predictions
from lra.studies.output import Output
from models import lds_layers
from models.lds_layers import LRUSetting, stu_taps

KINDS = ("symmetric", "complex")
NOISES = (0.0, 0.01)  # variances of the observation noise; the output has variance 1
DELTAS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FILTERS, TAPS, STATES = 30, 63, 9  # 63, 63 and 64 parameters
STEPS = tuple(2.0 ** -np.arange(0, 10, 1.5))  # of normalized online gradient descent
RIDGES = (1e-14, 1e-11, 1e-8, 1e-5, 1e-2)
LRU_RATES = (1e-3, 1e-2)


class Case(NamedTuple):
    kind: str
    delta: float
    noise: float
    system: System
    y: Float[np.ndarray, "sequences L"]  # three for training, one for choices, the rest for tests


def gap(length: int, tests: int, lru_steps: int, kalman_steps: int, seed: int) -> Output:
    """One panel for each kind of system and each noise."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(4 + tests, length))
    cases = list(make_cases(u, rng))
    rows = []
    windows = {
        "autoregression": np.eye(length, TAPS),
        "spectral filtering": stu_taps(length, FILTERS),
    }
    for name, taps in windows.items():
        x = np.stack([features(sequence, taps) for sequence in u])
        x /= np.sqrt(np.mean(x[:3] ** 2, axis=(0, 1)))
        ways = {"ridge": ridge_predictions, "online": online_predictions}
        for way, predict in ways.items():
            predicted = predict(x, cases)
            rows += [
                error_row(f"{name}, {way}", c, p) for c, p in zip(cases, predicted, strict=True)
            ]
    predicted = lru_predictions(u, cases, lru_steps, seed)
    rows += [error_row("learned LRU", c, p) for c, p in zip(cases, predicted, strict=True)]
    for case in cases:
        y = case.y[-1, :kalman_steps, None]
        kalman = kalman_predictions(case.system, u[-1, :kalman_steps, None], y, case.noise)
        rows.append(error_row("Kalman, knows the system", case._replace(y=y.T), kalman.T))
    figure = draw(rows)
    numbers: dict[str, Any] = {
        "parameters": {"autoregression": TAPS, "spectral filtering": 3 + 2 * FILTERS}
        | {"LRU": 7 * STATES + 1}
    }
    for row in rows:
        if row["delta"] in (DELTAS[0], DELTAS[-1]) and row["noise"] == 0:
            numbers[f"{row['kind']}, delta {row['delta']:g}, {row['predictor']}"] = row["error"]
    return Output({"gap": rows, "taps": needed_taps(cases, length)}, numbers, figure)


def make_system(kind: str, delta: float) -> System:
    """Modes with equal shares of the stationary output variance, and D = 0."""
    if kind == "symmetric":
        lam = (1 - delta) * np.array([1, -1, 0.95, -0.8])
    else:  # real and imaginary parts of the states differ: A is a rotation, not symmetric
        lam = (1 - delta) * np.exp(1j * np.array([0.4, 1.9]))
    c = np.sqrt((1 - np.abs(lam) ** 2) / len(lam))
    return System(lam, np.ones((len(lam), 1)), c[None], np.zeros((1, 1)))


def make_cases(u: Float[np.ndarray, "S L"], rng: np.random.Generator) -> Iterator[Case]:
    noise = rng.normal(size=u.shape)
    for kind in KINDS:
        for delta in DELTAS:
            system = make_system(kind, delta)
            y = np.stack([system.outputs(sequence[:, None])[:, 0] for sequence in u])
            scale = np.std(y[:3])
            system = system._replace(c=system.c / scale)
            for variance in NOISES:
                yield Case(kind, delta, variance, system, y / scale + variance**0.5 * noise)


def features(u: Float[np.ndarray, " L"], taps: Float[np.ndarray, "L J"]) -> np.ndarray:
    return fftconvolve(u[:, None], taps, axes=0)[: len(u)]


def error_row(predictor: str, case: Case, predicted: np.ndarray) -> dict[str, Any]:
    """Mean squared error on the last sequences; `predicted` has one row for each."""
    error = float(np.mean((predicted - case.y[-len(predicted) :]) ** 2))
    key = {"kind": case.kind, "noise": case.noise, "delta": case.delta}
    return key | {"predictor": predictor, "error": error}


def ridge_predictions(x: Float[np.ndarray, "S L J"], cases: list[Case]) -> list[np.ndarray]:
    """Ridge regression on three sequences, its weight chosen on the fourth."""
    train = x[:3].reshape(-1, x.shape[2])
    y = np.stack([case.y for case in cases], axis=2)
    left, singular, right = np.linalg.svd(train, full_matrices=False)
    projected = left.T @ y[:3].reshape(len(train), -1)
    found = []
    for weight in RIDGES:
        shrunk = singular / (singular**2 + weight * singular[0] ** 2)
        found.append(right.T @ (shrunk[:, None] * projected))
    return choose(x, np.stack(found), y)


def online_predictions(x: Float[np.ndarray, "S L J"], cases: list[Case]) -> list[np.ndarray]:
    """Normalized online gradient descent over three sequences; weights averaged over the last.

    w += step (y - w x) x / |x|^2; the step is chosen on the fourth sequence.
    """
    y = np.stack([case.y for case in cases], axis=2)
    w = np.zeros((x.shape[2], len(STEPS), len(cases)))
    total = np.zeros_like(w)
    steps = np.array(STEPS)[:, None]
    for sequence in range(3):
        for x_t, y_t in zip(x[sequence], y[sequence], strict=True):
            error = y_t - np.tensordot(x_t, w, 1)
            w += (x_t / (1e-12 + x_t @ x_t))[:, None, None] * (steps * error)
            if sequence == 2:
                total += w
    return choose(x, np.swapaxes(total / x.shape[1], 0, 1), y)


def choose(
    x: np.ndarray, w: Float[np.ndarray, "choices J cases"], y: np.ndarray
) -> list[np.ndarray]:
    """Predictions of the last sequences with each case's best weights on the fourth."""
    errors = np.stack([np.mean((x[3] @ one - y[3]) ** 2, axis=0) for one in w])
    best = np.argmin(errors, axis=0)
    return [x[4:] @ w[choice, :, case] for case, choice in enumerate(best)]


def lru_predictions(
    u: Float[np.ndarray, "S L"], cases: list[Case], steps: int, seed: int
) -> list[np.ndarray]:
    """An LRU trained by Adam on the three sequences in turn; its rate is chosen on the fourth."""
    flags = jnp.ones((), bool)
    setting = LRUSetting(flags, flags, flags, *map(jnp.asarray, (0.9, 0.9999, 2 * np.pi)))
    optimizer = optax.scale_by_adam()
    inputs = jnp.asarray(u, jnp.float32)[..., None]
    targets = jnp.asarray(np.stack([c.y for c in cases for _ in LRU_RATES]), jnp.float32)
    rates = jnp.asarray([rate for _ in cases for rate in LRU_RATES], jnp.float32)

    def loss(p: Any, u: Array, y: Array) -> Array:
        return jnp.mean((lds_layers.lru_output(p, setting, u)[:, 0] - y) ** 2)

    def step(carry: Any, t: Array) -> tuple[Any, None]:
        p, state = carry
        gradient = jax.vmap(jax.grad(loss), (0, None, 0))(p, inputs[t % 3], targets[:, t % 3])
        update, state = optimizer.update(gradient, state)
        rate = rates * (0.5 + 0.5 * jnp.cos(jnp.pi * t / steps))
        move = lambda x, change: x - rate.reshape(-1, *[1] * (x.ndim - 1)) * change  # noqa: E731
        return (jax.tree.map(move, p, update), state), None

    @jax.jit
    def train() -> Array:
        keys = jax.random.split(jax.random.key(seed), len(rates))
        init = partial(lds_layers.init_lru, setting=setting, states=STATES, width=1)
        p = jax.vmap(init)(keys)
        p = jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(steps))[0][0]
        return jax.lax.map(
            lambda u: jax.vmap(lambda p: lds_layers.lru_output(p, setting, u)[:, 0])(p), inputs[3:]
        )

    predicted = np.swapaxes(np.asarray(train(), np.float64), 0, 1)
    predicted = predicted.reshape(len(cases), len(LRU_RATES), -1, u.shape[1])
    results = []
    for case, choices in zip(cases, predicted, strict=True):
        errors = np.mean((choices[:, 0] - case.y[3]) ** 2, axis=1)
        results.append(choices[np.nanargmin(errors), 1:])
    return results


def needed_taps(cases: list[Case], length: int) -> list[dict[str, Any]]:
    """Last inputs that a squared error of 1e-2 needs, in closed form, and log(1/eps) / 2 delta."""
    rows = []
    for case in cases:
        if case.noise == 0:
            h = case.system.impulse_response(length)[:, 0, 0]
            energy = (length - np.arange(length)) / length * h**2  # of white inputs, h_0 = 0
            tail = np.cumsum(energy[::-1])[::-1]
            needed = int(np.argmax(tail <= 1e-2 * tail[0])) if tail[-1] <= 1e-2 * tail[0] else None
            rule = np.log(100) / (2 * case.delta)
            key = {"kind": case.kind, "delta": case.delta}
            rows.append(key | {"taps": needed, "log(100) / (2 delta)": rule})
    return rows


def draw(rows: list[dict[str, Any]]) -> Any:
    shown = [(kind, noise) for kind in KINDS for noise in NOISES]
    titles = [f"{kind}, {f'noise {noise:g}' if noise else 'no noise'}" for kind, noise in shown]
    figure, axes = panels(titles, width=3.6, sharey=True)
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    colors = ("C1", "C1", "C0", "C0", "C2", "C6")
    styles = ("o-", "o--", "s-", "s--", "^-", ":")
    for axis, (kind, noise) in zip(axes, shown, strict=True):
        for name, color, style in zip(names, colors, styles, strict=True):
            errors = [
                max(row["error"], 1e-16)
                for row in rows
                if (row["kind"], row["noise"], row["predictor"]) == (kind, noise, name)
            ]
            axis.loglog(DELTAS, errors, style, color=color, label=name)
        axis.invert_xaxis()
        axis.set(xlabel=r"spectral gap $\delta$", ylim=(1e-17, 10))
    axes[0].set_ylabel("squared error / output variance")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
