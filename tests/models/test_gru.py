"""GRU against a float64 loop over the paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop
from mixer_checks import check_bfloat16, check_streaming

from models.gru import GRU

PARAMETERS = (
    "input_kernel",
    "input_bias",
    "recurrent_kernel",
    "candidate_bias",
    "output_kernel",
    "output_bias",
)


def gru(width=4, state_size=3, bidirectional=False):
    mixer = GRU(
        width,
        0,
        state_size=state_size,
        bidirectional=bidirectional,
        rngs=nnx.Rngs(params=jax.random.key(0)),
    )
    for name in PARAMETERS:  # off the start, where the biases are 0
        parameter = getattr(mixer, name)
        parameter[...] = parameter[...] + 0.3 * jax.random.normal(
            jax.random.key(len(name)), parameter.shape
        )
    return mixer


def inputs(batch=2, length=9, width=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, width)), jnp.float32)


def by_loop(p, u, lengths):
    """Equations (5) to (7), with the reset gate after the product in the candidate."""
    size = p["candidate_bias"].shape[1]

    def run(k, u, times):
        w_r, w_z, w = (p["input_kernel"][k][:, i * size : (i + 1) * size] for i in range(3))
        b_r, b_z, b = (p["input_bias"][k][i * size : (i + 1) * size] for i in range(3))
        u_r, u_z, u_n = (p["recurrent_kernel"][k][:, i * size : (i + 1) * size] for i in range(3))
        h, found = np.zeros(size), {}
        for t in times:
            r = 1 / (1 + np.exp(-(u[t] @ w_r + b_r + h @ u_r)))
            z = 1 / (1 + np.exp(-(u[t] @ w_z + b_z + h @ u_z)))
            candidate = np.tanh(u[t] @ w + b + r * (h @ u_n + p["candidate_bias"][k]))
            h = z * h + (1 - z) * candidate
            found[t] = h
        return found

    rows = []
    for example, length in zip(u, lengths, strict=True):
        h = run(0, example, range(length))
        if len(p["input_kernel"]) == 2:
            back = run(1, example, reversed(range(length)))
            h = {t: np.concatenate([h[t], back[t]]) for t in h}
        y = [h[t] @ p["output_kernel"] + p["output_bias"] for t in range(length)]
        rows.append(np.stack(y + [np.zeros(u.shape[2])] * (u.shape[1] - length)))
    return np.stack(rows)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_values_and_gradients_equal_a_loop(bidirectional):
    lengths = (9, 6)
    real = np.arange(9)[None] < np.array(lengths)[:, None]
    check_mixer_against_loop(
        gru(bidirectional=bidirectional), inputs(), real, lambda p, u: by_loop(p, u, lengths)
    )


def test_recurrent_matrices_start_orthogonal_and_differ():
    mixer = GRU(4, 0, state_size=6, bidirectional=True, rngs=nnx.Rngs(params=jax.random.key(0)))
    squares = [
        u for k in range(2) for u in np.split(np.asarray(mixer.recurrent_kernel[k]), 3, axis=1)
    ]
    for square in squares:
        np.testing.assert_allclose(square @ square.T, np.eye(6), atol=1e-6)
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(squares) for b in squares[:i])


@pytest.mark.parametrize("directions", [1, 2])
def test_parameter_count(directions):
    """3 (D H + H^2 + H) + H for each unit, and the output projection."""
    width, size = 5, 7
    mixer = gru(width, size, bidirectional=directions == 2)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    assert (
        count
        == directions * (3 * (width * size + size**2 + size) + size)
        + directions * size * width
        + width
    )


def test_bad_values_name_their_key():
    with pytest.raises(ValueError, match=r"model\.state_size=0"):
        gru(state_size=0)


def test_streaming_equals_the_scan():
    check_streaming(gru(), inputs(length=200))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_bfloat16_input_has_a_float32_state(bidirectional):
    check_bfloat16(gru(bidirectional=bidirectional), inputs(length=100))
