"""The layers of the studies have the values of the project's own STU and LRU."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.lds_layers import (
    LRUSetting,
    block_size,
    convolve_all,
    init_lru,
    lru_output,
    stu_taps,
    with_feedback,
)
from models.lru import LRU
from models.ops.filters import spectral_filters
from models.ops.stu import scalar_feedback, stu

LENGTH, WIDTH, FILTERS = 24, 3, 4
U = jax.random.normal(jax.random.key(0), (LENGTH, WIDTH))


@pytest.mark.parametrize("feedback", [None, 1.0])
def test_stu_taps_give_the_stu(feedback):
    sigma, phi = (np.asarray(x, np.float32) for x in spectral_filters(LENGTH, FILTERS))
    taps = stu_taps(LENGTH, FILTERS)
    m = jax.random.normal(jax.random.key(1), (taps.shape[1], WIDTH, WIDTH))
    m_u, m_plus, m_minus = m[:3], m[3::2], m[4::2]
    expected = stu(U[None], phi, sigma, m_u, m_plus, m_minus, feedback, lag=2)[0]
    ends = with_feedback(taps) if feedback else taps
    found = jnp.einsum("ljd,jdo->lo", convolve_all(U, jnp.asarray(ends, jnp.float32)), m)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    summed = scalar_feedback(
        convolve_all(U, jnp.asarray(taps, jnp.float32)).reshape(1, LENGTH, -1), 1.0, 2
    )[0]
    if feedback:
        np.testing.assert_allclose(summed @ m.reshape(-1, WIDTH), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("stable", "log_phase", "gamma_norm"),
    [x for x in itertools.product([False, True], repeat=3) if x[0] or not x[1]],
)
def test_lru_in_blocks_is_the_lru(stable, log_phase, gamma_norm):
    states = 5
    flags = (jnp.asarray(x) for x in (stable, log_phase, gamma_norm, 0.5, 0.99, 3.0))
    setting = LRUSetting(*flags)
    p = init_lru(jax.random.key(2), setting, states, WIDTH)
    layer = LRU(
        WIDTH,
        LENGTH,
        state_size=states,
        parametrization="stable_exp" if stable else "exp",
        phase="log" if log_phase else "linear",
        activation="none",
        r_min=0.5,
        r_max=0.99,
        max_phase=3.0,
        gamma_norm=gamma_norm,
        bidirectional=False,
        rngs=nnx.Rngs(params=jax.random.key(0)),
    )
    assert np.abs(layer.eigenvalues()).max() <= 0.99
    layer.nu, layer.nu_log = (nnx.Param(p["nu"]),) * 2
    layer.theta, layer.theta_log = (nnx.Param(p["theta"]),) * 2
    layer.gamma_log = nnx.Param(p["gamma_log"]) if gamma_norm else None
    for name in ("b_re", "b_im", "c_re", "c_im", "d"):
        setattr(layer, name, nnx.Param(p[name]))
    radius = np.abs(layer.eigenvalues())
    assert radius.min() >= 0.4999
    assert radius.max() <= 0.9901
    expected = layer(U[None], jnp.ones((1, LENGTH), bool))[0]
    for length in (LENGTH, 18):
        np.testing.assert_allclose(lru_output(p, setting, U[:length]), expected[:length], atol=1e-5)
    long = jnp.concatenate([U] * 3)
    assert block_size(len(long)) < len(long)
    whole = layer(long[None], jnp.ones((1, len(long)), bool))[0]
    np.testing.assert_allclose(lru_output(p, setting, long), whole, atol=1e-5)
