"""Computes attention with weights phi(q_t) . phi(k_s), in time linear in L.

Paper: Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236, equations (9) to (12).
The causal sums are computed chunk by chunk: C x C weights inside a chunk, and one state S (M x W)
that passes from chunk to chunk.

Deviation: the paper's kernel and the published codes advance one position at a time. Chunks replace
this by matrix products and L/C dependent steps. Only the running state is stored; the backward pass
consists of three such sums and saves only q, k and v.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.ops.blocks import merge_blocks, split_blocks

CHUNK = 128  # C; here the weights inside chunks, L C, cost about as much as the states, L M W / C
# Added to the sum of the weights, for sequences without a key. The published codes add 1e-6, a
# fifth of the smallest sum of ReLU features of width 4.
EPSILON = 1e-12
# Features per block: they fit a CPU's caches, or fill an accelerator.
CPU_FEATURES, ACCELERATOR_FEATURES = 2**20, 2**26


def block_rows(length: int, features_a_row: int) -> int:
    """Positions per block, a power of two, if one position has so many features in all heads."""
    wanted = CPU_FEATURES if jax.default_backend() == "cpu" else ACCELERATOR_FEATURES
    return min(length, 1 << max(wanted // features_a_row, 16).bit_length() - 1)


def weight_totals(q: Float[Array, "B L H M"], k: Float[Array, "B L H M"]) -> Float[Array, "B L H"]:
    """sum_{s <= t} q_t . k_s, the denominator of the causal form, without rotary positions."""
    return jnp.einsum("blhm,blhm->blh", q, jnp.cumsum(k, axis=1))


@jax.custom_vjp
def causal_sums(
    q: Float[Array, "B L H M"], k: Float[Array, "B L H M"], v: Float[Array, "B L H W"]
) -> Float[Array, "B L H W"]:
    """y_t = sum_{s <= t} (q_t . k_s) v_s.

    Gradients are exact; forward mode (`jax.jvp`) is not supported.
    """
    return _sums(q, k, v, reverse=False)


def _sums_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _sums(q, k, v, reverse=False), (q, k, v)


def _sums_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    q, k, v = saved
    # equations (13) to (15): y_t reads s <= t, so the gradients of k_s and v_s sum over t >= s
    return (
        _sums(dy, v, k, reverse=False),
        _sums(v, dy, q, reverse=True),
        _sums(k, q, dy, reverse=True),
    )


causal_sums.defvjp(_sums_forward, _sums_backward)


def _sums(q: Array, k: Array, v: Array, reverse: bool) -> Array:
    """sum_s (q_t . k_s) v_s over s <= t, or over s >= t with `reverse`."""
    batch, length, heads, _ = q.shape
    chunk = min(CHUNK, length)

    def chunks(x: Array) -> Array:
        """(B, L, H, M) to (chunks, B, H, chunk, M); zeros fill the last chunk."""
        return jnp.transpose(split_blocks(x, chunk), (1, 0, 3, 2, 4))

    visible = np.tri(chunk, dtype=bool)
    visible = (visible.T if reverse else visible)[None, None]

    def step(state: Array, parts: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v = parts
        inside = jnp.where(visible, q @ jnp.swapaxes(k, 2, 3), 0) @ v
        return state + jnp.swapaxes(k, 2, 3) @ v, inside + q @ state

    state = jnp.zeros((batch, heads, q.shape[3], v.shape[3]), q.dtype)
    _, y = lax.scan(step, state, (chunks(q), chunks(k), chunks(v)), reverse=reverse)
    return merge_blocks(jnp.transpose(y, (1, 0, 3, 2, 4)), length)
