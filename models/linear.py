"""Linear attention of Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236).

y_t = sum_s phi(q_t) . phi(k_s) v_s / sum_s phi(q_t) . phi(k_s),  phi(x) = elu(x) + 1   (their equations 4 and 7),
over all positions (5, 6) or, causal, over s <= t (8 to 12), where it is a recurrent network (16 to 20).
Reference code read: google-research/long-range-arena. That one leaves padding in the sums; here masked keys have no weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.attention import MultiHead
from models.checks import at_least_float32, refuse_to_stream
from models.ops.blocks import cut, joined
from models.ops.by_example import own_examples
from models.ops.linear_attention import EPSILON, block_rows, causal_sums, weight_totals


class KernelState(NamedTuple):
    """What is left of the past: sums over its keys, which do not grow with time."""

    values: Float[Array, "B H M W"]  # sum_s phi(k_s) v_s^T
    keys: Float[Array, "B H M"]  # sum_s phi(k_s)
    time: Int[Array, ""]  # positions read so far


class KernelAttention(MultiHead):
    """Interface: attention with weights phi(q) . phi(k) >= 0; a model writes the features of queries and of keys.

    The causal one has a recurrent form, `init_state` and `step`. Features and states are at least float32.
    """

    # Whether rotary positions turn the features (Su et al. 2021, equation 19: in the numerator alone, so that the sum of
    # the weights stays positive) or, before them, queries and keys.
    turns_features: bool
    num_features: int  # M

    def query_features(self, q: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        raise NotImplementedError

    def key_features(self, k: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        raise NotImplementedError

    def attend(
        self,
        q: Float[Array, "B L H W"],
        k: Float[Array, "B L H W"],
        v: Float[Array, "B L H W"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B L H W"]:
        if not self.causal:
            return self.over_all(q, k, v, mask)
        q, k, turned_q, turned_k = self.features(q, k)
        # a key that is padding weighs nothing, in the values and in the total
        k, turned_k = (jnp.where(mask[:, :, None, None], x, 0) for x in (k, turned_k))
        return (
            causal_sums(turned_q, turned_k, v.astype(q.dtype))
            / (weight_totals(q, k) + EPSILON)[..., None]
        )

    def over_all(self, q: Array, k: Array, v: Array, mask: Array) -> Float[Array, "B L H W"]:
        """The quotient of sums over all positions, a block of positions at a time.

        Features are M / W times as large as what they are made from, and autodiff would keep several copies: a block's are
        taken again in the backward pass, so that memory does not grow with M.
        """
        batch, length, heads, width = q.shape
        rows = block_rows(length, own_examples(batch) * heads * self.num_features)
        wide = at_least_float32(q).dtype

        def blocks(x: Array) -> Array:
            return jnp.moveaxis(cut(x, rows), 1, 0)  # (blocks, B, rows, ...)

        @jax.checkpoint
        def add(
            state: tuple[Array, Array], parts: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], None]:
            first, k, v, seen = parts
            features = self.features(k, k, first)
            # a key that is padding, or stands after the end, weighs nothing, in the values and in the total
            k, turned = (jnp.where(seen[:, :, None, None], features[i], 0) for i in (1, 3))
            values = state[0] + jnp.einsum("blhm,blhw->bhmw", turned, v.astype(wide))
            return (values, state[1] + k.sum(axis=1)), None

        @jax.checkpoint
        def read(first: Array, q: Array, values: Array, keys: Array) -> Array:
            features = self.features(q, q, first)
            total = jnp.einsum("blhm,bhm->blh", features[0], keys)
            return jnp.einsum("blhm,bhmw->blhw", features[2], values) / (total + EPSILON)[..., None]

        firsts = rows * jnp.arange(-(-length // rows))
        start = jnp.zeros((batch, heads, self.num_features, width), wide)
        (values, keys), _ = jax.lax.scan(
            add, (start, start[..., 0]), (firsts, blocks(k), blocks(v), blocks(mask))
        )
        y = jax.lax.map(lambda parts: read(*parts, values, keys), (firsts, blocks(q)))
        return joined(jnp.moveaxis(y, 0, 1), length)

    def features(
        self, q: Array, k: Array, first: int | Int[Array, ""] = 0
    ) -> tuple[Array, Array, Array, Array]:
        """Features of queries and keys from position `first` on: as the total weighs them, and as the values'."""
        q, k = at_least_float32(q), at_least_float32(k)
        if self.turns_features:
            q, k = self.query_features(q), self.key_features(k)
            return q, k, self.turn(q, first), self.turn(k, first)
        q, k = self.query_features(self.turn(q, first)), self.key_features(self.turn(k, first))
        return q, k, q, k

    def init_state(self, batch_size: int) -> KernelState:
        """Nothing read yet.

        Raises:
            ValueError: the model looks ahead.
        """
        refuse_to_stream(self.causal, "model.causal=false", "model.causal=true")
        head_width = self.output.in_features // self.num_heads
        sums = jnp.zeros((batch_size, self.num_heads, self.num_features, head_width))
        return KernelState(sums, sums[..., 0], jnp.int32(0))

    def step(
        self, state: KernelState, u_t: Float[Array, "B D"]
    ) -> tuple[KernelState, Float[Array, "B D"]]:
        """Read one position; equations (16) to (20) without the residual."""
        q, k, v = self.heads(u_t[:, None])
        q, k, turned_q, turned_k = (x[:, 0] for x in self.features(q, k, state.time))  # (B, H, M)
        values = state.values + jnp.einsum("bhm,bhw->bhmw", turned_k, v[:, 0].astype(q.dtype))
        keys = state.keys + k
        total = jnp.einsum("bhm,bhm->bh", q, keys)
        y = jnp.einsum("bhm,bhmw->bhw", turned_q, values) / (total + EPSILON)[..., None]
        return KernelState(values, keys, state.time + 1), self.join(y[:, None])[:, 0].astype(
            u_t.dtype
        )


class LinearAttention(KernelAttention):
    """Attention with the feature map elu(x) + 1.

    Args:
        width, num_heads, positions, causal: as in `MultiHead`. seq_len: L, not used.
    Raises:
        ValueError: the heads do not divide the width, or positions are unknown; the message names the config key.
    """

    turns_features = True

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

    def query_features(self, q: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        return jax.nn.elu(q) + 1

    def key_features(self, k: Float[Array, "B L H W"]) -> Float[Array, "B L H M"]:
        return jax.nn.elu(k) + 1
