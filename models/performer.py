"""Performer of Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv 2009.14794): FAVOR+.

Softmax attention's exp(q . k / sqrt(W)) is estimated, without bias, by phi(q) . phi(k) with
phi(x)_j = exp(w_j . x' - |x'|^2 / 2) / sqrt(M),  x' = x / W^(1/4)   (their Lemma 1 and equation 5 with positive features),
the w_j orthogonal in blocks of W and as long as Gaussian vectors (their section 3.3).
Reference code read: google-research/long-range-arena. Deviations: the w_j are drawn once, when the model is made; the
numbers stay in range without a look at other positions (see `key_features`), so that padding and the future change nothing.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from models.checks import check_option
from models.linear import KernelAttention

KERNELS = ("softmax", "relu")


class RandomFeatures(nnx.Variable):
    """Directions drawn with the parameters' seed and never trained."""


class Performer(KernelAttention):
    """Attention with random features.

    Args:
        width, num_heads, positions, causal: as in `MultiHead`. seq_len: L, not used.
        num_features: M; None, with kernel relu, takes queries and keys themselves in place of random projections.
        kernel: softmax | relu, max(w . x, 0) + 0.001 (their section 4.2, "generalised attention").
    Raises:
        ValueError: as `MultiHead`; an unknown kernel, M < 1, or no M with kernel softmax; the message names the config key.
    """

    turns_features = False

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
                "model.num_features=null takes no random features, which model.kernel=softmax needs"
            )
        if num_features is not None and num_features < 1:
            raise ValueError(f"model.num_features={num_features} must be at least 1")
        self.kernel = kernel
        self.num_features = width // num_heads if num_features is None else num_features
        self.directions = (
            None
            if num_features is None
            else RandomFeatures(
                orthogonal_features(rngs.params(), num_features, width // num_heads)
            )
        )

    def query_features(self, q: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        if self.kernel == "relu":
            return self.relu_features(q)
        exponent = self.exponent(q)
        # a factor of the query's own, which the quotient of the sums does not see
        return jnp.exp(exponent - jax.lax.stop_gradient(exponent.max(axis=-1, keepdims=True)))

    def key_features(self, k: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        """Keys share one factor, so theirs cannot be their own maximum; the published code takes that of all keys.

        None is needed against overflow: exponents are at most |w_j|^2 / 2, about W / 2, and the features are 1 in the mean
        over w. What is added keeps the total from 0 for a query that no feature fits; the published code adds it to queries
        too. Keys of more than twice the length sqrt(W) have features below it and weigh alike: docs/models/performer.md.
        """
        return self.relu_features(k) if self.kernel == "relu" else jnp.exp(self.exponent(k)) + 1e-6

    def exponent(self, x: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        x = x / x.shape[-1] ** 0.25
        # the factor 1 / sqrt(M) cancels
        return self.project(x) - 0.5 * jnp.square(x).sum(axis=-1, keepdims=True)

    def relu_features(self, x: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        return jax.nn.relu(self.project(x)) + 1e-3

    def project(self, x: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        return x if self.directions is None else x @ self.directions[...].T.astype(x.dtype)


def orthogonal_features(key: PRNGKeyArray, num_features: int, width: int) -> Float[Array, "M W"]:
    """Gaussian vectors, those of each block of W made orthogonal; each for itself is still N(0, I) (their section 3.3)."""
    key_direction, key_length = jax.random.split(key)
    blocks = math.ceil(num_features / width)
    # the second factor's signs make the first uniform over rotations, whatever the QR routine's convention
    q, r = jnp.linalg.qr(jax.random.normal(key_direction, (blocks, width, width)))
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    rows = jnp.swapaxes(q, 1, 2).reshape(blocks * width, width)[:num_features]
    length = jnp.linalg.norm(
        jax.random.normal(key_length, (num_features, width)), axis=1, keepdims=True
    )
    return rows * length
