"""The network around a mixer: encoder, blocks of norm, mixer, GLU and MLP, pooling and head.

The `recipe` in a model's YAML sets the options that its paper uses. Blocks follow the LRU paper
(Orvieto et al. 2023, appendix C) and S5; the Transformer's follow Vaswani et al. 2017, with the
norm before the branch.

Padding never changes a real position: pooling and batch-norm statistics exclude masked positions,
and non-causal mixers use the mask. Batch norm over real positions is a deliberate difference from
the published codes, whose statistics include padding.

The blocks compute in the dtype of their inputs, which `precision` sets once, after the encoder.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.checks import check_option
from models.layers import Linear
from models.mixer import Mask, Mixer, MixerFactory, Sequences

NORMS = ("batch", "layer", "rms", "none")
ACTIVATIONS = {"none": lambda x: x, "gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
GLUS = ("full", "half1", "half2", "none")
MLPS = ("none", "gelu", "relu", "silu", "swiglu")
POOLS = ("mean", "last", "cls")
PAIR_HEADS = ("interact", "concat")
HEADS = ("linear", "mlp")
INITS = ("flax", "mega")
POSITIONS = ("none", "learned", "sinusoidal", "rotary")
PRECISIONS = {"float32": jnp.float32, "tf32": jnp.float32, "bf16": jnp.bfloat16}
# Names of jax.checkpoint_policies. `dots` saves products with weights, but not products of one
# position with another, which grow as L^2.
REMATS = {
    "none": "everything_saveable",
    "block": "nothing_saveable",
    "dots": "dots_with_no_batch_dims_saveable",
}
REMATS |= {name: name for name in (*REMATS.values(), "dots_saveable")}


class Backbone(nnx.Module):
    """A stack of blocks around `mixer` that classifies sequences of tokens or of values.

    Args:
        mixer: makes the mixer of one layer from `width`, `seq_len` and `rngs`.
        seq_len: the padded length of the inputs.
        vocab_size: V of token inputs (B, L), or None for values (B, L, F) with F = `num_features`.
        num_pairs: 1, or 2 if an example is a pair of sequences; both use this encoder.
        num_targets: 1, or T if each of the last T positions, which must be real, has a class.
        pair_head: interact | concat, the input of a pair's head: S4's features or the LRA paper's;
            `pair_head_ratio` is its hidden width over D.
        norm: batch | layer | rms | none; `norm_position` pre | post (of the residual sum).
        activation, glu: applied after the mixer; GLU `full` doubles the width and gates,
            `half1` and `half2` are S5's.
        mlp: a second residual branch, as in a Transformer; `mlp_ratio` is its hidden width over D.
        dropout: rate, after the activation and after the GLU (once if there is no GLU), and in and
            after the MLP; `embedding_dropout` after the embeddings and their positions.
        tie_dropout: one dropout mask for all positions of a sequence inside the blocks.
        pool: mean | last of the real positions | cls (a learned token in front; not causal).
        positions: none | learned | sinusoidal (added to the encoding) | rotary (by the mixer).
        head: linear | mlp (one hidden layer of `mlp_ratio` D, as in the LRA paper).
        head_activation: gelu | relu | silu, of a head's hidden layer; None is gelu for a pair's
            head and relu for mlp.
        init: flax | mega, of the encoder, the MLPs and the head: Flax's and a standard normal
            embedding, or those of Mega's code (`mega_init`).
        mask_zeros: also hides positions with id 0 from the mixers, as the code of the LRA paper
            does, in which 0 is padding and black; they are pooled. Not with bf16, because flash
            attention takes lengths instead of a mask.
        precision: float32 | tf32 | bf16. With bf16 the activations and the matrix products of the
            blocks are bfloat16; parameters, encoder, norm statistics, pooling and head stay
            float32. A mixer chooses the dtype of its own states and sums.
        remat: what each block saves for the backward pass, a key of `REMATS`.
    Raises:
        ValueError: an option is unknown or does not fit the mixer.
    """

    def __init__(
        self,
        mixer: MixerFactory,
        *,
        num_classes: int,
        seq_len: int,
        vocab_size: int | None,
        num_features: int = 1,
        num_pairs: int = 1,
        num_targets: int = 1,
        pair_head: str = "interact",
        pair_head_ratio: float | int = 2,
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
        tie_dropout: bool = False,
        head: str = "linear",
        head_activation: str | None = None,
        init: str = "flax",
        mask_zeros: bool = False,
        precision: str = "float32",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_option("backbone.pool", pool, POOLS)
        check_option("backbone.head", head, HEADS)
        check_option("backbone.init", init, INITS)
        if mask_zeros and precision == "bf16":
            raise ValueError(
                "backbone.mask_zeros=true does not go with bf16: flash attention takes lengths "
                "instead of a mask; set trainer.precision to float32 or tf32"
            )
        check_option("backbone.precision", precision, PRECISIONS)
        check_option("backbone.remat", remat, REMATS)
        check_option("backbone.norm_position", norm_position, ("pre", "post"))
        self.pool, self.num_targets, self.seq_len = pool, num_targets, seq_len
        self.mask_zeros = mask_zeros and vocab_size is not None
        self.pair_head = None if num_pairs == 1 else pair_head
        length = seq_len + (pool == "cls")
        if vocab_size is None:
            self.encoder: Any = nnx.Linear(num_features, width, rngs=rngs)
        else:
            self.encoder = Embedding(vocab_size, width, rngs=rngs)
        self.cls = nnx.Param(rngs.params.normal((1, 1, width))) if pool == "cls" else None
        learned = positions == "learned"
        self.positions = nnx.Param(0.02 * rngs.params.normal((length, width))) if learned else None
        self.sinusoidal = positions == "sinusoidal"
        if self.sinusoidal:
            sinusoids(1, width)  # raises for an odd width at construction
        self.embedding_dropout = nnx.Dropout(embedding_dropout)
        self.blocks = nnx.List(
            Block(
                check_mixer(mixer(width=width, seq_len=length, rngs=rngs)),
                width=width,
                norm=norm,
                norm_position=norm_position,
                norm_momentum=norm_momentum,
                activation=activation,
                glu=glu,
                mlp=mlp,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                tie_dropout=tie_dropout,
                rngs=rngs,
            )
            for _ in range(depth)
        )
        # after the mixer, because most models set it by a key of their own that the mixer checks
        check_option("backbone.positions", positions, POSITIONS)
        if (positions == "rotary") != any(block.mixer.rotary for block in self.blocks):
            raise ValueError(
                f"backbone.positions={positions} does not go with this mixer: rotary positions are "
                "applied to its queries and keys; set model.positions if the model has it, else "
                "a backbone.positions other than rotary"
            )
        if pool == "cls" and any(block.mixer.causal for block in self.blocks):
            raise ValueError(
                "backbone.pool=cls puts the class token first, and a causal mixer reads no later "
                "position from there; use mean"
            )
        self.final_norm = Norm(norm, width, norm_momentum, rngs=rngs) if final_norm else None
        self.dtype, self.remat = PRECISIONS[precision], remat
        self.head: Any
        if num_pairs > 1:
            check_option("backbone.pair_head", pair_head, PAIR_HEADS)
            inputs = (4 if pair_head == "interact" else 2) * width
            hidden, act = round(pair_head_ratio * width), head_activation or "gelu"
            self.head = MLPHead(inputs, hidden, num_classes, act, rngs=rngs)
        elif head == "mlp":
            hidden, act = round(mlp_ratio * width), head_activation or "relu"
            self.head = MLPHead(width, hidden, num_classes, act, rngs=rngs)
        else:
            self.head = nnx.Linear(width, num_classes, rngs=rngs)
        if init == "mega":
            mega_init(self, rngs)

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
            lengths: number of real positions of each sequence, (B,) or (B, 2).
            train: enables dropout, from the stream `dropout` of `rngs`, and batch statistics.
        """
        if self.pair_head is None:
            return self.head(self.features(inputs, lengths, train=train, rngs=rngs))
        # one batch for both sequences, so that they share batch-norm statistics
        flat_inputs = inputs.reshape(-1, *inputs.shape[2:])
        flat = self.features(flat_inputs, lengths.reshape(-1), train=train, rngs=rngs)
        pairs = flat.reshape(inputs.shape[0], 2, -1)
        u, v = pairs[:, 0], pairs[:, 1]
        combined = [u, v, u - v, u * v] if self.pair_head == "interact" else [u, v]
        return self.head(jnp.concatenate(combined, axis=-1))

    def features(
        self,
        inputs: Array,
        lengths: Int[Array, " B"],
        *,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B *T D"]:
        """The pooled features of each sequence, or the features of its last T positions."""
        (*_, x), mask = self._residual_stream(inputs, lengths, train, rngs)
        x = x.astype(jnp.float32)  # the mean over thousands of positions loses digits in bfloat16
        if self.final_norm is not None:
            x = self.final_norm(x, mask, train=train)
        return pool(x, mask, self.pool) if self.num_targets == 1 else x[:, -self.num_targets :]

    def layers(
        self, inputs: Array, lengths: Int[Array, "*B"]
    ) -> list[Float[Array, "B *pair length D"]]:
        """Hidden features of a batch: of the encoder with its positions, then after each block.

        Each is (B, L, D), or (B, 2, L, D) for pairs; with `pool=cls` the class token is in front,
        so that there are L + 1 positions. Those at padding have no meaning.
        """
        pair = () if self.pair_head is None else (2,)
        flat = inputs.reshape(-1, *inputs.shape[1 + len(pair) :])
        found, _ = self._residual_stream(flat, lengths.reshape(-1), False, None)
        return [x.reshape(-1, *pair, *x.shape[1:]) for x in found]

    def _residual_stream(
        self, inputs: Array, lengths: Int[Array, " B"], train: bool, rngs: nnx.Rngs | None
    ) -> tuple[list[Sequences], Mask]:
        """The input of the first block and the output of each, and the mask of real positions."""
        if inputs.shape[1] != self.seq_len:
            raise ValueError(
                f"inputs have length {inputs.shape[1]}, the model was built for "
                f"task.seq_len={self.seq_len}"
            )
        x = self.encoder(inputs)  # (B, L, D)
        mask = jnp.arange(inputs.shape[1])[None, :] < lengths[:, None]
        visible = mask & (inputs > 0) if self.mask_zeros else mask
        if self.cls is not None:
            first = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
            ones = jnp.ones((x.shape[0], 1), bool)
            mask, visible = (jnp.concatenate([ones, m], axis=1) for m in (mask, visible))
        if self.positions is not None:
            x = x + self.positions[...][None]
        if self.sinusoidal:
            x = x + jnp.asarray(sinusoids(x.shape[1], x.shape[2]), x.dtype)[None]
        x = self.embedding_dropout(x.astype(self.dtype), deterministic=not train, rngs=rngs)

        def apply(block, x, mask, rngs):
            return block(x, mask, train=train, rngs=rngs)

        if train and self.remat != "none":
            policy = getattr(jax.checkpoint_policies, REMATS[self.remat])
            apply = nnx.remat(apply, policy=policy)
        stream = [x]
        for block in self.blocks:
            stream.append(apply(block, stream[-1], visible, rngs))
        return stream, mask


def mega_init(model: Backbone, rngs: nnx.Rngs) -> None:
    """Draws encoder, MLPs and head as facebookresearch/mega does; other biases stay 0.

    Embeddings of tokens are N(0, 1/D), those of values have weights N(0, 1) and biases N(0, 0.01);
    MLPs are N(0, 0.02^2), the head has Glorot's uniform weights.
    """

    def normal(parameter: nnx.Param, deviation: float) -> None:
        parameter[...] = deviation * rngs.params.normal(parameter.shape)

    if isinstance(model.encoder, Embedding):
        normal(model.encoder.table, model.encoder.table.shape[1] ** -0.5)
    else:
        normal(model.encoder.kernel, 1.0)
        normal(model.encoder.bias, 0.1)
    for block in model.blocks:
        for layer in () if block.mlp is None else (block.mlp.up, block.mlp.down):
            normal(layer.kernel, 0.02)
    xavier = jax.nn.initializers.glorot_uniform()
    mlp = isinstance(model.head, MLPHead)
    for layer in (model.head.hidden, model.head.output) if mlp else (model.head,):
        layer.kernel[...] = xavier(rngs.params(), layer.kernel.shape)


class Embedding(nnx.Module):
    """Token embeddings as a product with one-hot rows.

    The gradient of a gather is a sum in no fixed order on a GPU, so runs would not be reproducible.
    """

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(rngs.params.normal((vocab_size, width)))

    def __call__(self, ids: Int[Array, "B L"]) -> Sequences:
        table = self.table[...]
        rows = jax.nn.one_hot(ids, table.shape[0], dtype=table.dtype)
        return jnp.matmul(rows, table, precision="highest")  # tf32 would round the table


class Block(nnx.Module):
    """One residual layer: the branch of the mixer and, unless `mlp` is none, an MLP branch."""

    def __init__(
        self,
        mixer: Mixer,
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
        tie_dropout: bool = False,
        rngs: nnx.Rngs,
    ):
        check_option("backbone.activation", activation, ACTIVATIONS)
        self.mixer: Any = mixer  # with `gates_residual` its call has a further argument
        self.prenorm, self.activation = norm_position == "pre", activation
        if mixer.gates_residual and (activation, glu) != ("none", "none"):
            raise ValueError(
                f"backbone.activation={activation}, backbone.glu={glu}: this mixer has its own "
                "gates; set both to none"
            )
        self.norm = Norm(norm, width, norm_momentum, rngs=rngs)
        self.glu = GLU(glu, width, rngs=rngs)
        self.mlp = None if mlp == "none" else MLP(mlp, width, round(mlp_ratio * width), rngs=rngs)
        self.mlp_norm = None if mlp == "none" else Norm(norm, width, norm_momentum, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1,) if tie_dropout else ())

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool, rngs: nnx.Rngs | None
    ) -> Sequences:
        def drop(y):
            return self.dropout(y, deterministic=not train, rngs=rngs)

        def mix(y):
            # a mixer that multiplies bfloat16 by its float32 parameters returns float32
            if self.mixer.gates_residual:
                return self.mixer(y, mask, residual=x, train=train, rngs=rngs).astype(x.dtype)
            y = self.mixer(y, mask, train=train, rngs=rngs).astype(x.dtype)
            act = ACTIVATIONS[self.activation]
            if self.glu.linear is None:
                return drop(act(y))  # dropout twice would have the rate 1 - (1 - rate)^2
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
    """Normalization by name; the statistics of batch norm cover real positions only."""

    def __init__(self, kind: str, width: int, momentum: float | int, *, rngs: nnx.Rngs):
        check_option("backbone.norm", kind, NORMS)
        self.norm: Any = {
            "batch": lambda: nnx.BatchNorm(width, momentum=momentum, epsilon=1e-5, rngs=rngs),
            "layer": lambda: nnx.LayerNorm(width, rngs=rngs),
            "rms": lambda: nnx.RMSNorm(width, rngs=rngs),
            "none": lambda: None,
        }[kind]()

    def __call__(self, x: Sequences, mask: Mask, *, train: bool) -> Sequences:
        if self.norm is None:
            return x
        if isinstance(self.norm, nnx.BatchNorm):
            return self.norm(x, use_running_average=not train, mask=mask[..., None]).astype(x.dtype)
        return self.norm(x).astype(x.dtype)  # its parameters promote the result to float32


