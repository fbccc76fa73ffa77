"""An STU and an LRU layer in the forms that `lra reproduce` trains many settings of at once.

The values are those of `models.stu.STU` and `models.lru.LRU`. The STU is linear in its matrices, so
the features of an input are computed once for all settings. The LRU is computed in blocks of steps:
matrix products in place of a recurrence over L steps, and one program for all parametrizations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact

from models.lru import polar
from models.ops.fft_convolution import smooth_size
from models.ops.filters import spectral_filters
from models.ops.recurrence import linear_recurrence

Parameters = dict[str, Array]


def stu_taps(length: int, num_filters: int, k_u: int = 3) -> Float[np.ndarray, "L J"]:
    """The impulse responses that equation (4) combines, J = k_u + 2 K, without its feedback.

    Columns: k_u unit impulses, then sigma_k^(1/4) phi_k and its sign-alternated copy, both two
    steps late, for k = 1..K. The first k_u + 2 k columns are those of a layer with k filters.
    """
    sigma, phi = spectral_filters(length, num_filters)
    late = np.pad(phi * sigma**0.25, ((2, 0), (0, 0)))[:length]
    signs = (-1.0) ** np.arange(length)[:, None]
    pairs = np.stack([late, signs * late], axis=2).reshape(length, -1)
    return np.concatenate([np.eye(length, k_u), pairs], axis=1)


def with_feedback(taps: Float[np.ndarray, "L J"]) -> Float[np.ndarray, "L J"]:
    """Impulse responses after y_t = x_t + y_{t-2}."""
    taps = taps.copy()
    for start in range(2):
        taps[start::2] = np.cumsum(taps[start::2], axis=0)
    return taps


def convolve_all(u: Float[Array, "L D"], taps: Float[Array, "L J"]) -> Float[Array, "L J D"]:
    """Every input channel, convolved with every impulse response."""
    length = len(u)
    size = smooth_size(2 * length - 1)
    u_hat, taps_hat = jnp.fft.rfft(u.T, size), jnp.fft.rfft(taps.T, size)
    product = taps_hat[:, None] * u_hat[None]
    return jnp.moveaxis(jnp.fft.irfft(product, size)[..., :length], 2, 0)


class LRUSetting(NamedTuple):
    """Options of `models.lru.LRU` as numbers, so that one program serves all of them."""

    stable: Inexact[Array, "*S"] | Bool[Array, "*S"]  # stable_exp, else exp
    log_phase: Bool[Array, "*S"]
    gamma_norm: Bool[Array, "*S"]
    r_min: Float[Array, "*S"]
    r_max: Float[Array, "*S"]
    max_phase: Float[Array, "*S"]


def init_lru(key: Array, setting: LRUSetting, states: int, width: int) -> Parameters:
    """Initial parameters of one setting, as `models.lru.LRU` draws them."""
    keys = jax.random.split(key, 7)
    low, high = setting.r_min**2, setting.r_max**2
    squared = jnp.clip(low + (high - low) * jax.random.uniform(keys[0], (states,)), 1e-12, 1 - 1e-7)
    theta = setting.max_phase * jax.random.uniform(keys[1], (states,), minval=1e-7)
    nu = -0.5 * jnp.log(squared)

    def normal(key: Array, *shape: int, scale: float = 1.0) -> Array:
        return scale * jax.random.normal(key, shape)

    return {
        "nu": jnp.where(setting.stable, jnp.log(nu), nu),
        "theta": jnp.where(setting.log_phase, jnp.log(theta), theta),
        "gamma_log": 0.5 * jnp.log1p(-squared),
        "b_re": normal(keys[2], width, states, scale=(2 * width) ** -0.5),
        "b_im": normal(keys[3], width, states, scale=(2 * width) ** -0.5),
        "c_re": normal(keys[4], states, width, scale=states**-0.5),
        "c_im": normal(keys[5], states, width, scale=states**-0.5),
        "d": normal(keys[6], width),
    }


def eigenvalue_powers(
    p: Parameters, setting: LRUSetting, exponents: Float[np.ndarray, " T"]
) -> Complex[Array, "T N"]:
    """lam^t, as exp(-nu t + i theta t), which is faster and more accurate than a complex power."""
    nu = jnp.where(setting.stable, jnp.exp(p["nu"]), p["nu"])
    theta = jnp.where(setting.log_phase, jnp.exp(p["theta"]), p["theta"])
    times = jnp.asarray(exponents)[:, None]
    return polar((times * nu[None]).ravel(), (times * theta[None]).ravel()).reshape(-1, len(nu))


def lru_output(p: Parameters, setting: LRUSetting, u: Float[Array, "L D"]) -> Float[Array, "L D"]:
    """The output of the layer, in blocks of T steps; T divides L."""
    length, width = u.shape
    size = block_size(length)
    gamma = jnp.exp(jnp.where(setting.gamma_norm, p["gamma_log"], 0.0))
    b = jax.lax.complex(gamma * p["b_re"], gamma * p["b_im"])  # (D, N)
    c = jax.lax.complex(p["c_re"], p["c_im"])  # (N, D)
    powers = eigenvalue_powers(p, setting, np.arange(size + 1, dtype=np.float32))  # (T + 1, N)

    blocks = u.reshape(-1, size, width)
    kernel = jnp.einsum("dn,tn,no->tdo", b, powers[:-1], c).real
    y = jnp.einsum("atjd,jdo->ato", windows(blocks), kernel)
    into = jnp.flip(powers[:-1], 0)[:, None] * b[None]  # (T, D, N), from inputs to the block's end
    ends = jax.lax.complex(
        jnp.einsum("atd,tdn->an", blocks, into.real), jnp.einsum("atd,tdn->an", blocks, into.imag)
    )
    starts = linear_recurrence(powers[-1], ends[None])[0, :-1]  # of the blocks after the first
    out = powers[1:, :, None] * c[None]  # (T, N, D), from the state before a block
    carried = jnp.einsum("an,tno->ato", starts.real, out.real)
    carried = carried - jnp.einsum("an,tno->ato", starts.imag, out.imag)
    y = y + jnp.pad(carried, ((1, 0), (0, 0), (0, 0)))
    return y.reshape(length, width) + p["d"] * u


def block_size(length: int) -> int:
    """The largest divisor of L up to 25, near the fewest operations at L = 1,000."""
    return max(size for size in range(1, 26) if length % size == 0)


def windows(blocks: Float[Array, "A T D"]) -> Float[Array, "A T T D"]:
    """u_{t-j} at (t, j) of each block, zero before its start."""
    size = blocks.shape[1]
    lag = np.arange(size)[:, None] - np.arange(size)[None]
    return jnp.where((lag >= 0)[None, :, :, None], blocks[:, np.maximum(lag, 0)], 0)
