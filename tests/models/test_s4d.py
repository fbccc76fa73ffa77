"""S4D against a float64 loop over its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop

from models.backbone import Backbone
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


def test_causal_ignores_the_future_and_examples_do_not_meet():
    mixer, u, mask = s4d(), inputs(), jnp.ones((2, 17), bool)
    y = mixer(u, mask)
    np.testing.assert_allclose(y[:, :9], mixer(u.at[:, 9:].add(1.0), mask)[:, :9], atol=1e-5)
    np.testing.assert_allclose(y[1], mixer(u[1:], mask[1:])[0], atol=1e-5)


def test_bidirectional_starts_at_the_last_real_position():
    mixer, u = s4d(bidirectional=True), inputs()
    mask = jnp.arange(17)[None] < jnp.asarray([[7], [17]])
    y = mixer(u, mask)
    np.testing.assert_allclose(y[:1, :7], mixer(u[:1, :7], mask[:1, :7]), atol=1e-5)
    np.testing.assert_allclose(y[:, :7], mixer(u.at[0, 7:].add(1.0), mask)[:, :7], atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"init": "legs", "discretization": "bilinear", "num_ssms": 2}]
)
def test_streaming_equals_the_convolution(options):
    mixer, u = s4d(**options), inputs(length=300)
    state = mixer.init_state(2)
    assert state.shape == (2, 4, 4)
    _, y = jax.lax.scan(mixer.step, state, jnp.swapaxes(u, 0, 1))
    whole = mixer(u, jnp.ones((2, 300), bool))
    np.testing.assert_allclose(jnp.swapaxes(y, 0, 1), whole, atol=2e-5 * np.abs(whole).max())


def test_bidirectional_has_no_recurrent_form():
    with pytest.raises(ValueError, match=r"model\.bidirectional"):
        s4d(bidirectional=True).init_state(1)


def test_bfloat16_input_is_convolved_in_float32():
    mixer, u, mask = s4d(), inputs(length=400), jnp.ones((2, 400), bool)
    y = mixer(u.astype(jnp.bfloat16), mask)
    assert y.dtype == jnp.bfloat16
    exact = mixer(u.astype(jnp.bfloat16).astype(jnp.float32), mask)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)
    state, y_t = mixer.step(mixer.init_state(2), u[:, 0].astype(jnp.bfloat16))
    assert (state.dtype, y_t.dtype) == (jnp.complex64, jnp.bfloat16)


def test_size_of_the_published_speech_model():
    """306K: 6 layers of 128, N 64, n_ssm 2, 35 classes (configs/experiment/sc/s4-sc.yaml)."""

    def build():
        return Backbone(
            lambda **shape: S4D(
                **OPTIONS | {"state_size": 64, "num_ssms": 2, "bidirectional": True}, **shape
            ),
            num_classes=35,
            seq_len=64,
            vocab_size=None,
            depth=6,
            width=128,
            norm="batch",
            norm_position="pre",
            norm_momentum=0.9,
            final_norm=False,
            activation="gelu",
            glu="full",
            mlp="none",
            mlp_ratio=4,
            dropout=0.0,
            pool="mean",
            positions="none",
            rngs=nnx.Rngs(params=jax.random.key(0)),
        )

    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param)))
    assert count == pytest.approx(306_000, rel=0.02)


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