class GLU(nnx.Module):
    """Gated linear unit after the mixer: full, S5's half1 and half2, or none."""

    def __init__(self, kind: str, width: int, *, rngs: nnx.Rngs):
        check_option("backbone.glu", kind, GLUS)
        self.kind = kind
        outputs = 2 * width if kind == "full" else width
        self.linear = None if kind == "none" else Linear(width, outputs, rngs=rngs)

    def __call__(self, x: Sequences, act: Callable[[Array], Array]) -> Sequences:
        """The gated `act(x)`; `act` is the activation and the dropout in front of the gate."""
        y = act(x)
        if self.linear is None:
            return y
        if self.kind == "full":
            value, gate = jnp.split(self.linear(y), 2, axis=-1)
            return value * jax.nn.sigmoid(gate)
        gate = jax.nn.sigmoid(self.linear(y))
        return (y if self.kind == "half1" else x) * gate


class MLP(nnx.Module):
    """The position-wise branch of a Transformer; `swiglu` is gated (Shazeer 2020)."""

    def __init__(self, kind: str, width: int, hidden: int, *, rngs: nnx.Rngs):
        check_option("backbone.mlp", kind, MLPS)
        self.kind = kind
        self.up = Linear(width, 2 * hidden if kind == "swiglu" else hidden, rngs=rngs)
        self.down = Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Sequences, drop: Callable[[Array], Array]) -> Sequences:
        y = self.up(x)
        if self.kind != "swiglu":
            return self.down(drop(ACTIVATIONS[self.kind](y)))
        value, gate = jnp.split(y, 2, axis=-1)
        return self.down(drop(value * jax.nn.silu(gate)))


