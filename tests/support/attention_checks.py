"""What the tests of attention share: one loop over heads, queries and keys in float64, and its slopes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def inputs(batch=2, length=11, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, length, width))


def mask_of(lengths, length):
    return jnp.arange(length)[None] < jnp.asarray(lengths)[:, None]


def attention_by_loop(w_qkv, w_out, x, num_heads, weigh):
    """y_t = sum_s a_ts v_s / sum_s b_ts with (a, b) = weigh(q_t, k_s, t, s), one head at a time; (L, D) -> (L, D)."""
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


def turned(x, t):
    """Rotary position t of one vector, its halves as real and imaginary parts."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * t * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def check_against_loop(mixer, weigh, lengths=(11, 6), tolerance=1e-5):
    """Values of all real positions, and the slope of their weighted sum along a direction in each argument.

    The tolerance is that of `jax.nn.dot_product_attention`, which takes the softmax in float32 whatever it is given.
    """
    x = inputs(len(lengths))
    cotangent = inputs(len(lengths), seed=1)
    given = {
        "qkv": np.asarray(mixer.qkv.kernel[...], np.float64),
        "output": np.asarray(mixer.output.kernel[...], np.float64),
        "x": x,
    }

    def loop(qkv, output, x):
        rows = zip(x, lengths, strict=True)
        return [attention_by_loop(qkv, output, row[:n], mixer.num_heads, weigh) for row, n in rows]

    def loss_by_loop(**arrays):
        return sum((c[: len(y)] * y).sum() for c, y in zip(cotangent, loop(**arrays), strict=True))

    with jax.enable_x64(True):
        graph, fixed = nnx.split(mixer)
        mask = mask_of(lengths, x.shape[1])

        @jax.jit
        @partial(jax.grad, has_aux=True)
        def slopes(arrays):
            model = nnx.merge(graph, jax.tree.map(lambda a: a.astype(jnp.float64), fixed))
            model.qkv.kernel[...], model.output.kernel[...] = arrays["qkv"], arrays["output"]
            y = model(arrays["x"], mask)
            return jnp.where(mask[..., None], cotangent * y, 0).sum(), y

        grads, y = slopes({name: jnp.asarray(a) for name, a in given.items()})
        assert y.dtype == jnp.float64
    for ours, expected, n in zip(y, loop(**given), lengths, strict=True):
        np.testing.assert_allclose(ours[:n], expected, atol=tolerance, rtol=tolerance)
    rng = np.random.default_rng(2)
    for name, at in given.items():
        along = rng.normal(size=at.shape)
        ends = (loss_by_loop(**given | {name: at + step * along}) for step in (1e-5, -1e-5))
        slope = (next(ends) - next(ends)) / 2e-5
        parts = np.asarray(grads[name]) * along
        np.testing.assert_allclose(
            parts.sum(), slope, atol=tolerance * np.abs(parts).sum(), rtol=0, err_msg=name
        )


def check_padding_and_future(mixer, lengths=(11, 6)):
    """Neither what stands in padding nor, where causal, what comes later changes a real position."""
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
    """`step` after `step` gives what the whole sequence gives; the state does not grow."""
    x = jnp.asarray(inputs(), jnp.float32)
    state = mixer.init_state(2)
    shapes = jax.tree.map(jnp.shape, state)
    _, y = jax.lax.scan(mixer.step, state, jnp.swapaxes(x, 0, 1))
    np.testing.assert_allclose(
        jnp.swapaxes(y, 0, 1), mixer(x, jnp.ones(x.shape[:2], bool)), atol=atol
    )
    assert jax.tree.map(jnp.shape, mixer.step(state, x[:, 0])[0]) == shapes


def check_16_bits(mixer):
    x = jnp.asarray(inputs(), jnp.float32)
    mask = mask_of((11, 6), 11)
    rounded = x.astype(jnp.bfloat16)
    apply = jax.jit(lambda x: mixer(x, mask))
    y, near = apply(rounded), apply(rounded.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    # rounded once, at the end
    np.testing.assert_allclose(y.astype(jnp.float32), near, rtol=2**-8, atol=2**-11)
