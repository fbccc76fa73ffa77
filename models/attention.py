"""Multi-head softmax attention with a padding mask.

The backbone adds learned and sinusoidal positions to the embeddings (`backbone.positions`); rotary
positions (Su et al. 2021, arXiv 2104.09864) are applied to queries and keys here.

Paper: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), equation (1). Reference
code read: google-research/long-range-arena. Deviations: docs/models/transformer.md.
"""

from flax import nnx
from jaxtyping import Array, Int

from models.backbone import POSITIONS
from models.checks import check_option
from models.layers import Linear
from models.mixer import Mask, MixerModule, Sequences
from models.ops.attention import Heads, attention
from models.ops.positions import rotate


class MultiHead(MixerModule):
    """Projections to H heads and back, without biases; subclasses implement `attend` between them.

    Args:
        num_heads: H; the head width W must be even for rotary positions.
        positions: learned | sinusoidal | rotary | none; only rotary has an effect here.
        causal: whether a position attends only to itself and earlier positions.
        qkv_width: H W, divisible by H; None for D.
    Raises:
        ValueError: the heads do not divide the width, or positions are unknown.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        positions: str,
        causal: bool,
        qkv_width: int | None = None,
        rngs: nnx.Rngs,
    ):
        check_option("model.positions", positions, POSITIONS)
        key, inner = "model.qkv_width", qkv_width
        if inner is None:
            key, inner = "backbone.width", width
        if num_heads < 1 or inner < 1 or inner % num_heads:
            raise ValueError(
                f"model.num_heads={num_heads} must be at least 1 and divide {key}={inner}"
            )
        if positions == "rotary" and (inner // num_heads) % 2:
            raise ValueError(
                f"model.positions=rotary needs an even head width, found "
                f"{key}/model.num_heads = {inner // num_heads}"
            )
        self.num_heads, self.rotary, self.causal = num_heads, positions == "rotary", causal
        self.qkv = Linear(width, 3 * inner, use_bias=False, rngs=rngs)
        self.output = Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        return self.project_output(self.attend(*self.project_qkv(x), mask)).astype(x.dtype)

    def attend(self, q: Heads, k: Heads, v: Heads, mask: Mask) -> Heads:
        """Weighted means of the values; rotary positions are not applied to `q` and `k` yet."""
        raise NotImplementedError

    def project_qkv(self, x: Sequences) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each (B, L, H, W)."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def project_output(self, y: Heads) -> Sequences:
        return self.output(y.reshape(*y.shape[:2], -1))

    def apply_rotary(self, x: Heads, first: int | Int[Array, ""] = 0) -> Heads:
        """`x` with rotary positions `first`, `first` + 1, ..., if the mixer is rotary; else `x`."""
        return rotate(x, first=first) if self.rotary else x


class Attention(MultiHead):
    """Multi-head self-attention.

    Args:
        width, num_heads, positions, causal, qkv_width: as in `MultiHead`.
        seq_len: L.
        attention_dropout: dropout rate of the attention weights.
        max_len: the longest L that is accepted, None for any.
    Raises:
        ValueError: as `MultiHead`; L > max_len, or a rate outside of [0, 1).
    """

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        num_heads: int,
        qkv_width: int | None,
        positions: str,
        causal: bool,
        attention_dropout: float | int,
        max_len: int | None,
        rngs: nnx.Rngs,
    ):
        if max_len is not None and seq_len > max_len:
            raise ValueError(
                f"task.seq_len={seq_len} is longer than model.max_len={max_len}; "
                "raise model.max_len or shorten the task"
            )
        if not 0 <= attention_dropout < 1:
            raise ValueError(
                f"model.attention_dropout={attention_dropout} must be a number in [0, 1)"
            )
        super().__init__(
            width,
            num_heads=num_heads,
            positions=positions,
            causal=causal,
            qkv_width=qkv_width,
            rngs=rngs,
        )
        self.attention_dropout = attention_dropout

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        q, k, v = self.project_qkv(x)
        q, k = self.apply_rotary(q), self.apply_rotary(k)
        dropout = self.attention_dropout if train else 0.0
        key = rngs.dropout() if dropout and rngs is not None else None
        y = attention(q, k, v, mask, causal=self.causal, dropout=dropout, key=key)
        return self.project_output(y).astype(x.dtype)
