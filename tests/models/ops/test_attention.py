"""The implementations of softmax attention against the whole matrix of weights."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.ops import attention as module
from models.ops.attention import attention, attention_by_blocks, block_rows, has_flash
from models.ops.batch_sharding import local_batch_size
from models.ops.blocks import merge_blocks, split_blocks


def inputs(batch=2, length=37, heads=3, width=4, dtype=jnp.float32):
    return (
        jax.random.normal(key, (batch, length, heads, width), dtype)
        for key in jax.random.split(jax.random.key(0), 4)
    )


def whole(q, k, v, mask, causal):
    """Every weight at once, as the equation says."""
    scores = jnp.einsum("bqhw,bkhw->bhqk", q, k) / np.sqrt(q.shape[-1])
    seen = mask[:, None, None, :] & (np.tri(q.shape[1], dtype=bool)[None, None] | (not causal))
    return jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), v)


def mask_of(lengths, length):
    return jnp.arange(length)[None] < jnp.asarray(lengths)[:, None]


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 32, 37, 64])
def test_blocks_equal_the_whole_matrix(rows, causal):
    """In float64, values of real positions and all gradients; 37 is no multiple of 8 or 32."""
    with jax.enable_x64(True):
        q, k, v, cotangent = inputs(dtype=jnp.float64)
        mask = mask_of((37, 20), 37)
        cotangent = jnp.where(mask[:, :, None, None], cotangent, 0)
        fast, slow = (
            jax.jit(lambda *x, f=f: (f(*x), jax.vjp(f, *x)[1](cotangent)))(q, k, v)
            for f in (
                lambda *x: attention_by_blocks(*x, mask, causal, rows),
                lambda *x: whole(*x, mask, causal),
            )
        )
    assert fast[0].dtype == jnp.float64
    np.testing.assert_allclose(fast[0], slow[0], atol=1e-13)
    for ours, expected in zip(fast[1], slow[1], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_the_chosen_order_equals_the_whole_matrix(few, causal, monkeypatch):
    monkeypatch.setitem(module.WEIGHT_BYTES, "cpu", 1 if few else 2**30)
    assert block_rows(2 * 3 * 37) == (8 if few else 2**20)
    q, k, v, _ = inputs()
    mask = mask_of((37, 20), 37)
    np.testing.assert_allclose(
        attention(q, k, v, mask, causal=causal), whole(q, k, v, mask, causal), atol=2e-6
    )
    loops = str(jax.make_jaxpr(lambda q: attention(q, k, v, mask, causal=causal))(q)).count("scan[")
    assert loops == few


@pytest.mark.parametrize("causal", [False, True])
def test_memory_at_4096_is_far_below_a_matrix_of_weights(causal):
    """B H L L is 268 MB, and autodiff would save three such arrays."""
    shape = jax.ShapeDtypeStruct((1, 4096, 4, 16), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 4096), bool)
    step = jax.jit(
        jax.grad(
            lambda q, k, v, mask: (attention(q, k, v, mask, causal=causal) ** 2).sum(),
            argnums=(0, 1, 2),
        )
    )
    assert (
        step.lower(shape, shape, shape, mask).compile().memory_analysis().temp_size_in_bytes
        < 4 * 4096**2 * 4 / 8
    )


def test_a_sequence_that_is_all_padding_gives_finite_gradients():
    q, k, v, _ = inputs()
    mask = mask_of((37, 0), 37)
    loss = lambda *x: (attention_by_blocks(*x, mask, True, 8) ** 2).sum()  # noqa: E731
    for grad in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v):
        assert np.isfinite(grad).all()


def test_16_bits_are_weighed_in_float32():
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs())
    mask = mask_of((37, 20), 37)
    y = attention_by_blocks(q, k, v, mask, False, 8)
    assert y.dtype == jnp.bfloat16
    exact = whole(*(x.astype(jnp.float32) for x in (q, k, v)), mask, False)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=2**-7)


@pytest.mark.parametrize("rows", [8, 64])
def test_dropout_leaves_out_single_weights_and_keeps_their_mean(rows):
    """With values of one, outputs are sums of the kept weights; with equal keys their mean is 1."""
    q, k, v, _ = inputs(length=64)
    mask = mask_of((64, 20), 64)

    @jax.jit
    def means(seed, q, k, v):
        return attention_by_blocks(q, k, v, mask, False, rows, 0.25, jax.random.key(seed))

    def sums(seed, q, k):
        return means(seed, q, k, jnp.ones_like(v))

    y = sums(0, q, jnp.zeros_like(k))[..., 0]
    np.testing.assert_allclose(np.mean(y), 1.0, atol=0.02)
    np.testing.assert_allclose(
        y[0] * 64 * 0.75, np.round(y[0] * 64 * 0.75), atol=1e-3
    )  # whole numbers of keys
    assert len(np.unique(np.round(y[0] * 48))) > 5  # another draw for each query
    np.testing.assert_allclose(np.var(y[0]), 0.25 / 0.75 / 64, rtol=0.3)
    np.testing.assert_array_equal(sums(0, q, k), sums(0, q, k))
    assert np.abs(sums(0, q, k) - sums(1, q, k)).max() > 0.1
    # the backward pass drops the same weights: the sum is linear in the values
    slope = jax.jit(jax.grad(lambda v: means(0, q, k, v).sum()))(v)
    np.testing.assert_allclose((slope * v).sum(), means(0, q, k, v).sum(), rtol=1e-4)


def test_dropout_needs_random_numbers():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"model\.attention_dropout"):
        attention(q, k, v, mask_of((37, 20), 37), causal=False, dropout=0.1)


def device(platform="gpu", capability="9.0"):
    return SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
    ("dtype", "head_width", "where", "expected"),
    [
        (jnp.bfloat16, 64, device(), True),
        (jnp.float16, 256, device(), True),
        (jnp.bfloat16, 256, device(capability="8.0"), False),
        (jnp.bfloat16, 128, device(capability="8.6"), True),
        (jnp.bfloat16, 128, device(capability="10.0"), True),
        (jnp.bfloat16, 128, device(capability="10.3"), False),
        (jnp.bfloat16, 128, device(capability="12.0"), True),
        (jnp.bfloat16, 64, device(capability="7.5"), False),
        (jnp.bfloat16, 64, device(capability="gfx90a"), False),
        (jnp.bfloat16, 20, device(), False),
        (jnp.float32, 64, device(), False),
        (jnp.bfloat16, 64, SimpleNamespace(platform="cpu"), False),
        (jnp.bfloat16, 64, None, False),
    ],
)
def test_flash_attention_where_the_gpu_has_it(dtype, head_width, where, expected):
    assert jax.default_backend() == "cpu" or where is not None
    assert has_flash(jnp.dtype(dtype), head_width, where) == expected


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_gets_padding_as_lengths(causal, monkeypatch):
    """XLA's form takes the same lengths and stands in for cuDNN's."""
    real, asked = jax.nn.dot_product_attention, []

    def stand_in(*args, implementation, **options):
        asked.append(implementation)
        assert "mask" not in options
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(module, "has_flash", lambda *args: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v, _ = inputs()
    mask = mask_of((37, 20), 37)
    np.testing.assert_allclose(
        attention(q, k, v, mask, causal=causal), whole(q, k, v, mask, causal), atol=2e-6
    )
    assert asked == ["cudnn"]


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_near_the_whole_matrix(causal):
    """Odd length, with all, some and one real position; values and gradients."""
    q, k, v, cotangent = (x.astype(jnp.bfloat16) for x in inputs(batch=3, length=301, width=64))
    mask = mask_of((301, 170, 1), 301)
    assert has_flash(q.dtype, 64)
    real = mask[:, :, None, None]
    wide = [x.astype(jnp.float32) for x in (q, k, v)]

    def both(f, args):
        y, pull = jax.vjp(lambda *x: jnp.where(real, f(*x), 0), *args)
        return y, pull(cotangent.astype(y.dtype))

    fast = both(lambda *x: attention(*x, mask, causal=causal), (q, k, v))
    slow = both(lambda *x: whole(*x, mask, causal), wide)
    for ours, expected in zip((fast[0], *fast[1]), (slow[0], *slow[1]), strict=True):
        # 8 bits, lost more than once on the way
        np.testing.assert_allclose(
            ours.astype(jnp.float32), expected, rtol=0, atol=0.02 * np.abs(expected).max()
        )


@pytest.mark.parametrize("size", [1, 4, 9, 20])
def test_blocks_are_joined_again(size):
    x = jnp.arange(2 * 9 * 3).reshape(2, 9, 3)
    assert split_blocks(x, size).shape == (2, -(-9 // size), size, 3)
    np.testing.assert_array_equal(merge_blocks(split_blocks(x, size), 9), x)


def test_blocks_are_those_of_the_examples_of_one_device():
    assert local_batch_size(8) == 8
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",))):
        assert local_batch_size(8) == 2
        assert local_batch_size(9) == 3


@pytest.mark.parametrize("model", ["attention", "linear"])
def test_more_devices_make_no_smaller_blocks(monkeypatch, model):
    import models.linear as linear

    taken = []
    if model == "attention":
        monkeypatch.setattr(module, "block_rows", lambda weights: taken.append(weights) or 8)
        q, k, v, _ = inputs(batch=4, length=16)
        run = lambda: attention(q, k, v, mask_of((16,) * 4, 16), causal=False)  # noqa: E731
    else:
        monkeypatch.setattr(
            linear, "block_rows", lambda length, numbers: taken.append(numbers) or 8
        )
        mixer = linear.LinearAttention(
            12, 16, num_heads=3, positions="none", causal=False, rngs=nnx.Rngs(0)
        )
        run = lambda: mixer(jnp.zeros((4, 16, 12)), mask_of((16,) * 4, 16))  # noqa: E731
    jax.eval_shape(run)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",))):
        jax.eval_shape(run)
    assert taken[0] == 4 * taken[1]


@pytest.mark.parametrize("causal", [False, True])
def test_more_blocks_lose_no_digits_of_16_bit_gradients(causal):
    q, k, v, cotangent = inputs(length=256, dtype=jnp.bfloat16)
    mask = mask_of((256, 256), 256)

    def gradient(rows):
        def pull(k, v, cotangent):
            by_rows = lambda k, v: attention_by_blocks(q, k, v, mask, causal, rows)  # noqa: E731
            return jax.vjp(by_rows, k, v)[1](cotangent)

        return jax.jit(pull)(k, v, cotangent)

    for one, many in zip(gradient(256), gradient(1), strict=True):
        one, many = np.asarray(one, np.float32), np.asarray(many, np.float32)
        assert np.abs(one - many).max() < 0.01 * np.abs(one).max()
