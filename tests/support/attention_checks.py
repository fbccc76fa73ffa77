"""Checks that all kinds of attention share, with a loop over heads, queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from float64_checks import check_against_loop
from mixer_checks import check_bfloat16_step

from models.attention import Attention

SOFTMAX = {
    "num_heads": 2,
    "positions": "none",
    "causal": False,
    "max_len": None,
    "qkv_width": None,
    "attention_dropout": 0.0,
}


def softmax_attention(**options):
    return Attention(8, 11, **SOFTMAX | options, rngs=nnx.Rngs(0))


def inputs(batch=2, length=11, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, length, width))


def mask_of(lengths, length):
    return jnp.arange(length)[None] < jnp.asarray(lengths)[:, None]


def attention_by_loop(w_qkv, w_out, x, num_heads, weigh):
    """y_t = sum_s a_ts v_s / sum_s b_ts of (L, D), with (a, b) = weigh(q_t, k_s, t, s)."""
    q, k, v = np.split(x @ w_qkv, 3, axis=-1)
    y = np.zeros_like(v)
    head_width = q.shape[1] // num_heads
    for head in range(num_heads):
        at = slice(head * head_width, (head + 1) * head_width)
        for t in range(len(x)):
            top, bottom = np.zeros(head_width), 0.0
            for s in range(len(x)):
                a, b = weigh(q[t, at], k[s, at], t, s)
                top, bottom = top + a * v[s, at], bottom + b
            y[t, at] = top / bottom
    return y @ w_out


def rotated(x, t):
    """One vector rotated to position t, its halves as real and imaginary parts."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * t * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def check_attention_against_loop(mixer, weigh, lengths=(11, 6), tolerance=1e-5):
    """Values at real positions and the gradients of both projections and of the inputs.

    The default tolerance is that of `jax.nn.dot_product_attention`, whose softmax is always
    float32.
    """
    x = inputs(len(lengths))
    mask = mask_of(lengths, x.shape[1])
    graph, variables = nnx.split(mixer)

    def ours(arrays):
        model = nnx.merge(graph, jax.tree.map(lambda a: a.astype(jnp.float64), variables))
        model.qkv.kernel[...], model.output.kernel[...] = arrays["qkv"], arrays["output"]
        return model(arrays["x"], mask)

    def loop(arrays):
        y = np.zeros_like(arrays["x"])
        for row, n in enumerate(lengths):
            y[row, :n] = attention_by_loop(
                arrays["qkv"], arrays["output"], arrays["x"][row, :n], mixer.num_heads, weigh
            )
        return y

    check_against_loop(
        ours,
        loop,
        {"qkv": mixer.qkv.kernel[...], "output": mixer.output.kernel[...], "x": x},
        inputs(len(lengths), seed=1) * np.asarray(mask)[..., None],
        tolerance=tolerance,
    )


def check_bfloat16(mixer):
    """Outputs are bfloat16 and near those in float32; each rounding to 8 bits loses 0.4 %."""
    x = jnp.asarray(inputs(), jnp.bfloat16)
    mask = mask_of((11, 6), 11)
    apply = jax.jit(lambda x: mixer(x, mask))
    y, exact = apply(x), apply(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), exact, rtol=0, atol=0.02 * np.abs(exact).max()
    )
    check_bfloat16_step(mixer, x)
