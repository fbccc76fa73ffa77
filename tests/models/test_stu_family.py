"""The STU family against float64 loops, the published code, its theorem and its streaming form."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop
from stu_loop import stu_by_loop

import lra
from lra.config.build import build_task, model_builder
from models.ops.filters import spectral_filters
from models.ops.stu import feature_moments, inverse_power, stu
from models.stu import STU
from models.stu_t import TensorizedSTU

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTH, LENGTH, REAL = 3, 14, 9  # padded to LENGTH

COMMON = {"num_filters": 5, "filters": "hankel", "negative_filters": True, "bidirectional": False}
PAPER = {"k_u": 3, "k_y": None, "init_m_u": "zeros"}
MODELS = {
    "stu": (STU, PAPER),
    "ar_stu": (STU, PAPER | {"k_y": 4, "k_u": 2}),
    "stu_official": (
        STU,
        PAPER | {"k_y": 2, "negative_filters": False, "init_m_u": "truncated_normal"},
    ),
    "stu_preconditioned": (STU, PAPER | {"precondition": 0.5}),
    "ar_stu_preconditioned": (
        STU,
        PAPER | {"k_y": 2, "negative_filters": False} | {"precondition": 0.25},
    ),
    "stu_alternative": (STU, PAPER | {"filters": "alternative", "negative_filters": False}),
    "stu_bidirectional": (STU, PAPER | {"bidirectional": True}),
    "stu_no_feedback": (STU, PAPER | {"feedback": "none"}),
    "stu_lag1": (STU, PAPER | {"feedback": "lag1", "feedback_scale": 0.9}),
    "stu_lag2": (STU, PAPER | {"feedback": "lag2", "feedback_scale": 0.9}),
    "stu_lag1_bidirectional": (STU, PAPER | {"feedback": "lag1", "bidirectional": True}),
    "stu_equation_5": (STU, PAPER | {"feedback": "learned_lag2"}),
    "stu_equation_5_bidirectional": (
        STU,
        PAPER | {"feedback": "learned_lag2", "bidirectional": True},
    ),
    "ar_stu_bidirectional": (STU, PAPER | {"k_y": 2, "bidirectional": True}),
    "stu_t": (TensorizedSTU, {}),
    "stu_t_positive": (TensorizedSTU, {"negative_filters": False}),
    "stu_t_bidirectional": (
        TensorizedSTU,
        {"filters": "alternative", "negative_filters": False, "bidirectional": True},
    ),
}
# lag and fixed factor of the identity; a model that is not listed has one of equation (4) and (6)
FIXED = {"stu_no_feedback": (1, 0.0), "stu_lag1": (1, 0.9), "stu_lag2": (2, 0.9)}
FIXED |= {"stu_lag1_bidirectional": (1, 1.0)}
CAUSAL = [name for name in MODELS if "bidirectional" not in name]


def mixer(name, width=WIDTH, seq_len=LENGTH, **options):
    """A model of the family whose parameters are all away from zero."""
    make, own = MODELS[name]
    made = make(width, seq_len, **COMMON | own | options, rngs=nnx.Rngs(params=jax.random.key(0)))
    rng = np.random.default_rng(0)
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype) / (3 * width), params
    )
    return nnx.merge(graph, params, rest)


def eigenpairs(kind, length, num):
    """Filters by `eigh`, good enough for few of them at this length."""
    n = np.add.outer(np.arange(1.0, length + 1), np.arange(1, length + 1))
    z = 2 / (n**3 - n) if kind == "hankel" else ((-1) ** n + 1) * 8 / ((n + 3) * (n - 1) * (n + 1))
    sigma, phi = (x[..., ::-1][..., :num] for x in np.linalg.eigh(z))
    first = [column[np.abs(column) > 1e-9][0] for column in phi[:2].T]
    return sigma, phi * np.sign(first)


def stu_t_by_loop(u, phi, sigma, m_in, m_filters, negative):
    """The sum over filters with the full matrices M_k[i, o] = m_in[i, o] m_filters[k, o]."""
    y = np.zeros_like(u)
    for t in range(u.shape[1]):
        for k in range(len(sigma)):
            m_k = m_in * m_filters[k][None]
            for i in range(t + 1):
                sign = 1 + (-1) ** i * negative
                y[:, t] += sign * sigma[k] ** 0.25 * phi[i, k] * u[:, t - i] @ m_k
    return y


def preconditioned(p, phi, sigma, options):
    """The parameters with C^(-p) applied to those of the features."""
    names = ["m_plus", "m_minus", "m_u"] if options["negative_filters"] else ["m_plus", "m_u"]
    moments = feature_moments(
        phi, sigma, options["k_u"], options["negative_filters"], float(options["k_y"] is None), 2
    )
    mixed = np.tensordot(
        inverse_power(moments, options["precondition"]),
        np.concatenate([p[name] for name in names]),
        1,
    )
    parts = np.split(mixed, np.cumsum([len(p[name]) for name in names])[:-1])
    return p | dict(zip(names, parts, strict=True))


def by_loop(name, params, u, lengths):
    make, own = MODELS[name]
    options = COMMON | own
    sigma, phi = eigenpairs(options["filters"], u.shape[1], options["num_filters"])

    def one_direction(p, u):
        if make is STU:
            p = preconditioned(p, phi, sigma, options) if "precondition" in options else p
            lag, alpha = FIXED.get(name, (2 if options["k_y"] is None else 1, 1.0))
            matrices = p["m_u"], p["m_plus"], p.get("m_minus"), p.get("m_y", alpha)
            return stu_by_loop(u, phi, sigma, *matrices, lag=lag)
        return stu_t_by_loop(u, phi, sigma, p["m_in"], p["m_filters"], options["negative_filters"])

    y = np.zeros_like(u)
    for row, n in enumerate(lengths):
        real = u[row : row + 1, :n]
        y[row, :n] = one_direction(params, real)[0]
        if options["bidirectional"]:
            y[row, :n] += one_direction(params["anticausal"], real[:, ::-1])[0, ::-1]
    return y


@pytest.mark.fast_variants(7)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_equal_a_loop(name):
    u = np.random.default_rng(1).normal(size=(2, LENGTH, WIDTH))
    lengths = (LENGTH, REAL)
    real = np.arange(LENGTH) < np.array(lengths)[:, None]
    with jax.enable_x64(True):
        made = mixer(name)
    check_mixer_against_loop(made, u, real, lambda p, u: by_loop(name, p, u, lengths))


@pytest.mark.parametrize("name", ["small", "long", "ky5"])
def test_official_model_equals_published_code(name):
    data = np.load(GOLDEN / f"stu_official_{name}.npz")
    (batch, length, width), num = data["u"].shape, len(data["sigma"])
    k_u, k_y = data["m_u"].shape[2], data["m_y"].shape[1]
    made = mixer("stu_official", width, length, num_filters=num, k_u=k_u, k_y=k_y)
    # Filters that are eigenvectors to the same matrix may have the other sign; there they are in
    # ascending order.
    sign = np.sign((data["phi"][:, ::-1] * np.asarray(made.phi[...])).sum(0))
    made.m_plus[...] = jnp.asarray(
        sign[:, None, None] * data["m_phi"].reshape(num, width, width)[::-1], jnp.float32
    )
    made.m_u[...] = jnp.asarray(data["m_u"].transpose(2, 1, 0), jnp.float32)
    made.m_y[...] = jnp.asarray(data["m_y"].transpose(1, 2, 0), jnp.float32)
    u, mask = jnp.asarray(data["u"], jnp.float32), jnp.ones((batch, length), bool)
    y = nnx.jit(lambda m, *x: m(*x))(made, u, mask)
    np.testing.assert_allclose(y, data["y"], atol=1e-4 * np.abs(data["y"]).max())


def test_matrices_start_as_in_the_paper_and_as_in_its_code():
    for init in ("zeros", "truncated_normal"):
        options = COMMON | PAPER | {"k_y": 2, "init_m_u": init}
        made = STU(64, LENGTH, **options, rngs=nnx.Rngs(params=jax.random.key(0)))
        for name in ("m_plus", "m_minus", "m_y"):
            assert np.abs(getattr(made, name)[...]).max() == 0
        m_u = np.asarray(made.m_u[...])
        if init == "zeros":
            assert np.abs(m_u).max() == 0
        else:  # a normal cut at 2 deviations has a deviation of 0.8796
            assert m_u.std() == pytest.approx(0.8796 / 8, rel=0.02)
            assert 1.95 / 8 < np.abs(m_u).max() <= 2 / 8


def test_matrices_of_the_filters_can_start_as_in_flash_stu():
    """PyTorch's `xavier_normal_` of a (K, D, D) tensor."""
    made = STU(
        64,
        100,
        **COMMON | PAPER | {"num_filters": 24, "init_m_phi": "xavier_normal"},
        rngs=nnx.Rngs(params=jax.random.key(0)),
    )
    plus, minus = np.asarray(made.m_plus[...]), np.asarray(made.m_minus[...])
    for matrices in (plus, minus):
        assert matrices.std() == pytest.approx((2 / (64 * 64 + 24 * 64)) ** 0.5, rel=0.02)
    assert np.abs(plus - minus).max() > 0
    assert np.abs(made.m_u[...]).max() == 0


