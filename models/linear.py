"""Linear attention and its interface for other feature maps.

    y_t = sum_s phi(q_t) . phi(k_s) v_s / sum_s phi(q_t) . phi(k_s),   phi(x) = elu(x) + 1

(equations 4 and 7), over all positions (5, 6) or, if causal, over s <= t (8 to 12). The causal form
is a recurrent network (16 to 20).

Paper: Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236). Reference code read:
google-research/long-range-arena. Deviation: its sums include padding; here masked keys have weight
0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.attention import MultiHead
from models.checks import at_least_float32, require_causal
from models.mixer import Mask
from models.ops.attention import Heads
from models.ops.batch_sharding import local_batch_size
from models.ops.blocks import merge_blocks, split_blocks
from models.ops.linear_attention import EPSILON, block_rows, causal_sums, weight_totals


class KernelState(NamedTuple):
    """The recurrent state: sums over the keys read so far."""

    values: Float[Array, "B H M W"]  # sum_s phi(k_s) v_s^T
    keys: Float[Array, "B H M"]  # sum_s phi(k_s)
    time: Int[Array, ""]  # positions read so far


class KernelAttention(MultiHead):
    """Attention with weights phi(q) . phi(k) >= 0.

    Subclasses implement the features of queries and keys. The causal form is recurrent
    (`init_state`, `step`). Features and states are at least float32.
    """

    # Whether rotary positions are applied to the features (Su et al. 2021, equation 19: in the
    # numerator only, so that the sum of the weights stays positive) or to queries and keys.
    rotates_features: bool
    num_features: int  # M

    def query_features(self, q: Heads) -> Float[Array, "B L H M"]:
        raise NotImplementedError

    def key_features(self, k: Heads) -> Float[Array, "B L H M"]:
        raise NotImplementedError

    def attend(self, q: Heads, k: Heads, v: Heads, mask: Mask) -> Heads:
        if not self.causal:
            return self.attend_bidirectional(q, k, v, mask)
        q, k, rotated_q, rotated_k = self.features(q, k)
        # keys at padding have weight 0, in the numerator and in the denominator
        k, rotated_k = (jnp.where(mask[:, :, None, None], x, 0) for x in (k, rotated_k))
        sums = causal_sums(rotated_q, rotated_k, v.astype(q.dtype))
        return sums / (weight_totals(q, k) + EPSILON)[..., None]

    def attend_bidirectional(self, q: Array, k: Array, v: Array, mask: Array) -> Heads:
        """The quotient of sums over all positions, one block of positions at a time.

        The backward pass recomputes the features of each block; autodiff would save several copies
        of the features, which are M / W times as large as queries and keys.
        """
        batch, length, heads, width = q.shape
        rows = block_rows(length, local_batch_size(batch) * heads * self.num_features)
        dtype = at_least_float32(q).dtype

        def blocks(x: Array) -> Array:
            return jnp.moveaxis(split_blocks(x, rows), 1, 0)  # (blocks, B, rows, ...)

        @jax.checkpoint
        def add(
            state: tuple[Array, Array], parts: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], None]:
            first, k, v, real = parts
            features = self.features(k, k, first)
            # keys at padding and in the fill have weight 0, in the numerator and in the denominator
            k, rotated = (jnp.where(real[:, :, None, None], features[i], 0) for i in (1, 3))
            values = state[0] + jnp.einsum("blhm,blhw->bhmw", rotated, v.astype(dtype))
            return (values, state[1] + k.sum(axis=1)), None

        @jax.checkpoint
        def read(first: Array, q: Array, values: Array, keys: Array) -> Array:
            features = self.features(q, q, first)
            total = jnp.einsum("blhm,bhm->blh", features[0], keys)
            return jnp.einsum("blhm,bhmw->blhw", features[2], values) / (total + EPSILON)[..., None]

        firsts = rows * jnp.arange(-(-length // rows))
        start = jnp.zeros((batch, heads, self.num_features, width), dtype)
        (values, keys), _ = jax.lax.scan(
            add, (start, start[..., 0]), (firsts, blocks(k), blocks(v), blocks(mask))
        )
        y = jax.lax.map(lambda parts: read(*parts, values, keys), (firsts, blocks(q)))
        return merge_blocks(jnp.moveaxis(y, 0, 1), length)

    def features(
        self, q: Array, k: Array, first: int | Int[Array, ""] = 0
    ) -> tuple[Array, Array, Array, Array]:
        """Features from position `first` on: q, k of the denominator, then of the numerator."""
        q, k = at_least_float32(q), at_least_float32(k)
        if self.rotates_features:
            q, k = self.query_features(q), self.key_features(k)
            return q, k, self.apply_rotary(q, first), self.apply_rotary(k, first)
        q = self.query_features(self.apply_rotary(q, first))
        k = self.key_features(self.apply_rotary(k, first))
        return q, k, q, k

    def init_state(self, batch_size: int) -> KernelState:
        """The state before the first input, zero; a ValueError if the model is not causal."""
        require_causal(self.causal, "model.causal=false", "model.causal=true")
        head_width = self.output.in_features // self.num_heads
        sums = jnp.zeros((batch_size, self.num_heads, self.num_features, head_width))
        return KernelState(sums, sums[..., 0], jnp.int32(0))

    def step(
        self, state: KernelState, u_t: Float[Array, "B D"]
    ) -> tuple[KernelState, Float[Array, "B D"]]:
        """The next state and output, equations (16) to (20) without the residual."""
        q, k, v = self.project_qkv(u_t[:, None])
        q, k, rotated_q, rotated_k = (x[:, 0] for x in self.features(q, k, state.time))  # (B, H, M)
        values = state.values + jnp.einsum("bhm,bhw->bhmw", rotated_k, v[:, 0].astype(q.dtype))
        keys = state.keys + k
        total = jnp.einsum("bhm,bhm->bh", q, keys)
        y = jnp.einsum("bhm,bhmw->bhw", rotated_q, values) / (total + EPSILON)[..., None]
        y = self.project_output(y[:, None])[:, 0]
        return KernelState(values, keys, state.time + 1), y.astype(u_t.dtype)


class LinearAttention(KernelAttention):
    """Attention with the feature map elu(x) + 1.

    Args:
        width, num_heads, positions, causal: as in `MultiHead`.
    Raises:
        ValueError: as `MultiHead`.
    """

    rotates_features = True

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_heads: int,
        positions: str,
        causal: bool,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, num_heads=num_heads, positions=positions, causal=causal, rngs=rngs)
        self.num_features = width // num_heads

    def query_features(self, q: Heads) -> Float[Array, "B L H M"]:
        return jax.nn.elu(q) + 1

    def key_features(self, k: Heads) -> Float[Array, "B L H M"]:
        return jax.nn.elu(k) + 1
