"""Linear dynamical systems: the paper's, random ones, their outputs and their best predictors.

    h_t = A h_{t-1} + B u_t,   y_t = Re(C h_t) + D u_t,   h_0 = 0 before the first input,

with a diagonal A. A symmetric A is diagonal in an orthonormal basis, a pair of complex eigenvalues
is one complex state. Computed in float64.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Inexact
from scipy.signal import lfilter


class System(NamedTuple):
    """A diagonal A as its eigenvalues, and B, C and D."""

    lam: Inexact[np.ndarray, " N"]
    b: Inexact[np.ndarray, "N D_in"]
    c: Inexact[np.ndarray, "D_out N"]
    d: Float[np.ndarray, "D_out D_in"]

    def impulse_response(self, length: int) -> Float[np.ndarray, "L D_in D_out"]:
        powers = self.lam ** np.arange(length)[:, None]
        h = np.einsum("on,ln,ni->lio", self.c, powers, self.b).real
        h[0] += self.d.T
        return h

    def outputs(self, u: Float[np.ndarray, "L D_in"]) -> Float[np.ndarray, "L D_out"]:
        bu = u @ self.b.T
        h = np.stack(
            [lfilter([1.0], [1.0, -lam], x) for lam, x in zip(self.lam, bu.T, strict=True)]
        )
        return (self.c @ h).T.real + u @ self.d.T


# appendix E.1 of arXiv 2312.06837v4
PRINTED = System(
    lam=np.array([-0.9999, 0.9999, -0.9999, 0.9999]),
    b=np.array(
        [
            [0.36858183, -0.34219486, 0.1407376],
            [0.18933886, -0.1243964, 0.21866894],
            [0.14593862, -0.5791096, -0.06816235],
            [-0.3095346, -0.21441863, 0.08696061],
        ]
    ),
    c=np.array(
        [
            [0.5528727, -0.51329225, 0.21110639, 0.2840083],
            [-0.18659459, 0.3280034, 0.21890792, -0.8686644],
            [-0.10224352, -0.46430188, -0.32162794, 0.1304409],
        ]
    ),
    d=np.diag([1.5905786, -0.45901108, 0.3238576]),
)


def random_symmetric(
    rng: np.random.Generator, states: int, width: int, radius: float = 1.0
) -> System:
    """Eigenvalues uniform in [-radius, radius], one of them at +-radius; B, C, D standard normal.

    B and C are divided by sqrt(N), so that outputs do not grow with N.
    """
    lam = rng.uniform(-radius, radius, states)
    lam[0] = radius * rng.choice([-1, 1])
    b, c = rng.normal(size=(2, states, width)) / states**0.5
    return System(lam, b, c.T, np.diag(rng.normal(size=width)))


def least_squares_taps(
    taps: Float[np.ndarray, "L J"], h: Float[np.ndarray, "L D_in D_out"]
) -> tuple[Float[np.ndarray, "J D_in D_out"], float]:
    """Matrices for `taps` with the least expected error for white noise, and this error.

    For standard normal inputs and h_0 = 0 the expected squared error, summed over the L times and
    the outputs, is sum_i (L - i) |h_i - hat h_i|^2: lag i occurs at L - i times.
    """
    length = len(h)
    weight = np.sqrt(length - np.arange(length))[:, None]
    target = weight * h.reshape(length, -1)
    # small filters count too: columns of unit norm, and a cut at rounding errors
    norm = np.linalg.norm(weight * taps, axis=0)
    m = np.linalg.lstsq(weight * taps / norm, target, rcond=1e-14)[0] / norm[:, None]
    error = float(np.sum((target - weight * taps @ m) ** 2))
    return m.reshape(-1, *h.shape[1:]), error


def kalman_predictions(
    system: System,
    u: Float[np.ndarray, "L D_in"],
    y: Float[np.ndarray, "L D_out"],
    noise: float,
    start: float = 0.0,
) -> Float[np.ndarray, "L D_out"]:
    """E[y_t | u_1..u_t, y_1..y_{t-1}] with the true system: no predictor does better.

    Args:
        noise: variance of the white noise that was added to the outputs.
        start: variance of the state before the first input; 0 if it is known to be 0.
    """
    a, b, c = real_form(system)
    h, p = np.zeros(len(a)), start * np.eye(len(a))
    predicted = np.empty_like(y)
    for t in range(len(u)):
        h, p = a @ h + b @ u[t], a @ p @ a.T
        predicted[t] = c @ h + system.d @ u[t]
        variance = c @ p @ c.T + noise * np.eye(len(c))
        gain = p @ c.T @ np.linalg.pinv(variance)  # zero where nothing is uncertain
        h = h + gain @ (y[t] - predicted[t])
        p = p - gain @ c @ p
    return predicted


def real_form(system: System) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and C with real entries; a complex state becomes two real ones."""
    if not np.iscomplexobj(system.lam):
        return np.diag(system.lam), system.b, system.c
    lam = np.diag(system.lam)
    a = np.block([[lam.real, -lam.imag], [lam.imag, lam.real]])
    b = np.concatenate([system.b.real, system.b.imag])
    return a, b, np.concatenate([system.c.real, -system.c.imag], axis=1)
