"""Mamba's block and its selective scan against a plain loop of the paper's equations in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop
from mixer_checks import check_streaming, count_parameters

from models.mamba import Mamba
from models.ops import selective_scan as op

OPTIONS = {
    "state_size": 3,
    "expand": 2,
    "conv_size": 4,
    "dt_rank": None,
    "dt_min": 0.001,
    "dt_max": 0.1,
}
WIDTH = 5


def mamba(width=WIDTH, **options):
    return Mamba(width, 0, **OPTIONS | options, rngs=nnx.Rngs(params=jax.random.key(0)))


def split(mixer, dtype):
    """The mixer's graph and its parameters, moved off their start."""
    graph, params = nnx.split(mixer, nnx.Param)
    keys = nnx.Rngs(noise=1)
    return graph, jax.tree.map(
        lambda x: x.astype(dtype) + 0.1 * jax.random.normal(keys.noise(), x.shape, dtype), params
    )


def inputs(length, dtype="float64", batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, WIDTH)), dtype)


def mamba_by_loop(p, u):
    """Algorithm 2 and figure 3 of the paper, one step at a time; h is (B, E, N)."""
    inner, n = p["a_log"].shape
    rank, taps = len(p["dt_proj"]), len(p["conv_kernel"])
    a = -np.exp(p["a_log"])

    def step(carry, row):
        h, past = carry  # past inputs of the convolution, the latest first
        both = row @ p["in_proj"]
        z, past = both[:, inner:], [both[:, :inner], *past]
        conv = p["conv_bias"] + sum(p["conv_kernel"][taps - 1 - i] * past[i] for i in range(taps))
        x = conv / (1 + np.exp(-conv))
        s = x @ p["x_proj"]
        delta = np.log1p(np.exp(s[:, :rank] @ p["dt_proj"] + p["dt_bias"]))
        b, c = s[:, rank : rank + n], s[:, rank + n :]
        h = np.exp(delta[:, :, None] * a) * h + (delta * x)[:, :, None] * b[:, None, :]
        y = (h * c[:, None, :]).sum(-1) + p["d"] * x
        return (h, past[:-1]), (y * z / (1 + np.exp(-z))) @ p["out_proj"]

    carry, outputs = (np.zeros((len(u), inner, n)), [np.zeros((len(u), inner))] * (taps - 1)), []
    for t in range(u.shape[1]):
        carry, y = step(carry, u[:, t])
        outputs.append(y)
    return np.stack(outputs, axis=1)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize(
    ("length", "options"), [(2, {}), (37, {}), (20, {"conv_size": 1, "dt_rank": 2, "expand": 1})]
)
def test_block_equals_a_loop_in_values_and_gradients(length, options):
    with jax.enable_x64(True):
        graph, params = split(mamba(**options), "float64")
        mixer = nnx.merge(graph, params)
        u = np.asarray(inputs(length))
    real = np.ones(u.shape[:2], bool)
    check_mixer_against_loop(mixer, u, real, mamba_by_loop)
    with jax.enable_x64(True):  # a single step, whose output does not depend on A
        first = mixer(jnp.asarray(u[:, :1]), jnp.asarray(real[:, :1]))
    expected = mamba_by_loop(jax.device_get(nnx.to_pure_dict(params)), u[:, :1])
    np.testing.assert_allclose(first, expected, rtol=1e-10, atol=1e-12)