def test_k_y_alone_chooses_between_equations_4_and_6():
    """As in records and commands that are older than `model.feedback`."""
    for k_y, feedback in ((None, "lag2"), (2, "learned")):
        old, new = mixer("stu", k_y=k_y), mixer("stu", k_y=k_y, feedback=feedback)
        assert nnx.graphdef(old) == nnx.graphdef(new)


def test_tensorised_matrices_start_as_in_flash_stu():
    made = TensorizedSTU(
        300, 100, **COMMON | {"num_filters": 24}, rngs=nnx.Rngs(params=jax.random.key(0))
    )
    assert np.asarray(made.m_in[...]).std() == pytest.approx((2 / 600) ** 0.5, rel=0.02)
    assert np.asarray(made.m_filters[...]).std() == pytest.approx((2 / 324) ** 0.5, rel=0.03)


@pytest.mark.fast_variants(5)
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-9), (False, 2e-5)])
def test_streaming_equals_parallel(name, double, tolerance):
    """With K = 24; the float64 bound is the error of the alternative filters' recurrence."""
    length = 600
    u = np.random.default_rng(2).normal(size=(2, length, WIDTH))
    with jax.enable_x64(double):
        made = mixer(name, seq_len=length, num_filters=24)
        u = jnp.asarray(u)
        parallel = nnx.jit(lambda m, u: m(u, jnp.ones((2, length), bool)))(made, u)
        graph, variables = nnx.split(made)

        def step(state, u_t):
            return nnx.merge(graph, variables).step(state, u_t)

        streamed = jax.jit(lambda s, u: jax.lax.scan(step, s, u)[1])(
            made.init_state(2), jnp.swapaxes(u, 0, 1)
        )
        streamed, parallel = jax.device_get((jnp.swapaxes(streamed, 0, 1), parallel))
    assert streamed.dtype == parallel.dtype == (np.float64 if double else np.float32)
    assert np.abs(streamed - parallel).max() < tolerance * np.abs(parallel).max()


