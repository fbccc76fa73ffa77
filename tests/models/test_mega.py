"""Mega against a float64 loop over the paper's equations, and its numerics."""

from decimal import Decimal, getcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_against_loop
from mixer_checks import count_parameters
from scipy.special import erf

from models import mega as module
from models.backbone import Block
from models.mega import Mega, ema_kernel, laplace, log_decay, toeplitz

OPTIONS = {"state_size": 3, "attention_size": 3, "expand": 2, "attention": "softmax"}
OPTIONS |= {"bidirectional": True, "chunk_size": 4, "dropout": 0.0}
LENGTH, WIDTH = 11, 4
REAL = (11, 6)  # the second sequence has a chunk of 4, one of 2 real positions, and one of none


def mega(width=WIDTH, **options):
    return Mega(width, LENGTH, **OPTIONS | options, rngs=nnx.Rngs(params=jax.random.key(0)))


def moved(mixer, dtype="float32", scale=0.5):
    """The mixer's graph and its parameters, far enough off their start that every part counts."""
    graph, params = nnx.split(mixer, nnx.Param)
    keys = nnx.Rngs(noise=1)
    return graph, jax.tree.map(
        lambda x: x.astype(dtype) + scale * jax.random.normal(keys.noise(), x.shape, dtype), params
    )


def inputs(dtype="float32", seed=0):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, LENGTH, WIDTH)), dtype)
    return x, jnp.arange(LENGTH)[None] < jnp.asarray(REAL)[:, None]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def average_by_loop(p, x):
    """silu(sum_s k1[t - s] x_s + sum_s k2[s - t] x_s + omega x_t) for one sequence.

    The first sum is over s <= t, the second over s >= t: both kernels weigh the present, as in
    `exponential_moving_average.py` of facebookresearch/mega. k[l] = sum_n p beta q^l eta / sqrt(N)
    with p = sigmoid(alpha) and q = 1 - p sigmoid(delta).
    """
    alpha, delta, x = sigmoid(p["alpha"]), sigmoid(p["delta"]), np.asarray(x)
    lags = np.arange(len(x))
    gain = alpha * p["beta"] * p["eta"] / np.sqrt(alpha.shape[2])
    kernels = (gain[..., None] * (1 - alpha * delta)[..., None] ** lags).sum(2)  # (1 or 2, D, L)
    y = np.asarray(p["omega"]) * x
    for t in lags:
        for s in range(t + 1):
            y[t] += kernels[0, :, t - s] * x[s]
        for s in range(t, len(x)) if len(kernels) == 2 else ():
            y[t] += kernels[1, :, s - t] * x[s]
    return silu(y)


