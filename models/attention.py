"""Softmax attention, the mixer of the Transformer (Vaswani et al. 2017), with a padding mask and optional rotary positions.

Learned and sinusoidal positions are added to the embeddings by the backbone (`backbone.positions`); rotary ones (Su et al. 2021)
turn queries and keys here. The MLP branch is the backbone's too (`backbone.mlp`). `MultiHead` is what every kind of attention in
this package shares: the projections and the heads.
"""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.backbone import POSITIONS, check_option
from models.ops.positions import rotate


class MultiHead(nnx.Module):
    """Interface: projections to H heads and back, without biases; a kind of attention writes `attend` between them.

    Args:
        width: D, divisible by `num_heads`.
        num_heads: H; the head width W = D/H must be even for rotary positions.
        positions: learned | sinusoidal | rotary | none; only rotary acts here.
        causal: whether a position sees only itself and the past.
    Raises:
        ValueError: the heads do not divide the width, or positions are unknown; the message names the config key.
    """

    def __init__(self, width: int, *, num_heads: int, positions: str, causal: bool, rngs: nnx.Rngs):
        check_option("model.positions", positions, POSITIONS)
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"model.num_heads={num_heads} must be at least 1 and divide backbone.width={width}")
        if positions == "rotary" and (width // num_heads) % 2:
            raise ValueError(
                f"model.positions=rotary needs an even head width, found backbone.width/model.num_heads = {width // num_heads}"
            )
        self.num_heads, self.rotary, self.causal = num_heads, positions == "rotary", causal
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B L D"]:
        q, k, v = self.heads(x)
        return self.output(self.attend(q, k, v, mask).reshape(x.shape)).astype(x.dtype)

    def attend(
        self,
        q: Float[Array, "B L H W"],
        k: Float[Array, "B L H W"],
        v: Float[Array, "B L H W"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B L H W"]:
        """What each position reads from the values; queries and keys come without positions."""
        raise NotImplementedError

    def heads(self, x: Float[Array, "B L D"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each (B, L, H, W)."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def turn(self, x: Float[Array, "B L H W"], first: int | Int[Array, ""] = 0) -> Float[Array, "B L H W"]:
        """Rotary positions `first`, `first` + 1, ... where the model has them."""
        return rotate(x, first=first) if self.rotary else x


class Attention(MultiHead):
    """Multi-head self-attention.

    Args:
        width, num_heads, positions, causal: as in `MultiHead`. seq_len: L.
        max_len: longest sequence the model accepts, None for any.
    Raises:
        ValueError: as `MultiHead`, or L > max_len; the message names the config key.
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
        if max_len is not None and seq_len > max_len:
            raise ValueError(
                f"task.seq_len={seq_len} is longer than model.max_len={max_len}; raise model.max_len or shorten the task"
            )
        super().__init__(width, num_heads=num_heads, positions=positions, causal=causal, rngs=rngs)

    def attend(
        self,
        q: Float[Array, "B L H W"],
        k: Float[Array, "B L H W"],
        v: Float[Array, "B L H W"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B L H W"]:
        q, k = self.turn(q), self.turn(k)
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :], is_causal=self.causal)
