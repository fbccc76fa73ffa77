"""What is the output of one long filter per channel?"""

import jax.numpy as jnp
from jaxtyping import Array, Float
from scipy.fft import next_fast_len


def depthwise_convolution(x: Float[Array, "B L D"], filters: Float[Array, "L D"]) -> Float[Array, "B L D"]:
    """y[t, d] = sum_{i=0..t} filters[i, d] x[t-i, d], exactly: the transforms are long enough that nothing wraps around.

    The result has the dtype of x; below float32, everything in between is float32.
    """
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    length = x.shape[1]
    size = next_fast_len(2 * length - 1, real=True)
    # Time last: XLA:CPU transforms contiguous rows several times faster.
    x_hat = jnp.fft.rfft(jnp.swapaxes(x.astype(dtype), 1, 2), size)  # (B, D, F)
    filters_hat = jnp.fft.rfft(filters.astype(dtype).T, size)  # (D, F)
    y = jnp.fft.irfft(x_hat * filters_hat[None], size)[..., :length]
    return jnp.swapaxes(y, 1, 2).astype(x.dtype)