@pytest.mark.parametrize("name", CAUSAL)
def test_state_is_no_larger_for_long_sequences(name):
    def size(seq_len):
        return sum(
            x.size
            for x in jax.tree.leaves(mixer(name, seq_len=seq_len, num_filters=24).init_state(2))
        )

    assert size(300) <= size(2048) <= 2 * WIDTH * (2 * (24 + 24) + 2 + 2 + 2)


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("name", CAUSAL)
def test_step_keeps_float32_states_and_the_dtype_of_its_input(name):
    made = mixer(name)
    state = made.init_state(2)
    u_t = jnp.ones((2, WIDTH), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        new, y = made.step(state, u_t)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(new))
    np.testing.assert_allclose(
        np.asarray(y, np.float32), made.step(state, u_t.astype(jnp.float32))[1], atol=0.02
    )


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_inputs_lose_no_more_than_rounding(name):
    made, mask = mixer(name), jnp.ones((2, LENGTH), bool)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, LENGTH, WIDTH)), jnp.bfloat16)
    apply = nnx.jit(lambda m, *x: m(*x))
    y, exact = apply(made, x, mask), apply(made, x.astype(jnp.float32), mask)
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, np.float32) - exact).max() < 2**-6 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("stu", {"num_filters": LENGTH + 1}, "model.num_filters"),
        ("stu", {"num_filters": 0}, "model.num_filters"),
        ("stu", {"k_u": 0}, "model.k_u=0 must be at least 1"),
        ("stu", {"k_y": 0}, "model.k_y=0 must be at least 1; null is equation (4)"),
        (
            "stu",
            {"k_u": LENGTH + 1},
            f"model.k_u={LENGTH + 1} and model.k_y=null reach further back",
        ),
        ("stu", {"k_y": LENGTH}, f"model.k_u=3 and model.k_y={LENGTH} reach further back"),
        ("stu", {"filters": "legendre"}, "model.filters"),
        ("stu", {"filters": "alternative"}, "model.negative_filters"),
        ("stu", {"init_m_u": "ones"}, "model.init_m_u"),
        ("stu", {"init_m_phi": "ones"}, "model.init_m_phi"),
        ("stu", {"feedback": "lag3"}, "model.feedback=lag3"),
        ("stu", {"feedback": "learned"}, "model.k_y=null: learned needs k_y"),
        ("stu", {"feedback": "lag2", "k_y": 2}, "model.k_y=2: learned needs k_y"),
        ("stu", {"feedback": "learned_lag2", "feedback_scale": 0.9}, "model.feedback_scale=0.9"),
        ("stu", {"feedback": "lag1", "feedback_scale": 1.1}, "model.feedback_scale=1.1"),
        ("stu_t", {"num_filters": LENGTH + 1}, "model.num_filters"),
        ("stu_t", {"filters": "legendre"}, "model.filters"),
        ("stu_t", {"filters": "alternative"}, "model.negative_filters"),
    ],
)
def test_bad_options_name_their_key(name, options, key):
    with pytest.raises(ValueError, match=re.escape(key)):
        mixer(name, **options)