def mega_by_loop(p, x, residual, *, attention, causal, chunk):
    """Equations (7) to (14) for one sequence of real positions, one query at a time; Y - X."""
    d, values, z = x.shape[1], p["value_kernel"].shape[1], p["kappa"].shape[1]
    ema = average_by_loop(p["average"], x)
    gates = ema @ p["gate_kernel"] + p["gate_bias"]
    phi, shared = sigmoid(gates[:, :d]), silu(gates[:, d : d + z])
    gamma, candidate = silu(gates[:, d + z : d + z + values]), gates[:, d + z + values :]
    q, k = shared * p["kappa"][0] + p["mu"][0], shared * p["kappa"][1] + p["mu"][1]
    v = silu(x @ p["value_kernel"] + p["value_bias"])
    centre = len(p["rel_bias"]) // 2  # the bias of distance 0
    out = []
    for i in range(len(x)):
        first = i // chunk * chunk
        seen = range(first, i + 1) if causal else range(first, min(first + chunk, len(x)))
        bias = np.stack([p["rel_bias"][centre + j - i] for j in seen])
        products = np.stack([q[i] @ k[j] for j in seen])
        if attention == "softmax":
            weights = np.exp(products / np.sqrt(z) + bias)
            weights = weights / weights.sum()
        elif attention == "laplace":
            standard = (products / len(seen) + bias - np.sqrt(0.5)) / np.sqrt(1 / (4 * np.pi))
            weights = 0.5 * (1 + erf(standard / np.sqrt(2.0)))
        else:
            weights = np.maximum(products / len(seen) + bias, 0) ** 2
        o = sum(w * v[j] for w, j in zip(weights, seen, strict=True))
        h = silu(candidate[i] + (gamma[i] * o) @ p["output_kernel"] + p["output_bias"])
        out.append(phi[i] * h + (1 - phi[i]) * residual[i] - residual[i])
    return np.stack(out)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    ("attention", "bidirectional", "chunk_size"),
    [
        ("softmax", True, 4),
        ("softmax", False, 4),
        ("softmax", True, None),
        ("laplace", True, 4),
        ("laplace", False, None),
        ("relu2", True, 4),
    ],
)
def test_block_equals_a_loop_in_values_and_gradients(attention, bidirectional, chunk_size):
    with jax.enable_x64(True):
        mixer = mega(attention=attention, bidirectional=bidirectional, chunk_size=chunk_size)
        graph, params = moved(mixer, "float64")
        x, mask = inputs("float64")
        residual, weights = inputs("float64", 1)[0], inputs("float64", 2)[0] * mask[..., None]
    how = {"attention": attention, "causal": not bidirectional, "chunk": chunk_size or LENGTH}

    def loop(a):
        y = np.zeros_like(a["x"])
        for i, n in enumerate(REAL):
            y[i, :n] = mega_by_loop(a["params"], a["x"][i, :n], a["residual"][i, :n], **how)
        return y

    check_against_loop(
        lambda a: nnx.merge(graph, a["params"])(a["x"], mask, residual=a["residual"]),
        loop,
        {"params": nnx.to_pure_dict(params), "x": x, "residual": residual},
        np.asarray(weights),
    )


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["softmax", "laplace"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_blocks_of_queries_change_nothing(bidirectional, attention, monkeypatch):
    """11 queries in blocks of 4, the last one padded, against all at once."""
    graph, params = moved(mega(bidirectional=bidirectional, attention=attention, chunk_size=None))
    x, mask = inputs()

    def loss(params):
        return (nnx.merge(graph, params)(x, mask)[:, :6] ** 2).sum()

    whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(module, "_ROWS", 4)
    blocks = jax.jit(jax.value_and_grad(loss))(params)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(blocks), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
def test_streaming_equals_parallel(attention):
    graph, params = moved(mega(bidirectional=False, attention=attention))
    mixer = nnx.merge(graph, params)
    x, _ = inputs()
    residual = inputs(seed=1)[0]
    y = mixer(x, jnp.ones(x.shape[:2], bool), residual=residual)
    state = mixer.init_state(2)
    assert [a.shape for a in jax.tree.leaves(state)] == [(2, 4, 3), (2, 4, 3), (2, 4, 8), ()]
    # a scan refuses a state that grows
    rows = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(residual, 1, 0))
    _, outputs = jax.lax.scan(lambda state, row: mixer.step(state, *row), state, rows)
    np.testing.assert_allclose(jnp.moveaxis(outputs, 0, 1), y, atol=1e-5)


def test_streaming_is_refused_without_chunks():
    with pytest.raises(ValueError, match=r"model\.chunk_size"):
        mega(bidirectional=False, chunk_size=None).init_state(1)


@pytest.mark.slow
def test_bfloat16_inputs_give_bfloat16_outputs_near_float32():
    graph, params = moved(mega(bidirectional=False), scale=0.2)
    mixer = nnx.merge(graph, params)
    x, mask = inputs()
    y, low = mixer(x, mask), mixer(x.astype(jnp.bfloat16), mask)
    assert low.dtype == jnp.bfloat16
    assert np.abs(low.astype(jnp.float32) - y).max() < 0.03 * np.abs(y).max()
    state, out = mixer.step(mixer.init_state(2), x[:, 0].astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert {a.dtype for a in state[:3]} == {jnp.dtype("float32")}


LOGITS = (-30.0, -8.0, -1.0, 0.0, 1.0, 8.0, 20.0, 60.0)


def test_decay_is_accurate_where_it_rounds_to_0_or_1():
    """float32 against 60 digits, over logits at which 1 - alpha delta is 1 - 1e-26 or 1e-26."""
    getcontext().prec = 60
    alpha, delta = (jnp.asarray(a.ravel(), jnp.float32) for a in np.meshgrid(LOGITS, LOGITS))
    found = log_decay(alpha, delta)
    product = [
        1 / ((1 + (-Decimal(float(a))).exp()) * (1 + (-Decimal(float(d))).exp()))
        for a, d in zip(alpha, delta, strict=True)
    ]
    np.testing.assert_allclose(found, [float((1 - p).ln()) for p in product], rtol=2e-6)
    for which in (0, 1):
        slope = jax.vmap(jax.grad(log_decay, argnums=which))(alpha, delta)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("length", [1, 2, 3, 64, 1000])
def test_kernel_is_the_sum_of_powers(length):
    rng = np.random.default_rng(0)
    alpha, delta, beta, eta = (rng.normal(size=(2, 3, 5)) for _ in range(4))
    a, d = 1 / (1 + np.exp(-alpha)), 1 / (1 + np.exp(-delta))
    powers = (1 - a * d)[..., None] ** np.arange(length)
    expected = ((a * beta * eta)[..., None] * powers).sum(2) / np.sqrt(5)
    found = ema_kernel(*(jnp.asarray(x, jnp.float32) for x in (alpha, delta, beta, eta)), length)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_laplace_meets_squared_relu_in_value_and_slope():
    at = jnp.sqrt(0.5)
    assert float(laplace(at)) == pytest.approx(0.5, abs=1e-6)
    assert float(jax.grad(laplace)(at)) == pytest.approx(
        float(jax.grad(lambda x: x**2)(at)), abs=1e-6
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 1), (3, 5), (6, 2)])
def test_toeplitz_matrix(rows, columns):
    diagonals = np.arange(rows + columns - 1.0)
    expected = [[diagonals[rows - 1 + j - i] for j in range(columns)] for i in range(rows)]
    np.testing.assert_array_equal(
        toeplitz(jnp.asarray(diagonals, jnp.float32), rows, columns), expected
    )


