"""What surrounds a mixer: encoder -> depth x [norm, mixer, activation, GLU, residual, MLP] -> pool -> head.

One backbone serves every model. A mixer is any callable `mixer(x (B, L, D), mask (B, L), *, train, rngs) -> (B, L, D)`
made by `mixer(width=D, seq_len=L, rngs=...)`; a model that wants its paper's own surroundings says so in the `recipe` of its
YAML. A mixer that gates the residual stream itself (`gates_residual`) is given it as `residual` and brings its own dropout.
Blocks as in the LRU paper (Orvieto et al. 2023, appendix C) and S5; the Transformer's as in Vaswani et al. 2017, pre-norm.

Padding never leaks: masked positions are left out of pooling and of batch-norm statistics, and mixers that look ahead get
the mask. Batch norm over real positions only is a deliberate difference from the published codes, whose statistics see padding.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.checks import check_option

NORMS = ("batch", "layer", "rms", "none")
ACTIVATIONS = {"none": lambda x: x, "gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
GLUS = ("full", "half1", "half2", "none")
MLPS = ("none", "gelu", "relu", "silu", "swiglu")
POOLS = ("mean", "last", "cls")
PAIR_HEADS = ("interact", "concat")
HEADS = ("linear", "mlp")
POSITIONS = ("none", "learned", "sinusoidal", "rotary")
PRECISIONS = {"float32": jnp.float32, "tf32": jnp.float32, "bf16": jnp.bfloat16}
# what a block keeps for the backward pass, of jax.checkpoint_policies
# (dots: products with weights, not those of one position with another, which grow as L^2)
REMATS = {
    "none": "everything_saveable",
    "block": "nothing_saveable",
    "dots": "dots_with_no_batch_dims_saveable",
}
REMATS |= {name: name for name in (*REMATS.values(), "dots_saveable")}


class Backbone(nnx.Module):
    """A stack of blocks around `mixer`, classifying sequences of tokens or of values.

    Args:
        mixer: makes one layer's mixer from `width`, `seq_len` and `rngs`.
        num_classes: C.
        seq_len: L, the padded length of the inputs.
        vocab_size: V of token inputs (B, L), or None for values (B, L, F) with F = `num_features`.
        num_pairs: 1, or 2 where an example is a pair of sequences that share this encoder.
        num_targets: 1, or T where the last T positions have a class each; they are not pooled then, and have to be real.
        pair_head: interact | concat, what the head of a pair sees of its two features u and v (S4's or the LRA paper's).
        norm: batch | layer | rms | none; `norm_position` pre | post (of the residual sum).
        activation, glu: what follows the mixer; GLU `full` doubles the width and gates, `half1`/`half2` are S5's.
        mlp: a second residual branch, as in a Transformer; `mlp_ratio` is its hidden width over D.
        dropout: rate, after the activation and after the GLU (once where there is none), and in and after the MLP.
        embedding_dropout: rate, after the embeddings and their positions.
        pool: mean | last over real positions, or cls (a learned token in front; for mixers that look ahead).
        positions: none | learned | sinusoidal are added to the encoder's output; rotary is left to the mixer.
        head: linear | mlp (one hidden layer of `mlp_ratio` D, ReLU: the LRA paper's); of a pair, `pair_head`'s.
        precision: float32 | tf32 | bf16. With bf16 the blocks see bfloat16, and so do their matrix products; parameters,
            encoder, statistics of norms, pooling and head stay float32. What a mixer keeps is its own affair.
        remat: none | block | dots | a policy's name: what each block keeps for the backward pass (`REMATS`).
    Raises:
        ValueError: an option is unknown, or the pool does not fit the mixer; the message names the config key.
    """

    def __init__(
        self,
        mixer: Callable[..., Any],
        *,
        num_classes: int,
        seq_len: int,
        vocab_size: int | None,
        num_features: int = 1,
        num_pairs: int = 1,
        num_targets: int = 1,
        pair_head: str = "interact",
        depth: int,
        width: int,
        norm: str,
        norm_position: str,
        norm_momentum: float | int,
        final_norm: bool,
        activation: str,
        glu: str,
        mlp: str,
        mlp_ratio: float | int,
        dropout: float | int,
        pool: str,
        positions: str,
        embedding_dropout: float | int = 0.0,
        head: str = "linear",
        precision: str = "float32",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_option("backbone.pool", pool, POOLS)
        check_option("backbone.head", head, HEADS)
        check_option("backbone.precision", precision, PRECISIONS)
        check_option("backbone.remat", remat, REMATS)
        check_option("backbone.norm_position", norm_position, ("pre", "post"))
        self.pool, self.num_pairs, self.num_targets, self.seq_len = (
            pool,
            num_pairs,
            num_targets,
            seq_len,
        )
        length = seq_len + (pool == "cls")
        self.encoder = (
            nnx.Linear(num_features, width, rngs=rngs)
            if vocab_size is None
            else Embedding(vocab_size, width, rngs=rngs)
        )
        self.cls = nnx.Param(rngs.params.normal((1, 1, width))) if pool == "cls" else None
        self.positions = (
            nnx.Param(0.02 * rngs.params.normal((length, width)))
            if positions == "learned"
            else None
        )
        self.sinusoidal = positions == "sinusoidal"
        if self.sinusoidal:
            sinusoids(1, width)  # refuses an odd width here already, before anything is trained
        self.embedding_dropout = nnx.Dropout(embedding_dropout)
        self.blocks = nnx.List(
            Block(
                mixer(width=width, seq_len=length, rngs=rngs),
                width=width,
                norm=norm,
                norm_position=norm_position,
                norm_momentum=norm_momentum,
                activation=activation,
                glu=glu,
                mlp=mlp,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                rngs=rngs,
            )
            for _ in range(depth)
        )
        check_option(
            "backbone.positions", positions, POSITIONS
        )  # after the mixer, whose key it mostly comes from
        if (positions == "rotary") != any(
            getattr(block.mixer, "rotary", False) for block in self.blocks
        ):
            raise ValueError(
                f"backbone.positions={positions} does not go with this mixer: rotary positions turn its queries and keys; "
                "set model.positions where the model has it, else backbone.positions other than rotary"
            )
        if pool == "cls" and any(getattr(block.mixer, "causal", False) for block in self.blocks):
            raise ValueError(
                "backbone.pool=cls puts the class token first, where a causal mixer sees nothing; use mean"
            )
        self.final_norm = Norm(norm, width, norm_momentum, rngs=rngs) if final_norm else None
        self.dtype, self.remat = PRECISIONS[precision], remat
        if self.dtype != jnp.float32:
            follow_inputs(self.blocks)
        self.head: Any = (
            PairHead(width, num_classes, pair_head, rngs=rngs)
            if num_pairs > 1
            else MLPHead(width, round(mlp_ratio * width), num_classes, rngs=rngs)
            if head == "mlp"
            else nnx.Linear(width, num_classes, rngs=rngs)
        )

    def __call__(
        self,
        inputs: Array,
        lengths: Int[Array, "*B"],
        *,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B *T C"]:
        """Logits of a batch.

        Args:
            inputs: ids (B, L) or values (B, L, F); (B, 2, L[, F]) for pairs.
            lengths: real positions of each sequence, (B,) or (B, 2).
            train: dropout on, batch norm by this batch's statistics (the running ones are updated).
            rngs: a stream named `dropout`, needed in training.
        """
        if self.num_pairs == 1:
            return self.head(self.features(inputs, lengths, train=train, rngs=rngs))
        # both documents go through as one batch, so that they share batch-norm statistics
        flat_inputs = inputs.reshape(-1, *inputs.shape[2:])
        flat = self.features(flat_inputs, lengths.reshape(-1), train=train, rngs=rngs)
        return self.head(flat.reshape(inputs.shape[0], self.num_pairs, -1))

    def features(
        self, inputs: Array, lengths: Int[Array, " B"], *, train: bool, rngs: nnx.Rngs | None
    ) -> Float[Array, "B *T D"]:
        """Pooled representation of each sequence, or that of each of its last T positions."""
        if inputs.shape[1] != self.seq_len:
            raise ValueError(
                f"inputs have length {inputs.shape[1]}, the model was built for task.seq_len={self.seq_len}"
            )
        x = self.encoder(inputs)  # (B, L, D)
        mask = jnp.arange(inputs.shape[1])[None, :] < lengths[:, None]
        if self.cls is not None:
            x = jnp.concatenate(
                [jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[2])), x], axis=1
            )
            mask = jnp.concatenate([jnp.ones((x.shape[0], 1), bool), mask], axis=1)
        if self.positions is not None:
            x = x + self.positions[...][None]
        if self.sinusoidal:
            x = x + jnp.asarray(sinusoids(x.shape[1], x.shape[2]), x.dtype)[None]
        x = self.embedding_dropout(x.astype(self.dtype), deterministic=not train, rngs=rngs)
        for block in self.blocks:
            x = rematerialised(block, self.remat if train else "none")(
                x, mask, train=train, rngs=rngs
            )
        x = x.astype(jnp.float32)  # a mean over thousands of positions needs its digits
        if self.final_norm is not None:
            x = self.final_norm(x, mask, train=train)
        return pool(x, mask, self.pool) if self.num_targets == 1 else x[:, -self.num_targets :]


class Embedding(nnx.Module):
    """Ids (B, L) -> (B, L, D) as a product with one-hot rows: the gradient of a look-up is a sum in no fixed order on a GPU."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(rngs.params.normal((vocab_size, width)))

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        table = self.table[...]
        rows = jax.nn.one_hot(ids, table.shape[0], dtype=table.dtype)
        return jnp.matmul(rows, table, precision="highest")  # tf32 would round the table


class Block(nnx.Module):
    """One residual layer: the mixer's branch, and an MLP branch where the model has one."""

    def __init__(
        self,
        mixer: Callable[..., Any],
        *,
        width: int,
        norm: str,
        norm_position: str,
        norm_momentum: float | int,
        activation: str,
        glu: str,
        mlp: str,
        mlp_ratio: float | int,
        dropout: float | int,
        rngs: nnx.Rngs,
    ):
        check_option("backbone.activation", activation, ACTIVATIONS)
        self.mixer, self.prenorm, self.activation = mixer, norm_position == "pre", activation
        self.gates_residual = getattr(mixer, "gates_residual", False)
        if self.gates_residual and (activation, glu) != ("none", "none"):
            raise ValueError(
                f"backbone.activation={activation}, backbone.glu={glu}: this mixer has its own gates; set both to none"
            )
        self.norm = Norm(norm, width, norm_momentum, rngs=rngs)
        self.glu = GLU(glu, width, rngs=rngs)
        self.mlp = None if mlp == "none" else MLP(mlp, width, round(mlp_ratio * width), rngs=rngs)
        self.mlp_norm = None if mlp == "none" else Norm(norm, width, norm_momentum, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        *,
        train: bool,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "B L D"]:
        def drop(y):
            return self.dropout(y, deterministic=not train, rngs=rngs)

        def mix(y):
            if self.gates_residual:
                return self.mixer(y, mask, residual=x, train=train, rngs=rngs).astype(x.dtype)
            # a mixer that multiplies by its parameters as they are returns float32 whatever it was given
            y = self.mixer(y, mask, train=train, rngs=rngs).astype(x.dtype)
            act = ACTIVATIONS[self.activation]
            if self.glu.linear is None:
                return drop(act(y))  # twice would drop 1 - (1 - rate)^2
            return drop(self.glu(y, lambda z: drop(act(z))))

        x = self.residual(x, mix, self.norm, mask, train)
        if self.mlp is not None:
            x = self.residual(x, lambda y: drop(self.mlp(y, drop)), self.mlp_norm, mask, train)
        return x

    def residual(self, x, branch, norm, mask, train):
        if self.prenorm:
            return x + branch(norm(x, mask, train=train))
        return norm(x + branch(x), mask, train=train)


class Norm(nnx.Module):
    """Normalisation by name; batch norm takes its statistics over real positions only."""

    def __init__(self, kind: str, width: int, momentum: float | int, *, rngs: nnx.Rngs):
        check_option("backbone.norm", kind, NORMS)
        self.norm: Any = {
            "batch": lambda: nnx.BatchNorm(width, momentum=momentum, epsilon=1e-5, rngs=rngs),
            "layer": lambda: nnx.LayerNorm(width, rngs=rngs),
            "rms": lambda: nnx.RMSNorm(width, rngs=rngs),
            "none": lambda: None,
        }[kind]()

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], *, train: bool
    ) -> Float[Array, "B L D"]:
        if self.norm is None:
            return x
        if isinstance(self.norm, nnx.BatchNorm):
            return self.norm(x, use_running_average=not train, mask=mask[..., None]).astype(x.dtype)
        return self.norm(x).astype(x.dtype)  # its float32 parameters have made it one


