"""S5 against the published code's values and a float64 loop over its equations."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop
from mixer_checks import check_bfloat16, check_streaming, count_parameters
from scipy.linalg import block_diag, expm

from models.ops.state_space import hippo_normal
from models.s5 import S5, apply_ssm

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = {
    "state_size": 8,
    "num_blocks": 2,
    "conj_sym": True,
    "discretization": "zoh",
    "dt_min": 0.001,
    "dt_max": 0.1,
    "c_init": "trunc_standard_normal",
    "clip_eigs": False,
    "bidirectional": False,
}


def s5(width=3, **options):
    return S5(width, 0, **OPTIONS | options, rngs=nnx.Rngs(params=jax.random.key(0)))


def inputs(batch=2, length=17, width=3):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, width)), jnp.float32)


@pytest.mark.parametrize("name", ["s5_causal_zoh", "s5_bidirectional_bilinear"])
def test_values_match_the_published_code(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    with jax.enable_x64(True):
        lam_bar, b_bar, c, u = (
            jnp.asarray(golden[key]) for key in ("Lambda_bar", "B_bar", "C", "u")
        )
        y = apply_ssm(
            lam_bar,
            b_bar.T,
            c.real.T,
            c.imag.T,
            u[None],
            jnp.ones((1, len(u)), bool),
            conj_sym=bool(golden["conj_sym"]),
        )
    np.testing.assert_allclose(y[0], golden["y"], atol=1e-12 * np.abs(golden["y"]).max())


@pytest.mark.parametrize("name", ["s5_causal_zoh", "s5_bidirectional_bilinear"])
def test_the_module_with_published_parameters_gives_published_values(name):
    """The whole way in float32, from the continuous parameters."""
    golden = np.load(GOLDEN / f"{name}.npz")
    both = bool(golden["bidirectional"])
    mixer = s5(
        golden["u"].shape[1],
        state_size=2 * len(golden["Lambda"]),
        num_blocks=1,
        discretization="bilinear" if "bilinear" in name else "zoh",
        bidirectional=both,
    )
    values = {"lam": golden["Lambda"], "b": golden["B"].T, "c": golden["C"].T}
    for key, value in values.items():
        getattr(mixer, f"{key}_re")[...] = jnp.asarray(value.real, jnp.float32)
        getattr(mixer, f"{key}_im")[...] = jnp.asarray(value.imag, jnp.float32)
    mixer.log_step[...] = jnp.asarray(np.log(golden["dt"]), jnp.float32)
    mixer.d[...] = jnp.zeros_like(mixer.d[...])
    u = jnp.asarray(golden["u"], jnp.float32)[None]
    np.testing.assert_allclose(
        mixer(u, jnp.ones(u.shape[:2], bool))[0], golden["y"], atol=2e-5 * np.abs(golden["y"]).max()
    )


def by_loop(p, u, real, *, rule, conj_sym, both, clip):
    """Sampling and the recurrence of the paper, step by step."""
    lam = (np.minimum(p["lam_re"], -1e-4) if clip else p["lam_re"]) + 1j * p["lam_im"]
    step = np.exp(p["log_step"])
    if rule == "zoh":
        lam_bar = np.exp(lam * step)
        scale = (lam_bar - 1) / lam
    else:
        lam_bar = (1 + step / 2 * lam) / (1 - step / 2 * lam)
        scale = step / (1 - step / 2 * lam)
    b = (p["b_re"] + 1j * p["b_im"]).T * scale[:, None]
    c = (p["c_re"] + 1j * p["c_im"]).T
    n, length = len(lam), u.shape[1]
    times = 2 if conj_sym else 1
    y = [p["d"] * u[:, t] for t in range(length)]
    x = np.zeros((len(u), n), complex)
    for t in range(length):
        x = lam_bar * x + u[:, t] @ b.T
        y[t] = y[t] + times * (x @ c[:, :n].T).real
    x = np.zeros((len(u), n), complex)
    for t in reversed(range(length if both else 0)):
        x = lam_bar * x + (u[:, t] * real[:, t, None]) @ b.T
        y[t] = y[t] + times * (x @ c[:, n:].T).real
    return np.stack(y, axis=1)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"discretization": "bilinear", "bidirectional": True},
        {"conj_sym": False},
        {"clip_eigs": True},
    ],
)
def test_values_and_gradients_equal_a_loop(options):
    mixer = s5(**options)
    if mixer.clip_eigs:
        mixer.lam_re[...] = jnp.asarray([-0.5, 0.3, -0.2, 0.1])
    real = np.arange(9)[None] < np.array([[9], [6]])
    settings = {"rule": mixer.discretization, "conj_sym": mixer.conj_sym}
    settings |= {"both": not mixer.causal, "clip": mixer.clip_eigs}
    check_mixer_against_loop(
        mixer, inputs(length=9), real, lambda p, u: by_loop(p, u, real, **settings)
    )


def test_start_is_the_real_system_with_hippo_blocks():
    """x' = A x + B u, A = blockdiag(HiPPO-N), with dense matrix exponentials; C reads V^H x."""
    mixer = s5(state_size=12, num_blocks=2, dt_min=0.01, dt_max=0.01)
    lam, vectors = hippo_normal(6)
    a = block_diag(*2 * [((vectors * lam) @ vectors.conj().T).real])
    v = block_diag(*2 * [vectors[:, :3]])
    b = 2 * (v @ np.asarray(mixer.b_re[...] + 1j * mixer.b_im[...]).T).real
    held = expm(0.01 * np.block([[a, b], [np.zeros((3, 15))]]))
    u = inputs(batch=1)
    x, expected = np.zeros(12), []
    for u_t in np.asarray(u[0], np.float64):
        x = held[:12, :12] @ x + held[:12, 12:] @ u_t
        c = np.asarray(mixer.c_re[...] + 1j * mixer.c_im[...]).T
        expected.append(2 * (c @ v.conj().T @ x).real + np.asarray(mixer.d[...]) * u_t)
    np.testing.assert_allclose(mixer(u, jnp.ones((1, 17), bool))[0], np.stack(expected), atol=1e-5)