class MLPHead(nnx.Module):
    """A head with one hidden layer."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_classes: int,
        activation: str,
        *,
        rngs: nnx.Rngs,
    ):
        check_option("backbone.head_activation", activation, ACTIVATIONS)
        self.hidden = nnx.Linear(width, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, num_classes, rngs=rngs)
        self.activation = activation

    def __call__(self, features: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        return self.output(ACTIVATIONS[self.activation](self.hidden(features)))


def pool(x: Sequences, mask: Mask, kind: str) -> Float[Array, "B D"]:
    """One vector per sequence: mean or last of the real positions, or the first position (cls)."""
    if kind == "cls":
        return x[:, 0]
    if kind == "last":
        last = mask.sum(axis=1) - 1
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    weights = mask.astype(x.dtype)
    # maximum: an empty sequence pools to zero instead of 0/0
    return jnp.einsum("bld,bl->bd", x, weights) / jnp.maximum(weights.sum(axis=1), 1.0)[:, None]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Sinusoidal positions (L, D) of Vaswani et al. 2017, section 3.5; a ValueError if D is odd.

    Periods are from 2 pi to 10,000 x 2 pi. Even channels hold the sine, odd ones the cosine.
    """
    if width % 2:
        raise ValueError(
            f"backbone.positions=sinusoidal needs an even backbone.width, found {width}"
        )
    angles = np.arange(length)[:, None] / 10_000.0 ** (np.arange(0, width, 2)[None, :] / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width)


def check_mixer(mixer: Any) -> Mixer:
    """`mixer`, if it has every attribute of `Mixer`, else a ValueError."""
    missing = [name for name in Mixer.__annotations__ if not hasattr(mixer, name)]
    if missing:
        raise ValueError(
            f"model._target_={type(mixer).__module__}.{type(mixer).__qualname__} has no attribute "
            f"{', '.join(missing)}; derive the class from models.mixer.MixerModule and set causal"
        )
    return mixer
