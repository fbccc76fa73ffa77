"""Softmax attention, the mixer of the Transformer (Vaswani et al. 2017), with a padding mask and optional rotary positions.

Learned and sinusoidal positions are added to the embeddings by the backbone (`backbone.positions`); rotary ones (Su et al. 2021)
turn queries and keys here. The MLP branch is the backbone's too (`backbone.mlp`).
"""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.ops.positions import rotate


class Attention(nnx.Module):
    """Multi-head self-attention.

    Args:
        width: D, divisible by `num_heads`. seq_len: L.
        num_heads: H; the head width D/H must be even for rotary positions.
        positions: learned | sinusoidal | rotary | none; only rotary acts here.
        causal: whether a position sees only itself and the past.
        max_len: longest sequence the model accepts, None for any.
    Raises:
        ValueError: the heads do not divide the width, or L > max_len; the message names the config key.
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_heads: int,
        positions: str,
        causal: bool,
        max_len: int | None,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"model.num_heads={num_heads} must be at least 1 and divide backbone.width={width}")
        if positions == "rotary" and (width // num_heads) % 2:
            raise ValueError(
                f"model.positions=rotary needs an even head width, found backbone.width/model.num_heads = {width // num_heads}"
            )
        if max_len is not None and seq_len > max_len:
            raise ValueError(
                f"task.seq_len={seq_len} is longer than model.max_len={max_len}; raise model.max_len or shorten the task"
            )
        self.num_heads, self.rotary, self.causal = num_heads, positions == "rotary", causal
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B L D"]:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, L, H, D/H)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :], is_causal=self.causal)
        return self.output(y.reshape(batch, length, width))
