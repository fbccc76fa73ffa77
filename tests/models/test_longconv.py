"""SGConv against a float64 loop over its kernel (equation 1) and its sum over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64_checks import check_mixer_against_loop
from mixer_checks import check_bfloat16

from models.longconv import LongConv

OPTIONS = {
    "kernel_dim": 3,
    "init": "normal",
    "init_scale": 0,
    "decay": "geometric",
    "decay_min": 2,
    "decay_max": 2,
    "interpolation": "linear",
    "bidirectional": False,
}


def longconv(width=4, length=17, **options):
    return LongConv(width, length, **OPTIONS | options, rngs=nnx.Rngs(params=jax.random.key(0)))


def inputs(batch=2, length=17, width=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, width)), jnp.float32)


def kernel_by_loop(w, options):
    """(K, D, T), entry by entry: sub-kernel i interpolates between the d values of w_i."""
    scales, _, width, d = w.shape
    rates = np.linspace(options["decay_min"], options["decay_max"], width)
    entries = []
    for i in range(scales):
        factor = 2 ** (max(i - 1, 0) + options["init_scale"])
        for j in range(d * factor):
            if options["interpolation"] == "nearest":
                value = w[i, :, :, j // factor]
            else:
                point = min(max((j + 0.5) / factor - 0.5, 0), d - 1)
                low = int(point)
                high = min(low + 1, d - 1)
                value = w[i, :, :, low] * (low + 1 - point) + w[i, :, :, high] * (point - low)
            fade = rates**-i if options["decay"] == "geometric" else (len(entries) + 1.0) ** -rates
            entries.append(value * fade)
    return np.stack(entries, axis=-1)


def by_loop(p, u, real, z, options):
    """y_t = sum_j k_j u_{t-j} + sum_j k'_j u_{t+1+j} + D u_t, k' over real inputs only."""
    k = kernel_by_loop(p["w"], options) / z[..., None]
    length, y = u.shape[1], []
    for t in range(length):
        y_t = p["d"] * u[:, t]
        for s in range(length):
            if s <= t:
                y_t = y_t + k[0, :, t - s] * u[:, s]
            elif len(k) == 2:
                y_t = y_t + k[1, :, s - t - 1] * u[:, s] * real[:, s, None]
        y.append(y_t)
    return np.stack(y, axis=1)


VARIANTS = [
    {},
    {"bidirectional": True, "decay_min": 1, "decay_max": 3, "init_scale": 1},
    {"interpolation": "nearest", "bidirectional": True},
    {"decay": "power", "decay_min": 0.5, "decay_max": 1, "init": "cosine"},
    {"kernel_dim": 1},
]


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("options", VARIANTS)
def test_values_and_gradients_equal_a_loop(options):
    options = OPTIONS | options
    mixer = longconv(length=13, **options)
    start = kernel_by_loop(np.asarray(mixer.w[...]), options)
    np.testing.assert_allclose(mixer.z[...], np.linalg.norm(start, axis=-1), rtol=1e-6)
    z = np.asarray(mixer.z[...], np.float64)
    mixer.w[...] = mixer.w[...] + 0.5 * jax.random.normal(
        jax.random.key(1), mixer.w.shape
    )  # Z stays the start's
    real = np.arange(13)[None] < np.array([[13], [9]])
    check_mixer_against_loop(
        mixer, inputs(length=13), real, lambda p, u: by_loop(p, u, real, z, options)
    )


@pytest.mark.parametrize(
    ("length", "kernel_dim", "init_scale", "scales"),
    [
        (1, 1, 0, 1),
        (64, 64, 0, 1),
        (65, 64, 0, 2),
        (2048, 1, 0, 12),
        (4096, 2, 0, 12),
        (1024, 32, 0, 6),
        (16384, 64, 1, 8),
    ],
)
def test_as_many_scales_as_reach_the_input(length, kernel_dim, init_scale, scales):
    """1 + ceil(log2(L / d)) - init_scale, as the published code counts them on LRA."""
    shape = nnx.eval_shape(
        lambda: longconv(2, length, kernel_dim=kernel_dim, init_scale=init_scale)
    )
    assert shape.w.shape == (scales, 1, 2, kernel_dim)
    total = kernel_dim * 2 ** (init_scale + scales - 1)
    assert length <= total < 2 * length or scales == 1


def test_kernels_start_with_norm_one_and_halve_from_scale_to_scale():
    mixer = longconv(width=64, length=64, kernel_dim=8, interpolation="nearest")
    kernel = np.asarray(mixer.kernels(64)[0])
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=-1), 1, rtol=1e-6)
    spread = np.array(
        [np.sqrt((kernel[:, a:b] ** 2).mean()) for a, b in ((0, 8), (8, 16), (16, 32), (32, 64))]
    )
    np.testing.assert_allclose(spread[1:] / spread[:-1], 0.5, atol=0.06)


def test_rates_differ_between_channels():
    mixer = longconv(
        width=3, length=16, kernel_dim=4, decay_min=1, decay_max=3, interpolation="nearest"
    )
    mixer.w[...] = jnp.ones_like(mixer.w[...])
    kernel = np.asarray(mixer.unscaled_kernel()[0])
    np.testing.assert_allclose(kernel[:, -1], [1, 1 / 4, 1 / 9], rtol=1e-6)
    np.testing.assert_allclose(kernel[:, 0], 1)


def test_cosine_start_has_every_frequency_once_in_each_scale():
    mixer = longconv(width=4, length=64, kernel_dim=16, init="cosine", bidirectional=True)
    w = np.asarray(mixer.w[...])
    waves = [[np.cos(2 * np.pi * c * s / 15) for s in range(16)] for c in range(4)]
    for scale in w:
        np.testing.assert_array_equal(scale[0], scale[1])
        order = [np.abs(scale[0] - wave).max(axis=1).argmin() for wave in waves]
        assert sorted(order) == [0, 1, 2, 3]
        np.testing.assert_allclose(scale[0][order], waves, atol=1e-5)
    assert any((w[0] != scale).any() for scale in w[1:])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"kernel_dim": 18}, "kernel_dim"),
        ({"kernel_dim": 9, "init_scale": 1}, "init_scale"),
        ({"kernel_dim": 0}, "kernel_dim"),
        ({"init_scale": -1}, "init_scale"),
        ({"init": "hankel"}, "init"),
        ({"decay": "none"}, "decay"),
        ({"decay_min": 0}, "decay_min"),
        ({"decay_max": 1}, "decay_max"),
        ({"interpolation": "cubic"}, "interpolation"),
    ],
)
def test_bad_values_name_their_key(options, key):
    with pytest.raises(ValueError, match=rf"model\.{key}="):
        longconv(**options)


@pytest.mark.slow
def test_bfloat16_input_is_convolved_in_float32():
    check_bfloat16(longconv(length=400), inputs(length=400))
