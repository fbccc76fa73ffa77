"""Performer: attention with random features (FAVOR+).

phi(q) . phi(k) is an unbiased estimate of softmax attention's exp(q . k / sqrt(W)), with

    phi(x)_j = exp(w_j . x' - |x'|^2 / 2) / sqrt(M),   x' = x / W^(1/4)

(lemma 1 and equation 5 with positive features). The w_j are orthogonal in blocks of W and have the
lengths of Gaussian vectors (section 3.3).

Paper: Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv 2009.14794). Reference
code read: google-research/long-range-arena. Deviations: the w_j are drawn once, at construction;
the scaling of the features uses no other position (`key_features`), so that padding and later
positions have no effect.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from models.checks import check_option, check_positive
from models.linear import KernelAttention
from models.ops.attention import Heads

KERNELS = ("softmax", "relu")


class RandomFeatures(nnx.Variable):
    """Random directions, drawn from the seed of the parameters and not trained."""


class Performer(KernelAttention):
    """Attention with random features.

    Args:
        width, num_heads, positions, causal: as in `MultiHead`.
        num_features: M; None, with kernel relu only, omits the random projections.
        kernel: softmax | relu, max(w . x, 0) + 0.001 (section 4.2, "generalised attention").
    Raises:
        ValueError: as `MultiHead`; an unknown kernel, M < 1, or no M with kernel softmax.
    """

    rotates_features = False

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_heads: int,
        num_features: int | None,
        kernel: str,
        positions: str,
        causal: bool,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, num_heads=num_heads, positions=positions, causal=causal, rngs=rngs)
        check_option("model.kernel", kernel, KERNELS)
        if num_features is None and kernel == "softmax":
            raise ValueError(
                "model.num_features=null has no random features, but model.kernel=softmax needs "
                "them; set model.num_features or model.kernel=relu"
            )
        check_positive(num_features=num_features)
        self.kernel = kernel
        head_width = width // num_heads
        self.num_features = num_features or head_width
        self.directions = (
            RandomFeatures(orthogonal_features(rngs.params(), num_features, head_width))
            if num_features
            else None
        )

    def query_features(self, q: Heads) -> Float[Array, "B L H M"]:
        if self.kernel == "relu":
            return self.relu_features(q)
        exponent = self.exponent(q)
        # a factor per query cancels in the quotient of the sums
        return jnp.exp(exponent - jax.lax.stop_gradient(exponent.max(axis=-1, keepdims=True)))

    def key_features(self, k: Heads) -> Float[Array, "B L H M"]:
        """Features of the keys, without a subtracted maximum.

        The published code subtracts the maximum over all keys. Exponents are at most |w_j|^2 / 2,
        about W / 2, and the mean of the features over w is 1. The added 1e-6 keeps the denominator
        above 0 for a query that fits no feature; the published code adds it to queries too. Keys
        longer than 2 sqrt(W) have features below 1e-6 and therefore equal weights
        (docs/models/performer.md).
        """
        return self.relu_features(k) if self.kernel == "relu" else jnp.exp(self.exponent(k)) + 1e-6

    def exponent(self, x: Heads) -> Float[Array, "B L H M"]:
        x = x / x.shape[-1] ** 0.25
        # the factor 1 / sqrt(M) cancels
        return self.project(x) - 0.5 * jnp.square(x).sum(axis=-1, keepdims=True)

    def relu_features(self, x: Heads) -> Float[Array, "B L H M"]:
        return jax.nn.relu(self.project(x)) + 1e-3

    def project(self, x: Heads) -> Float[Array, "B L H M"]:
        return x if self.directions is None else x @ self.directions[...].T.astype(x.dtype)


def orthogonal_features(key: PRNGKeyArray, num_features: int, width: int) -> Float[Array, "M W"]:
    """Vectors distributed as N(0, I) that are orthogonal within blocks of W (section 3.3)."""
    key_direction, key_length = jax.random.split(key)
    blocks = math.ceil(num_features / width)
    # the signs of r make q uniform over rotations for any sign convention of the QR routine
    q, r = jnp.linalg.qr(jax.random.normal(key_direction, (blocks, width, width)))
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    rows = jnp.swapaxes(q, 1, 2).reshape(blocks * width, width)[:num_features]
    gaussian = jax.random.normal(key_length, (num_features, width))
    return rows * jnp.linalg.norm(gaussian, axis=1, keepdims=True)