def test_scan_over_chunks_takes_the_state_along():
    """37 steps make a chunk of 32 and a padded one."""
    rng = np.random.default_rng(0)
    u, delta = (jnp.asarray(rng.uniform(0.1, 1, (2, 37, 3)), jnp.float32) for _ in "ud")
    b, c = (jnp.asarray(rng.normal(size=(2, 37, 4)), jnp.float32) for _ in "bc")
    a = -jnp.asarray(rng.uniform(0.01, 0.1, (3, 4)), jnp.float32)
    assert op.chunk_length(37, 24) == 32
    y = op.selective_scan(u, delta, a, b, c)
    h, steps = np.zeros((2, 3, 4)), []
    u, delta, a, b, c = (np.asarray(x, np.float64) for x in (u, delta, a, b, c))
    for t in range(37):
        h = np.exp(delta[:, t, :, None] * a) * h + (delta * u)[:, t, :, None] * b[:, t, None]
        steps.append((h * c[:, t, None]).sum(-1))
    np.testing.assert_allclose(y, np.stack(steps, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [op._by_steps, op._by_levels])
@pytest.mark.parametrize("reverse", [False, True])
def test_both_forms_of_the_recurrence_equal_a_loop(by, reverse):
    rng = np.random.default_rng(0)
    decay, drive = rng.uniform(0.5, 1, (9, 2, 3)), rng.normal(size=(9, 2, 3))
    h, states = np.zeros((2, 3)), []
    for t in range(9)[:: -1 if reverse else 1]:
        h = decay[t] * h + drive[t]
        states.append(h)
    found = by(jnp.asarray(decay, jnp.float32), jnp.asarray(drive, jnp.float32), reverse)
    np.testing.assert_allclose(
        found, np.stack(states)[:: -1 if reverse else 1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_the_recurrence_is_that_of_autodiff(reverse):
    rng = np.random.default_rng(0)
    decay, drive, w = (jnp.asarray(rng.uniform(0.2, 1, (9, 2)), jnp.float32) for _ in range(3))

    def loss(states):
        return lambda decay, drive: (w * states(decay, drive, reverse) ** 2).sum()

    found = jax.grad(loss(op.varying_recurrence), argnums=(0, 1))(decay, drive)
    expected = jax.grad(loss(op._by_levels), argnums=(0, 1))(decay, drive)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def largest(jaxpr):
    """Numbers in the largest array that a program makes, in its loops too."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    inner = [
        sub
        for eqn in jaxpr.eqns
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)
    ]
    return max(
        sizes + [largest(getattr(sub, "jaxpr", sub)) for sub in inner if is_program(sub)], default=0
    )


def is_program(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def test_neither_pass_holds_the_states_of_the_whole_sequence():
    batch, length, channels, n = 2, 4096, 8, 16
    shapes = [(batch, length, channels)] * 2 + [(channels, n)] + [(batch, length, n)] * 2
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.make_jaxpr(
        jax.grad(lambda *a: op.selective_scan(*a).sum(), argnums=(0, 1, 2, 3, 4))
    )(*args)
    states = batch * length * channels * n
    chunk = batch * op.chunk_length(length, batch * channels * n) * channels * n
    assert chunk <= largest(program.jaxpr) < states / 4


@pytest.mark.parametrize(
    ("length", "states", "size"), [(1, 10, 1), (100, 10, 64), (9999, 10, 256), (9999, 2**30, 16)]
)
def test_chunks_fit_the_room(length, states, size):
    assert op.chunk_length(length, states) == size


@pytest.mark.slow
def test_bfloat16_inputs_give_bfloat16_outputs_near_float32():
    graph, params = split(mamba(), "float32")
    mixer = nnx.merge(graph, params)
    u = inputs(300, "float32")
    mask = jnp.ones(u.shape[:2], bool)
    y, low = mixer(u, mask), mixer(u.astype(jnp.bfloat16), mask)
    assert low.dtype == jnp.bfloat16
    assert np.abs(low.astype(jnp.float32) - y).max() < 0.03 * np.abs(y).max()
    state, out = mixer.step(mixer.init_state(2), u[:, 0].astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_starts_as_the_paper_says():
    mixer = mamba(width=200, state_size=4)
    np.testing.assert_allclose(
        mixer.a(jnp.float32), np.tile([-1.0, -2, -3, -4], (400, 1)), rtol=1e-6
    )
    dt = np.log1p(np.exp(mixer.dt_bias[...]))
    assert 0.001 <= dt.min() < 0.0012
    assert 0.085 < dt.max() <= 0.1001
    assert np.log(dt).mean() == pytest.approx(np.log(0.01), abs=0.15)
    assert (mixer.d[...] == 1).all()
    assert mixer.rank == 13  # ceil(200 / 16)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"state_size": 0}, "model.state_size=0"),
        ({"conv_size": 0}, "model.conv_size=0"),
        ({"dt_rank": 0}, "model.dt_rank=0"),
        ({"expand": 1.5}, "model.expand=1.5"),
        ({"expand": 0}, "model.expand=0"),
        ({"dt_min": 0.2}, "model.dt_min=0.2"),
        ({"dt_min": 0.0}, "model.dt_min=0.0"),
    ],
)
def test_bad_sizes_name_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        mamba(**options)


def test_streaming_equals_parallel():
    check_streaming(nnx.merge(*split(mamba(), "float32")), inputs(40, "float32"))


def test_mamba_130m_has_its_published_size():
    """mamba-130m, 24 layers of 768 with a tied head, has 129,135,360 parameters."""
    around = {"norm": "rms", "final_norm": True, "activation": "none", "glu": "none"}
    sizes = {"num_classes": 2, "seq_len": 8, "vocab_size": 50280, "depth": 24, "width": 768}
    count = count_parameters(partial(Mamba, **OPTIONS | {"state_size": 16}), **sizes, **around)
    assert count - (768 * 2 + 2) == 129_135_360  # without our head