AROUND = {
    "norm_momentum": 0.9,
    "activation": "none",
    "glu": "none",
    "mlp": "none",
    "mlp_ratio": 2,
    "dropout": 0.0,
}


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_block_mixes_with_the_stream_and_not_with_its_normalised_copy(norm_position):
    """Equation (14): Y = phi H + (1 - phi) X, where H alone sees the norm of a pre-norm block."""
    graph, params = moved(mega())
    mixer = nnx.merge(graph, params)
    block = Block(
        mixer,
        width=WIDTH,
        norm="layer",
        norm_position=norm_position,
        **AROUND,
        rngs=nnx.Rngs(params=0),
    )
    x, mask = inputs()
    x = 3 * x + 1
    normed = block.norm(x, mask, train=False)
    p = nnx.to_pure_dict(params)
    y = block(x, mask, train=False, rngs=None)[0]
    seen = normed if norm_position == "pre" else x
    expected = x[0] + mega_by_loop(p, seen[0], x[0], attention="softmax", causal=False, chunk=4)
    if norm_position == "post":
        expected = block.norm(expected[None], mask[:1], train=False)[0]
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("option", [{"activation": "gelu"}, {"glu": "full"}])
def test_a_second_gate_around_the_block_is_refused(option):
    with pytest.raises(ValueError, match=r"backbone\.activation=.*backbone\.glu="):
        Block(
            mega(),
            width=WIDTH,
            norm="none",
            norm_position="pre",
            **AROUND | option,
            rngs=nnx.Rngs(params=0),
        )


def test_dropout_acts_in_training_alone():
    graph, params = moved(mega(dropout=0.5))
    mixer, (x, mask) = nnx.merge(graph, params), inputs()
    first, again, other = (
        mixer(x, mask, train=True, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    still = nnx.merge(moved(mega())[0], params)
    np.testing.assert_array_equal(mixer(x, mask), still(x, mask))


def published_size(depth, d, v, z, n, chunk, classes):
    """Parameters of facebookresearch/mega's model with batch norm on values, tensor by tensor.

    The last layer has biases here, and none there.
    """
    average = 4 * (2 * d * n) + d
    attention = (
        (d * v + v) + (d * (2 * d + z + v) + 2 * d + z + v) + (v * d + d) + 4 * z + 2 * chunk - 1
    )
    feed_forward = (d * v + v) + (v * d + d)
    head = (d * 2 * d + 2 * d) + (2 * d * classes + classes)
    return depth * (average + attention + feed_forward + 2 * 2 * d) + 2 * d + 2 * d + head


@pytest.mark.parametrize(
    ("depth", "d", "z", "chunk", "seq_len"),
    [(8, 160, 96, 128, 1024), (4, 64, 32, 4096, 16384), (6, 72, 36, 1000, 16000)],
)
def test_size_is_the_published_codes(depth, d, z, chunk, seq_len):
    """Image and Path-X of Long Range Arena, and the large model for raw speech."""
    options = OPTIONS | {"state_size": 16, "attention_size": z, "chunk_size": chunk}
    sizes = {"num_classes": 10, "seq_len": seq_len, "depth": depth, "width": d}
    around = AROUND | {"final_norm": True, "mlp": "silu", "head": "mlp"}
    count = count_parameters(partial(Mega, **options), **sizes, **around)
    assert count == published_size(depth, d, 2 * d, z, 16, chunk, 10)


def test_large_speech_model_has_its_published_size():
    assert published_size(6, 72, 144, 36, 16, 1000, 10) == pytest.approx(476_000, rel=0.002)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"state_size": 0}, "model.state_size=0"),
        ({"attention_size": 0}, "model.attention_size=0"),
        ({"chunk_size": 0}, "model.chunk_size=0"),
        ({"expand": 1.3}, "model.expand=1.3"),
        ({"attention": "linear"}, "model.attention=linear"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
    ],
)
def test_bad_sizes_name_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        mega(**options)
