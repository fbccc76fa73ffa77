"""FLOPs of single operations, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest

from lra.config.flops import UncountedError, flops

F32, C64 = jnp.float32, jnp.complex64


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def scanned(x, w):
    return jax.lax.scan(lambda h, _: (h @ w, None), x, length=7)[0]


def chosen_by_value(x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: jnp.exp(x))


def chosen_by_platform(x):
    return jax.lax.platform_dependent(x, cpu=jnp.exp, default=lambda x: x @ x)


@jax.custom_vjp
def own_gradient(x):
    return jnp.exp(x)


own_gradient.defvjp(lambda x: (own_gradient(x), x), lambda x, y: (x @ y,))


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (jnp.exp, [shape(3, 5)], 15),
        (lambda x: x.reshape(-1)[::2].astype(jnp.bfloat16), [shape(4, 4)], 0),
        (jnp.matmul, [shape(3, 4), shape(4, 5)], 2 * 3 * 5 * 4),
        (
            lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
            [shape(6, 3, 4), shape(6, 4, 5)],
            6 * 2 * 3 * 5 * 4,
        ),
        (jnp.matmul, [shape(3, 4, dtype=C64), shape(4, 5, dtype=C64)], 4 * 2 * 3 * 5 * 4),
        (jnp.multiply, [shape(7, dtype=C64), shape(7, dtype=C64)], 6 * 7),
        (jnp.add, [shape(7, dtype=C64), shape(7, dtype=C64)], 2 * 7),
        (jnp.sum, [shape(3, 5)], 15),
        (lambda x: jnp.cumsum(x, axis=1), [shape(3, 5)], 15),
        (lambda x: jnp.fft.fft(x), [shape(3, 16, dtype=C64)], 3 * 5 * 16 * 4),
        (lambda x: jnp.fft.rfft(x), [shape(3, 16)], 3 * 5 * 16 * 4 // 2),
        (lambda x: jnp.fft.irfft(x), [shape(3, 9, dtype=C64)], 3 * 5 * 16 * 4 // 2),
        (scanned, [shape(3, 4), shape(4, 4)], 7 * 2 * 3 * 4 * 4),
        (
            lambda x: jax.lax.fori_loop(0, 5, lambda i, h: jnp.exp(h), x),
            [shape(3)],
            5 * (3 + 1),
        ),  # 1: i + 1
        (lambda x: jnp.convolve(x, x[:3], mode="valid"), [shape(10)], 2 * 8 * 3),
        (chosen_by_value, [shape(4, 4)], 1 + 2 * 4**3),
        (chosen_by_platform, [shape(4, 4)], 16 if jax.default_backend() == "cpu" else 2 * 4**3),
        (own_gradient, [shape(4, 4)], 16),
        (lambda x: jax.vjp(own_gradient, x)[1](x), [shape(4, 4)], 16 + 2 * 4**3),
        (jax.checkpoint(jnp.sin), [shape(4)], 4),
        (jax.jit(jnp.tanh), [shape(4)], 4),
    ],
)
def test_operations_are_those_counted_by_hand(function, args, expected):
    assert flops(function, *args) == expected


def test_grouped_convolution_is_counted_by_its_filters():
    x, kernel = shape(2, 10, 6), shape(3, 1, 6)  # each of 6 channels has its own 3 taps

    def convolve(x, kernel):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=numbers, feature_group_count=6
        )

    assert flops(convolve, x, kernel) == 2 * (2 * 8 * 6) * 3


def test_loop_of_unknown_length_is_refused():
    with pytest.raises(UncountedError, match="number of steps"):
        flops(lambda x: jax.lax.while_loop(lambda h: h[0] < 1, jnp.exp, x), shape(3))
