"""Checks that all kinds of attention share, with a loop over heads, queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from float64_checks import check_against_loop


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


def check_padding_and_future(mixer, lengths=(11, 6)):
    """Neither padding nor, for a causal mixer, later positions change a real position."""
    x = jnp.asarray(inputs(len(lengths)), jnp.float32)
    mask = mask_of(lengths, x.shape[1])
    apply = jax.jit(lambda x: mixer(x, mask))
    y, other = apply(x), apply(jnp.where(mask[..., None], x, 1e3))
    np.testing.assert_allclose(jnp.where(mask[..., None], y - other, 0), 0, atol=1e-6)
    later = apply(x.at[:, 5:].add(100.0))
    assert np.abs(y[:, 5] - later[:, 5]).max() > 1e-3
    if mixer.causal:
        np.testing.assert_allclose(y[:, :5], later[:, :5], atol=1e-6)


def check_streaming(mixer, atol=1e-5):
    """`step` gives the outputs of `__call__`, with a state of constant shape."""
    x = jnp.asarray(inputs(), jnp.float32)
    state = mixer.init_state(2)
    shapes = jax.tree.map(jnp.shape, state)
    _, y = jax.lax.scan(mixer.step, state, jnp.swapaxes(x, 0, 1))
    np.testing.assert_allclose(
        jnp.swapaxes(y, 0, 1), mixer(x, jnp.ones(x.shape[:2], bool)), atol=atol
    )
    assert jax.tree.map(jnp.shape, mixer.step(state, x[:, 0])[0]) == shapes


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