class GLU(nnx.Module):
    """Gated linear unit after the mixer, with `act` (activation and dropout) in front: full, S5's halves, or none."""

    def __init__(self, kind: str, width: int, *, rngs: nnx.Rngs):
        check_option("backbone.glu", kind, GLUS)
        self.kind = kind
        self.linear = (
            None
            if kind == "none"
            else nnx.Linear(width, 2 * width if kind == "full" else width, rngs=rngs)
        )

    def __call__(
        self, x: Float[Array, "B L D"], act: Callable[[Array], Array]
    ) -> Float[Array, "B L D"]:
        y = act(x)
        if self.linear is None:
            return y
        if self.kind == "full":
            value, gate = jnp.split(self.linear(y), 2, axis=-1)
            return value * jax.nn.sigmoid(gate)
        gate = jax.nn.sigmoid(self.linear(y))
        return (y if self.kind == "half1" else x) * gate


class MLP(nnx.Module):
    """The Transformer's position-wise branch; `swiglu` gates (Shazeer 2020)."""

    def __init__(self, kind: str, width: int, hidden: int, *, rngs: nnx.Rngs):
        check_option("backbone.mlp", kind, MLPS)
        self.kind = kind
        self.up = nnx.Linear(width, 2 * hidden if kind == "swiglu" else hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], drop: Callable[[Array], Array]
    ) -> Float[Array, "B L D"]:
        y = self.up(x)
        if self.kind == "swiglu":
            value, gate = jnp.split(y, 2, axis=-1)
            y = value * jax.nn.silu(gate)
        else:
            y = ACTIVATIONS[self.kind](y)
        return self.down(drop(y))


