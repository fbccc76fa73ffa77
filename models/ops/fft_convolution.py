"""Convolves each channel with a filter as long as the input, in O(L log L)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.ops.batch_sharding import shard_over_batch


def fft_convolution(
    x: Float[Array, "B L D"],
    kernel: Float[Array, "D L"],
    anticausal: Float[Array, "D L"] | None = None,
) -> Float[Array, "B L D"]:
    """y_t = sum_{j=0..t} kernel_j x_{t-j} + sum_{j=0..L-2-t} anticausal_j x_{t+1+j}.

    `anticausal=None` omits the second sum. The transforms have at least 2L - 1 points, so that
    nothing wraps around. Rounding errors of y_t are relative to the whole input, not to the inputs
    it depends on. All arguments share one dtype, float32 or float64.

    Source: Gu et al. 2022 (S4, arXiv 2111.00396), section 2.4. As in state-spaces/s4, one transform
        serves both directions, and the anticausal filter starts at the next position, so that the
        current one is not counted twice.
    """
    length = x.shape[1]
    size = smooth_size(2 * length - 1)
    if anticausal is not None:
        gap = jnp.zeros((kernel.shape[0], size - 2 * length + 1), kernel.dtype)
        later = jnp.flip(anticausal[:, : length - 1], axis=1)
        kernel = jnp.concatenate([kernel, gap, later], axis=1)

    def convolve(x: Array, filters: Array) -> Array:
        spectrum = jnp.fft.rfft(jnp.swapaxes(x, 1, 2), size) * jnp.fft.rfft(filters, size)[None]
        return jnp.swapaxes(jnp.fft.irfft(spectrum, size)[..., :length], 1, 2)

    return shard_over_batch(convolve, x, kernel)


def convolve_directions(
    u: Float[Array, "B L D"], mask: Bool[Array, "B L"], kernels: Float[Array, "K D L"]
) -> Float[Array, "B L D"]:
    """`fft_convolution` with a causal and, if K = 2, an anticausal kernel over real positions."""
    if len(kernels) == 1:
        return fft_convolution(u, kernels[0])
    # padding must not enter the anticausal kernel
    return fft_convolution(jnp.where(mask[..., None], u, 0), kernels[0], kernels[1])


def smooth_size(at_least: int) -> int:
    """The smallest even number >= `at_least` whose only prime factors are 2, 3 and 5."""
    size = at_least + at_least % 2
    while 30 ** size.bit_length() % size:
        size += 2
    return size