def test_parameters_start_with_the_published_variances():
    """V is unitary: B has variance 1/N; C, both parts together, has 2/N, 2/(N D) or 1."""
    for c_init, variance in (
        ("trunc_standard_normal", 2 / 64),
        ("lecun_normal", 2 / (64 * 200)),
        ("complex_normal", 1.0),
    ):
        mixer = s5(200, state_size=64, num_blocks=4, c_init=c_init, bidirectional=True)
        b, c = (getattr(mixer, f"{x}_re")[...] + 1j * getattr(mixer, f"{x}_im")[...] for x in "bc")
        assert b.shape == (200, 32)
        assert c.shape == (64, 200)
        assert np.mean(np.abs(b) ** 2) == pytest.approx(1 / 64, rel=0.05)
        assert np.mean(np.abs(c) ** 2) == pytest.approx(variance, rel=0.05)
    assert np.exp(mixer.log_step[...]).min() >= 0.001
    assert np.exp(mixer.log_step[...]).max() <= 0.1
    np.testing.assert_allclose(
        mixer.lam_im[...], np.tile(hippo_normal(16)[0].imag[:8], 4), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"state_size": 6}, "state_size"),
        ({"state_size": 7, "num_blocks": 7}, "state_size"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"discretization": "euler"}, "discretization"),
        ({"c_init": "zeros"}, "c_init"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
)
def test_bad_values_name_their_key(options, key):
    with pytest.raises(ValueError, match=rf"model\.{key}="):
        s5(**options)


@pytest.mark.parametrize("options", [{}, {"discretization": "bilinear", "conj_sym": False}])
def test_streaming_equals_the_scan(options):
    check_streaming(s5(**options), inputs(length=200))


def test_bfloat16_input_keeps_float32_states():
    check_bfloat16(s5(), inputs(length=400))


def test_size_of_the_published_speech_model():
    """280K: 6 layers of 96, N 128, 35 classes (bin/run_experiments/run_speech35.sh)."""
    options = OPTIONS | {"state_size": 128, "num_blocks": 16, "bidirectional": True}
    count = count_parameters(partial(S5, **options), depth=6, width=96, glu="half1")
    assert count == pytest.approx(280_000, rel=0.02)