def test_official_model_has_the_parameters_of_the_published_code():
    """Embedding, six times [batch norm, m_y, m_u, m_phi, linear to 2 D], head."""
    cfg = lra.compose(["task=scifar", "model=stu_official", "backbone.width=256"])
    made = nnx.eval_shape(
        lambda: model_builder(cfg, build_task(cfg))(rngs=nnx.Rngs(params=jax.random.key(0)))
    )
    d, k = 256, 24
    layer = 2 * d + d * 2 * d + d * d * 3 + k * d * d + (d * 2 * d + 2 * d)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(made, nnx.Param)))
    assert count == (3 * d + d) + 6 * layer + (d * 10 + 10) == 12_199_434


# Printed in appendix E.1 of the paper; A = diag(-.9999, .9999, -.9999, .9999).
LDS_A = np.array([-0.9999, 0.9999, -0.9999, 0.9999])
LDS_B = np.array(
    [
        [0.36858183, -0.34219486, 0.1407376],
        [0.18933886, -0.1243964, 0.21866894],
        [0.14593862, -0.5791096, -0.06816235],
        [-0.3095346, -0.21441863, 0.08696061],
    ]
)
LDS_C = np.array(
    [
        [0.5528727, -0.51329225, 0.21110639, 0.2840083],
        [-0.18659459, 0.3280034, 0.21890792, -0.8686644],
        [-0.10224352, -0.46430188, -0.32162794, 0.1304409],
    ]
)
LDS_D = np.array([1.5905786, -0.45901108, 0.3238576])


def marginally_stable_system(num_sequences, length):
    """Normal inputs and the outputs of the paper's system, whose memory is ten times L."""
    u = np.random.default_rng(0).normal(size=(num_sequences, length, 3))
    h, y = np.zeros((num_sequences, 4)), np.zeros_like(u)
    for t in range(length):
        h = h * LDS_A + u[:, t] @ LDS_B.T
        y[:, t] = h @ LDS_C.T + u[:, t] * LDS_D
    return u, y


@pytest.mark.slow
def test_theorem_3_1_on_the_papers_system():
    """Equation (4) fits any symmetric system, with an error that falls exponentially in K.

    The prediction is linear in the matrices: least squares on what each entry of them contributes
        to y, that is features
    summed over every second step. Then the model itself, given the matrices found, has to err no
    more.
    """
    length, error = 1000, {}
    u, y = marginally_stable_system(9, length)
    energy = np.sum(y[8] ** 2)
    for num in (5, 10, 15, 20, 25):
        sigma, phi = spectral_filters(length, num)
        weighted = phi * sigma**0.25
        both = np.concatenate(
            [weighted, weighted * (-1.0) ** np.arange(length)[:, None]], axis=1
        )  # (L, 2K)
        spectra = (
            np.fft.rfft(u, 2 * length, axis=1)[:, :, None]
            * np.fft.rfft(both, 2 * length, axis=0)[None, :, :, None]
        )
        filtered = np.fft.irfft(spectra, 2 * length, axis=1)[:, : length - 2].reshape(
            9, length - 2, -1
        )
        columns = [np.pad(u[:, : length - i], ((0, 0), (i, 0), (0, 0))) for i in range(3)]
        columns.append(np.pad(filtered, ((0, 0), (2, 0), (0, 0))))
        x = (
            np.concatenate(columns, axis=-1)
            .reshape(9, length // 2, 2, -1)
            .cumsum(axis=1)
            .reshape(9, length, -1)
        )
        found = np.linalg.lstsq(
            x[:8].reshape(8 * length, -1), y[:8].reshape(8 * length, 3), rcond=1e-15
        )[0]
        error[num] = np.sum((x[8] @ found - y[8]) ** 2) / energy

        m_u, m_plus, m_minus = np.split(found.reshape(-1, 3, 3), [3, 3 + num])
        with jax.enable_x64(True):
            arrays = [jnp.asarray(a) for a in (u[8:], phi, sigma, m_u, m_plus, m_minus)]
            predicted = np.asarray(stu(*arrays, m_y=1.0, lag=2))
        assert np.sum((predicted[0] - y[8]) ** 2) / energy < 2 * error[num] + 1e-14
    assert error[5] < 1e-2
    assert error[10] < error[5] / 30
    assert error[15] < error[10] / 30
    assert error[20] < min(error[15] / 30, 1e-9)
    assert error[25] < error[20] / 30
