"""What does attention give whose weights are products of features, phi(q_t) . phi(k_s), in time linear in L?

Paper: Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236, equations (5) and (6) over all positions, (9) to (12)
over the past. The causal sums go chunk by chunk: a matrix of C x C weights inside a chunk, one state S (M x W) from one to
the next.

Deviation: the paper's kernel and the published codes step through time one position after the other. Chunks turn this into
products of matrices and L/C dependent steps; no state but the running one is ever stored, and the backward pass, which is
three such sums, remembers q, k and v alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.ops.blocks import cut, joined

CHUNK = 128  # C: about where the weights inside a chunk, L C, cost what the states do, L M W / C
# Added to the sum of the weights, for a sequence without a key. The published codes add 1e-6, which is a fifth of the
# smallest sum that ReLU features of width 4 have.
EPSILON = 1e-12
# Numbers in the features of one block where all positions are read: what a CPU's caches hold, and enough to fill an accelerator.
_CPU_FEATURES, _ACCELERATOR_FEATURES = 2**20, 2**26


def block_rows(length: int, features_a_row: int) -> int:
    """Positions whose features are held at once, a power of two, where one has `features_a_row` numbers in all."""
    wanted = _CPU_FEATURES if jax.default_backend() == "cpu" else _ACCELERATOR_FEATURES
    return min(length, 1 << max(wanted // features_a_row, 16).bit_length() - 1)


def weight_totals(q: Float[Array, "B L H M"], k: Float[Array, "B L H M"]) -> Float[Array, "B L H"]:
    """sum_{s <= t} q_t . k_s, by which the sums of the values are divided.

    Apart from those, because rotary positions turn the features in the numerator alone (Su et al. 2021, equation 19).
    """
    return jnp.einsum("blhm,blhm->blh", q, jnp.cumsum(k, axis=1))


@jax.custom_vjp
def causal_sums(
    q: Float[Array, "B L H M"], k: Float[Array, "B L H M"], v: Float[Array, "B L H W"]
) -> Float[Array, "B L H W"]:
    """y_t = sum_{s <= t} (q_t . k_s) v_s; gradients are exact, forward mode (`jax.jvp`) is not supported."""
    return _sums(q, k, v, reverse=False)


def _sums_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _sums(q, k, v, reverse=False), (q, k, v)


def _sums_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    q, k, v = saved
    # the paper's equations (13) to (15): y_t reads s <= t, so k_s and v_s are read by t >= s
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
        """(B, L, H, M) to (chunks, B, H, chunk, M); what is added at the end is zero."""
        return jnp.transpose(cut(x, chunk), (1, 0, 3, 2, 4))

    seen = np.tri(chunk, dtype=bool)
    seen = (seen.T if reverse else seen)[None, None]

    def step(state: Array, parts: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v = parts
        near = jnp.where(seen, q @ jnp.swapaxes(k, 2, 3), 0) @ v
        return state + jnp.swapaxes(k, 2, 3) @ v, near + q @ state

    state = jnp.zeros((batch, heads, q.shape[3], v.shape[3]), q.dtype)
    _, y = lax.scan(step, state, (chunks(q), chunks(k), chunks(v)), reverse=reverse)
    return joined(jnp.transpose(y, (1, 0, 3, 2, 4)), length)
