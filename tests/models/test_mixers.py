"""The mixers against slow float64 references and the published implementation."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.attention import Attention
from models.lru import LRU
from models.ops.positions import rotate

GOLDEN = Path(__file__).parents[1] / "golden"


def rngs():
    return nnx.Rngs(params=jax.random.key(0))


def lru(width=3, state_size=4, **options):
    defaults = {
        "r_min": 0.5,
        "r_max": 0.9,
        "max_phase": 6.28,
        "gamma_norm": True,
        "bidirectional": False,
    }
    defaults |= {"parametrization": "stable_exp", "phase": "log", "activation": "none"}
    return LRU(width, 0, state_size=state_size, **defaults | options, rngs=rngs())


def lru_by_loop(m, u):
    """h_t = lam h_{t-1} + gamma B u_t, y_t = Re(C h_t) + D u_t, one step at a time in complex128; (L, D) -> (L, D)."""
    p = {
        name: np.asarray(getattr(m, name)[...], np.float64)
        for name in ("nu_log", "theta_log", "b_re", "b_im", "c_re", "c_im", "d")
    }
    lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    gamma = 1.0 if m.gamma_log is None else np.exp(np.asarray(m.gamma_log[...], np.float64))
    n = len(lam)
    b, c = p["b_re"] + 1j * p["b_im"], p["c_re"] + 1j * p["c_im"]

    def states(u):
        h, out = np.zeros(n, complex), []
        for u_t in u:
            h = lam * h + gamma * (u_t @ b)
            out.append(h)
        return np.stack(out)

    y = (states(u) @ c[:n]).real + p["d"] * u
    return y + (states(u[::-1])[::-1] @ c[n:]).real if m.bidirectional else y


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("gamma_norm", [False, True])
def test_lru_equals_a_loop(bidirectional, gamma_norm):
    mixer = lru(bidirectional=bidirectional, gamma_norm=gamma_norm)
    u = np.random.default_rng(0).normal(size=(2, 17, 3))
    y = mixer(jnp.asarray(u, jnp.float32), jnp.ones((2, 17), bool))
    np.testing.assert_allclose(y, np.stack([lru_by_loop(mixer, row) for row in u]), atol=2e-5)


def test_bidirectional_lru_starts_at_the_last_real_position():
    mixer = lru(bidirectional=True)
    u = jax.random.normal(jax.random.key(1), (1, 12, 3))
    mask = jnp.arange(12)[None] < 7
    np.testing.assert_allclose(mixer(u, mask)[:, :7], mixer(u[:, :7], mask[:, :7]), atol=1e-5)


def test_lru_starts_in_the_ring_uniform_in_area():
    mixer = lru(state_size=4000, r_min=0.6, r_max=0.8, max_phase=0.3)
    lam = np.exp(-np.exp(mixer.nu_log[...]) + 1j * np.exp(mixer.theta_log[...]))
    radius, phase = np.abs(lam), np.angle(lam)
    assert 0.6 <= radius.min() < 0.603
    assert 0.797 < radius.max() <= 0.8
    assert 0.297 < phase.max() <= 0.3
    assert np.mean(radius**2) == pytest.approx((0.6**2 + 0.8**2) / 2, abs=0.005)
    np.testing.assert_allclose(np.exp(mixer.gamma_log[...]), np.sqrt(1 - radius**2), rtol=1e-4)


@pytest.mark.parametrize(("r_min", "r_max"), [(0.9, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_lru_refuses_a_ring_that_is_none(r_min, r_max):
    with pytest.raises(ValueError, match=r"model\.r_min"):
        lru(r_min=r_min, r_max=r_max)


def attention(**options):
    defaults = {
        "num_heads": 2,
        "positions": "none",
        "causal": False,
        "max_len": None,
        "qkv_width": None,
        "attention_dropout": 0.0,
    }
    return Attention(8, 6, **defaults | options, rngs=rngs())


def attention_by_loop(m, x, length, causal):
    """softmax(q k / sqrt(W)) v, one query and one head at a time; (L, D) -> (L, D)."""
    w_qkv, w_out = (np.asarray(w.kernel[...], np.float64) for w in (m.qkv, m.output))
    q, k, v = np.split(x @ w_qkv, 3, axis=-1)
    out = np.zeros_like(x)
    for t in range(len(x)):
        seen = min(length, t + 1) if causal else length
        for head in (slice(0, 4), slice(4, 8)):
            scores = k[:seen, head] @ q[t, head] / np.sqrt(4)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ v[:seen, head] / weights.sum()
    return out @ w_out


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_a_loop(causal):
    mixer = attention(causal=causal)
    x = np.random.default_rng(0).normal(size=(2, 6, 8))
    lengths = (6, 4)
    y = mixer(jnp.asarray(x, jnp.float32), jnp.arange(6)[None] < jnp.asarray(lengths)[:, None])
    for row, length in enumerate(lengths):
        expected = attention_by_loop(mixer, x[row], length, causal)
        np.testing.assert_allclose(y[row, :length], expected[:length], atol=1e-5)


def test_rotation_keeps_length_and_makes_products_depend_on_distance():
    rng = np.random.default_rng(0)
    q, k = (
        jnp.asarray(np.broadcast_to(rng.normal(size=8), (1, 20, 1, 8)), jnp.float32) for _ in "qk"
    )
    turned_q, turned_k = rotate(q)[0, :, 0], rotate(k)[0, :, 0]
    np.testing.assert_allclose(
        np.linalg.norm(turned_q, axis=-1), np.linalg.norm(q[0, 0, 0]), rtol=1e-5
    )
    np.testing.assert_allclose(turned_q[3] @ turned_k[1], turned_q[12] @ turned_k[10], rtol=1e-4)
    assert abs(float(turned_q[3] @ turned_k[1] - turned_q[3] @ turned_k[2])) > 1e-2


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_heads": 3}, "model.num_heads"),
        ({"num_heads": 8, "positions": "rotary"}, "model.positions"),
        ({"max_len": 5}, "model.max_len"),
    ],
)
def test_attention_names_the_key_of_a_bad_size(options, key):
    with pytest.raises(ValueError, match=key):
        attention(**options)