class MLPHead(nnx.Module):
    """The LRA paper's head: one hidden layer with ReLU."""

    def __init__(self, width: int, hidden: int, num_classes: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(width, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, num_classes, rngs=rngs)

    def __call__(self, features: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        return self.output(jax.nn.relu(self.hidden(features)))


class PairHead(nnx.Module):
    """Features u, v of a pair -> logits: [u, v, u-v, u*v] (S4's) or [u, v] (the LRA paper's), and a two-layer MLP."""

    def __init__(self, width: int, num_classes: int, kind: str, *, rngs: nnx.Rngs):
        check_option("backbone.pair_head", kind, PAIR_HEADS)
        self.kind = kind
        self.hidden = nnx.Linear((4 if kind == "interact" else 2) * width, 2 * width, rngs=rngs)
        self.output = nnx.Linear(2 * width, num_classes, rngs=rngs)

    def __call__(self, features: Float[Array, "B 2 D"]) -> Float[Array, "B C"]:
        u, v = features[:, 0], features[:, 1]
        seen = [u, v, u - v, u * v] if self.kind == "interact" else [u, v]
        return self.output(jax.nn.gelu(self.hidden(jnp.concatenate(seen, axis=-1))))


def pool(x: Float[Array, "B L D"], mask: Bool[Array, "B L"], kind: str) -> Float[Array, "B D"]:
    """One vector a sequence: the mean or the last of its real positions, or the first (the class token)."""
    if kind == "cls":
        return x[:, 0]
    if kind == "last":
        last = mask.sum(axis=1) - 1
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    weights = mask.astype(x.dtype)
    # an empty sequence pools to zero instead of 0/0
    return jnp.einsum("bld,bl->bd", x, weights) / jnp.maximum(weights.sum(axis=1), 1.0)[:, None]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Sinusoidal positions (L, D): sin on even channels, cos on odd ones, periods 2 pi to 10,000 x 2 pi (Vaswani 2017)."""
    if width % 2:
        raise ValueError(
            f"backbone.positions=sinusoidal needs an even backbone.width, found {width}"
        )
    angles = np.arange(length)[:, None] / 10_000.0 ** (np.arange(0, width, 2)[None, :] / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width)


def follow_inputs(module: nnx.Module) -> None:
    """Make every linear map inside of `module` multiply and answer in the dtype of its inputs, not in the wider of both."""
    for _, part in nnx.iter_modules(module):
        if (
            isinstance(part, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv)
            and part.dtype is None
        ):
            part.promote_dtype = to_first
            part.__class__ = answering_alike(type(part))


def to_first(arrays: Any, /, **_: Any) -> Any:
    """(inputs, kernel, bias), the kernel in the dtype of the inputs. Not the bias, whose gradient is a sum over B L terms."""
    inputs, kernel, bias = arrays
    return inputs, kernel.astype(inputs.dtype), bias


@cache
def answering_alike(kind: type) -> type:
    """`kind` of linear map whose result has the dtype of its inputs, whatever its bias made of it."""

    def call(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        return kind.__call__(self, inputs, *args, **kwargs).astype(inputs.dtype)

    return type(kind.__name__, (kind,), {"__call__": call})


def rematerialised(block: Callable[..., Array], policy: str) -> Callable[..., Array]:
    """`block`, which keeps for the backward pass what `policy` says and computes the rest of it again."""
    if policy == "none":
        return block

    def call(x, mask, *, train, rngs):
        rerun = nnx.remat(
            lambda block, x, mask, rngs: block(x, mask, train=train, rngs=rngs),
            policy=getattr(jax.checkpoint_policies, REMATS[policy]),
        )
        return rerun(block, x, mask, rngs)

    return call
