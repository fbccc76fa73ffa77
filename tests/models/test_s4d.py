"""S4D against a float64 loop over its equations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop
from mixer_checks import check_bfloat16, check_streaming, count_parameters

from models.ops.state_space import hippo_normal
from models.s4d import S4D

PARAMETERS = ("log_a_real", "a_imag", "b_re", "b_im", "c_re", "c_im", "log_step", "d")
OPTIONS = {
    "state_size": 8,
    "init": "lin",
    "num_ssms": None,
    "discretization": "zoh",
    "dt_min": 0.001,
    "dt_max": 0.1,
    "bidirectional": False,
}


def s4d(width=4, **options):
    return S4D(width, 0, **OPTIONS | options, rngs=nnx.Rngs(params=jax.random.key(0)))


def inputs(batch=2, length=17, width=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, width)), jnp.float32)


def by_loop(p, u, real, *, rule, both):
    """The recurrence of each channel, step by step; the anticausal y_k reads x_{k+1}."""
    width, length = u.shape[2], u.shape[1]
    shared = [d % len(p["a_imag"]) for d in range(width)]
    a = (-np.exp(p["log_a_real"]) + 1j * p["a_imag"])[np.array(shared)]
    b = (p["b_re"] + 1j * p["b_im"])[np.array(shared)]
    step = np.exp(p["log_step"])[:, None]
    if rule == "zoh":
        lam_bar = np.exp(step * a)
        b_bar = (lam_bar - 1) / a * b
    else:
        lam_bar = (1 + step / 2 * a) / (1 - step / 2 * a)
        b_bar = step / (1 - step / 2 * a) * b
    c = p["c_re"] + 1j * p["c_im"]
    y = [p["d"] * u[:, t] for t in range(length)]
    x = np.zeros((len(u), *a.shape), complex)
    for t in range(length):
        x = lam_bar * x + b_bar * u[:, t, :, None]
        y[t] = y[t] + 2 * (c[0] * x).sum(axis=-1).real
    x = np.zeros_like(x)
    for t in reversed(range(length if both else 0)):
        y[t] = y[t] + 2 * (c[1] * x).sum(axis=-1).real
        x = lam_bar * x + b_bar * (u[:, t] * real[:, t, None])[..., None]
    return np.stack(y, axis=1)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "inv", "bidirectional": True},
        {"init": "legs", "discretization": "bilinear", "bidirectional": True, "num_ssms": 2},
        {"discretization": "bilinear", "num_ssms": 1},
    ],
)
def test_values_and_gradients_equal_a_loop(options):
    mixer = s4d(**options)
    for name in PARAMETERS:  # off the start, where b_im is 0 and all channels are alike
        parameter = getattr(mixer, name)
        parameter[...] = parameter[...] + 0.1 * jax.random.normal(
            jax.random.key(len(name)), parameter.shape
        )
    real = np.arange(9)[None] < np.array([[9], [6]])
    settings = {"rule": mixer.discretization, "both": not mixer.causal}
    check_mixer_against_loop(
        mixer, inputs(length=9), real, lambda p, u: by_loop(p, u, real, **settings)
    )


def test_the_three_starts():
    """A_n = -1/2 + i pi n; -1/2 + i N/pi (N/(2n+1) - 1); HiPPO-N with B = V^H sqrt(2n+1)."""
    lin, inv, legs = (s4d(init=init, state_size=16) for init in ("lin", "inv", "legs"))
    for mixer in (lin, inv, legs):
        assert mixer.a_imag.shape == (4, 8)
        np.testing.assert_allclose(-np.exp(mixer.log_a_real[...]), -0.5, rtol=1e-6)
    np.testing.assert_allclose(lin.a_imag[0], [np.pi * n for n in range(8)], rtol=1e-6)
    np.testing.assert_allclose(
        inv.a_imag[0], [16 / np.pi * (16 / (2 * n + 1) - 1) for n in range(8)], rtol=1e-6
    )
    np.testing.assert_allclose(legs.a_imag[3], -hippo_normal(16)[0].imag[:8], rtol=1e-6)
    np.testing.assert_array_equal(lin.b_re[...], 1)
    # with the phases that C makes random, the pairs add up to HiPPO's own B
    vectors, root = hippo_normal(16)[1], np.sqrt(2 * np.arange(16) + 1)
    phases = np.exp(1j * np.angle(vectors.conj().T @ root))
    np.testing.assert_allclose(
        2 * (vectors[:, :8] @ (legs.b_re[0] * phases[:8])).real, root, rtol=1e-5
    )
    assert np.exp(lin.log_step[...]).min() >= 0.001
    assert np.exp(lin.log_step[...]).max() <= 0.1


def test_channels_share_systems_in_turn():
    mixer = s4d(num_ssms=2)
    assert mixer.a_imag.shape == mixer.b_re.shape == (2, 4)
    mixer.a_imag[...] = mixer.a_imag[...].at[1].add(5.0)
    mixer.log_step[...] = jnp.full(4, -4.0)
    lam = np.asarray(mixer.system()[0])
    np.testing.assert_array_equal(lam[0], lam[2])
    np.testing.assert_array_equal(lam[1], lam[3])
    assert np.abs(lam[0] - lam[1]).max() > 0.01


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"state_size": 7}, "state_size"),
        ({"state_size": 0}, "state_size"),
        ({"init": "random"}, "init"),
        ({"num_ssms": 3}, "num_ssms"),
        ({"num_ssms": 0}, "num_ssms"),
        ({"discretization": "euler"}, "discretization"),
        ({"dt_max": 0.0001}, "dt_min"),
    ],
)
def test_bad_values_name_their_key(options, key):
    with pytest.raises(ValueError, match=rf"model\.{key}="):
        s4d(**options)


@pytest.mark.parametrize(
    "options", [{}, {"init": "legs", "discretization": "bilinear", "num_ssms": 2}]
)
def test_streaming_equals_the_convolution(options):
    check_streaming(s4d(**options), inputs(length=300), atol=5e-5)


def test_bfloat16_input_is_convolved_in_float32():
    check_bfloat16(s4d(), inputs(length=400))


def test_size_of_the_published_speech_model():
    """306K: 6 layers of 128, N 64, n_ssm 2, 35 classes (configs/experiment/sc/s4-sc.yaml)."""
    options = OPTIONS | {"state_size": 64, "num_ssms": 2, "bidirectional": True}
    count = count_parameters(partial(S4D, **options), depth=6, width=128)
    assert count == pytest.approx(306_000, rel=0.02)
