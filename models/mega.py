"""Mega: gated attention over an exponential moving average.

A gate mixes the output with the residual stream X, Y = phi * H + (1 - phi) * X. The mixer returns
Y - X, which the backbone adds (`gates_residual`).

Paper: Ma et al. 2023, "Mega: Moving Average Equipped Gated Attention" (arXiv 2209.10655), equations
(5) to (14). Reference code read: facebookresearch/mega. Its additions to the equations and the
deviations: docs/models/mega.md.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.checks import (
    at_least_float32,
    check_option,
    check_positive,
    expanded_width,
    require_causal,
)
from models.mixer import Mask, MixerModule, Sequences
from models.ops.blocks import merge_blocks, split_blocks
from models.ops.fft_convolution import fft_convolution
from models.ops.state_space import split_powers

ATTENTIONS = ("softmax", "laplace", "relu2")
_ROWS = 256  # queries per block of attention weights, so that memory grows with L, not with L^2

State = tuple[Array, Array, Array, Int[Array, ""]]


class Mega(MixerModule):
    """Moving-average gated attention; causal unless bidirectional.

    Args:
        seq_len: L; without chunks, the longest input of the position bias.
        state_size: N, moving averages per channel.
        attention_size: Z, width of queries and keys.
        expand: V / D, where V is the width of the values; V must be whole.
        attention: softmax | laplace | relu2, the function from scores to weights.
        bidirectional: averages over both directions and attention to all positions.
        chunk_size: positions per attention chunk (Mega-chunk), O(L) time; None attends to the whole
            sequence.
        dropout: rate, after the averages and on H, as in the published code.
    Raises:
        ValueError: a size below 1, V is not whole, or an unknown attention.
    """

    gates_residual = True

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        state_size: int,
        attention_size: int,
        expand: float | int,
        attention: str,
        bidirectional: bool,
        chunk_size: int | None,
        dropout: float | int,
        rngs: nnx.Rngs,
    ):
        check_option("model.attention", attention, ATTENTIONS)
        check_positive(state_size=state_size, attention_size=attention_size, chunk_size=chunk_size)
        values = expanded_width(expand, width)
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout} must be at least 0 and below 1")
        self.causal, self.attention, self.chunk_size = not bidirectional, attention, chunk_size
        self.sizes = (width, attention_size, values)
        self.average = MovingAverage(width, state_size, bidirectional=bidirectional, rngs=rngs)

        def small(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * rngs.params.normal(shape))

        gates = 2 * width + attention_size + values
        self.value_kernel, self.value_bias = small(width, values), nnx.Param(jnp.zeros((values,)))
        self.gate_kernel, self.gate_bias = small(width, gates), nnx.Param(jnp.zeros((gates,)))
        self.output_kernel, self.output_bias = small(values, width), nnx.Param(jnp.zeros((width,)))
        self.kappa, self.mu = small(2, attention_size), nnx.Param(jnp.zeros((2, attention_size)))
        self.rel_bias = small(2 * (chunk_size or seq_len) - 1)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self,
        x: Sequences,
        mask: Mask,
        *,
        residual: Sequences | None = None,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Sequences:
        """phi * (H - X), the update of the residual stream X (`residual`, default `x`)."""

        def drop(y):
            return self.dropout(y, deterministic=not train, rngs=rngs)

        update, q, k, reset, candidate = self.project(drop(self.average(x, mask)))
        o = self.attend(q, k, silu(affine(x, self.value_kernel, self.value_bias)), mask)
        h = drop(self.candidate(reset, o, candidate))
        return gated_update(update, h, x if residual is None else residual)

    def attend(
        self,
        q: Float[Array, "B L Z"],
        k: Float[Array, "B L Z"],
        v: Float[Array, "B L V"],
        mask: Mask,
    ) -> Float[Array, "B L V"]:
        """Equation (11), within chunks unless `chunk_size` is None."""
        batch, length, _ = q.shape
        size = min(self.chunk_size or length, length)
        longest = self.chunk_size or (self.rel_bias.shape[0] + 1) // 2
        bias = self.rel_bias[...][longest - size : longest + size - 1]
        # chunks become sequences of a larger batch, (B * chunks, size, ...)
        q, k, v, mask = (
            split_blocks(y, size).reshape(-1, size, *y.shape[2:]) for y in (q, k, v, mask)
        )
        o = attend(q, k, v, mask, bias, attention=self.attention, causal=self.causal)
        return merge_blocks(o.reshape(batch, -1, *o.shape[1:]), length)

    def init_state(self, batch_size: int) -> State:
        """Zeros: averages (B, D, N), the chunk's keys (B, C, Z) and values (B, C, V), the time.

        Raises:
            ValueError: the model is bidirectional, or has no chunks: no bounded state holds its
                past.
        """
        require_causal(self.causal)
        if self.chunk_size is None:
            raise ValueError(
                "model.chunk_size=null has no recurrent form of bounded memory; "
                "set model.chunk_size"
            )
        _, attention_size, values = self.sizes
        averages = jnp.zeros((batch_size, *self.average.beta.shape[1:]))
        keys = jnp.zeros((batch_size, self.chunk_size, attention_size))
        return averages, keys, jnp.zeros((*keys.shape[:2], values)), jnp.int32(0)

    def step(
        self, state: State, u_t: Float[Array, "B D"], residual: Float[Array, "B D"] | None = None
    ) -> tuple[State, Float[Array, "B D"]]:
        averages, keys, values, time = state
        size = keys.shape[1]
        averages, average = self.average.step(averages, u_t)
        update, q, k, reset, candidate = self.project(average)
        slot = time % size
        v = jax.nn.silu(affine(u_t, self.value_kernel, self.value_bias))
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(past, x[:, None].astype(past.dtype), slot, axis=1)
            for past, x in ((keys, k), (values, v))
        )
        bias = jax.lax.dynamic_slice_in_dim(self.rel_bias[...], size - 1 - slot, size)[None]
        visible = jnp.broadcast_to(jnp.arange(size) <= slot, (q.shape[0], 1, size))
        o = attention_weights(q[:, None], keys, bias, visible, self.attention) @ values
        h = self.candidate(reset, o[:, 0].astype(u_t.dtype), candidate)
        y = gated_update(update, h, u_t if residual is None else residual)
        return (averages, keys, values, time + 1), y

    def project(self, average: Array) -> tuple[Array, Array, Array, Array, Array]:
        """phi, Q, K, gamma and X' W_h + b_h, from the averages X'; phi and gamma as logits."""
        ends = list(itertools.accumulate(self.sizes))  # of D, Z and V; the candidate has D more
        gates = affine(average, self.gate_kernel, self.gate_bias)
        update, z, reset, candidate = jnp.split(gates, ends, axis=-1)
        q, k = queries_and_keys(z, self.kappa[...], self.mu[...])
        return update, q, k, reset, candidate

    def candidate(self, reset: Array, o: Array, candidate: Array) -> Array:
        """H of equation (13)."""
        return silu(candidate + affine(reset_gate(reset, o), self.output_kernel, self.output_bias))


# Autodiff would save several times the arguments of these functions; recomputing them is cheap.
silu = jax.checkpoint(jax.nn.silu)


@jax.checkpoint
def reset_gate(reset: Array, o: Array) -> Array:
    """gamma * O."""
    return jax.nn.silu(reset) * o


@jax.checkpoint
def gated_update(update: Array, h: Array, residual: Array) -> Array:
    """phi * (H - X)."""
    return jax.nn.sigmoid(update) * (h - residual)


@jax.checkpoint
def queries_and_keys(
    z: Float[Array, "*B Z"], kappa: Float[Array, "2 Z"], mu: Float[Array, "2 Z"]
) -> tuple[Array, Array]:
    """Two scales and shifts of the shared SiLU(z), in the dtype of z."""
    z = jax.nn.silu(z)
    q, k = (
        z * jnp.broadcast_to(kappa[i], z.shape) + jnp.broadcast_to(mu[i], z.shape) for i in (0, 1)
    )
    return q.astype(z.dtype), k.astype(z.dtype)


class MovingAverage(nnx.Module):
    """Multi-dimensional damped exponential moving average, equations (5) and (6).

    The skip and the SiLU are those of the code. Each channel has N averages, h_t = alpha beta x_t +
    (1 - alpha delta) h_{t-1}, read by eta / sqrt(N); a sigmoid keeps alpha and delta in (0, 1).
    The averages over the reversed sequence include the current position, so that x_t has the first
    weights of both kernels, as in the published code.
    """

    def __init__(self, width: int, state_size: int, *, bidirectional: bool, rngs: nnx.Rngs):
        key, shape = rngs.params, (2 if bidirectional else 1, width, state_size)
        self.alpha = nnx.Param(0.2 * key.normal(shape))
        self.delta = nnx.Param(0.2 * key.normal(shape))
        # alternating signs make the initial kernel nearly zero (published code: "more stable")
        noise = 0.02 * key.normal(shape)
        self.beta = nnx.Param(noise + (-1.0) ** jnp.arange(state_size)[None, None])
        self.eta = nnx.Param(key.normal(shape))
        self.omega = nnx.Param(key.normal((width,)))

    def __call__(self, x: Sequences, mask: Mask) -> Sequences:
        wide = at_least_float32(x)
        u = jnp.where(mask[..., None], wide, 0)
        alpha, delta, beta, eta = (
            p[...].astype(wide.dtype) for p in (self.alpha, self.delta, self.beta, self.eta)
        )
        kernels = ema_kernel(alpha, delta, beta, eta, x.shape[1])
        forward, back = kernels[0], None
        if len(kernels) == 2:
            # `fft_convolution` begins the second kernel at the next position: its first entry
            # joins the first kernel, and its last one, now the wrapped first, meets no input
            forward = forward.at[:, 0].add(kernels[1, :, 0])
            back = jnp.roll(kernels[1], -1, axis=1)
        skip = self.omega[...].astype(wide.dtype)[None, None] * wide
        return silu(fft_convolution(u, forward, back) + skip).astype(x.dtype)

    def step(
        self, state: Float[Array, "B D N"], x: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B D N"], Float[Array, "B D"]]:
        """The next averages and the output; one direction only."""
        alpha, delta, beta, eta = (
            p[...][0].astype(state.dtype) for p in (self.alpha, self.delta, self.beta, self.eta)
        )
        u = x.astype(state.dtype)
        drive = (jax.nn.sigmoid(alpha) * beta)[None] * u[..., None]
        state = jnp.exp(log_decay(alpha, delta))[None] * state + drive
        y = jnp.einsum("bdn,dn->bd", state, eta) / math.sqrt(eta.shape[-1])
        return state, jax.nn.silu(y + self.omega[...].astype(u.dtype)[None] * u).astype(x.dtype)


def ema_kernel(
    alpha: Float[Array, "S D N"],
    delta: Float[Array, "S D N"],
    beta: Float[Array, "S D N"],
    eta: Float[Array, "S D N"],
    length: int,
) -> Float[Array, "S D L"]:
    """Impulse responses sum_n eta alpha beta (1 - alpha delta)^l / sqrt(N) of S directions.

    The exponent l is the sum of a coarse and a fine one, so that D N sqrt(L) exponentials and one
    product replace D N L. `alpha` and `delta` are those before the sigmoid.
    """
    log_q = log_decay(alpha, delta)[..., None]
    fine_size, coarse_size = split_powers(length)
    fine = jnp.exp(log_q * jnp.arange(fine_size, dtype=log_q.dtype)[None, None, None])
    coarse = jnp.exp(
        log_q * (fine_size * jnp.arange(coarse_size)).astype(log_q.dtype)[None, None, None]
    )
    gain = jax.nn.sigmoid(alpha) * beta * eta / math.sqrt(alpha.shape[-1])
    kernel = jnp.einsum("sdnc,sdnf->sdcf", gain[..., None] * coarse, fine, precision="highest")
    return kernel.reshape(*alpha.shape[:2], coarse_size * fine_size)[..., :length]


def log_decay(alpha: Float[Array, "*S"], delta: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log(1 - sigmoid(alpha) sigmoid(delta)), accurate also if the product rounds to 0 or 1."""
    product = jax.nn.sigmoid(alpha) * jax.nn.sigmoid(delta)
    slow = jnp.log1p(-jnp.minimum(product, 0.5))
    # 1 - 1/((1 + a)(1 + d)) = (a + d + a d) / ((1 + a)(1 + d)); a = exp(-alpha), d = exp(-delta)
    fast = jnp.logaddexp(jnp.logaddexp(-alpha, -delta), -alpha - delta)
    fast = fast + jax.nn.log_sigmoid(alpha) + jax.nn.log_sigmoid(delta)
    return jnp.where(product < 0.5, slow, fast)


def attend(
    q: Float[Array, "B K Z"],
    k: Float[Array, "B K Z"],
    v: Float[Array, "B K V"],
    mask: Bool[Array, "B K"],
    bias: Float[Array, " R"],
    *,
    attention: str,
    causal: bool,
) -> Float[Array, "B K V"]:
    """f(Q K^T / tau + b_rel) V over K positions, one block of queries at a time.

    Args:
        bias: one per distance, R = 2 K - 1.
    """
    batch, length, _ = q.shape
    rows = min(length, _ROWS)
    blocks = -(-length // rows)
    total = blocks * rows
    dtype = v.dtype
    q = jnp.pad(q, ((0, 0), (0, total - length), (0, 0)))
    # at least float32 outside the blocks: the backward pass sums the gradients of the blocks
    q, k, v = (at_least_float32(x) for x in (q, k, v))
    bias = jnp.pad(bias, (total - length, 0))

    def block(start):
        part = jax.lax.dynamic_slice_in_dim(bias, total - rows - start, rows + length - 1)
        visible = jnp.broadcast_to(mask[:, None, :], (batch, rows, length))
        if causal:
            past = jnp.arange(length)[None, :] <= start + jnp.arange(rows)[:, None]
            visible = visible & past[None]
        queries = jax.lax.dynamic_slice_in_dim(q, start, rows, axis=1)
        bias_rows = toeplitz(part, rows, length)
        queries, keys = queries.astype(dtype), k.astype(dtype)
        weights = attention_weights(queries, keys, bias_rows, visible, attention)
        return weights.astype(dtype) @ v.astype(dtype)

    if blocks == 1:
        return block(0)
    o = jax.lax.map(jax.checkpoint(block), rows * jnp.arange(blocks))  # (blocks, B, rows, V)
    return jnp.moveaxis(o, 0, 1).reshape(batch, total, v.shape[2])[:, :length]


def attention_weights(
    q: Float[Array, "B Q Z"],
    k: Float[Array, "B K Z"],
    bias: Float[Array, "Q K"],
    visible: Bool[Array, "B Q K"],
    attention: str,
) -> Float[Array, "B Q K"]:
    """f(Q K^T / tau + b_rel), tau = sqrt(Z) for softmax, else the number of visible keys."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqz,bkz->bqk", q, k, preferred_element_type=dtype)
    bias = bias.astype(dtype)[None]
    if attention == "softmax":
        # not -inf, because rows of padding have no visible key
        scores = scores / math.sqrt(q.shape[-1]) + bias
        return jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    scores = scores / jnp.maximum(visible.sum(axis=-1, keepdims=True), 1).astype(dtype) + bias
    weights = laplace(scores) if attention == "laplace" else jax.nn.relu(scores) ** 2
    return jnp.where(visible, weights, 0)


def laplace(x: Array) -> Array:
    """A normal CDF that matches relu^2 in value and slope at sqrt(1/2), as in the paper."""
    mean, deviation = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    return 0.5 * (1 + jax.scipy.special.erf((x - mean) / (deviation * math.sqrt(2))))


def toeplitz(diagonals: Float[Array, " R"], rows: int, columns: int) -> Float[Array, "Q K"]:
    """The matrix whose entry (i, j) is diagonals[rows - 1 + j - i], R = rows + columns - 1.

    Made by tiling, because the gradient of a gather is a sum in no fixed order on a GPU.
    """
    period = rows + columns
    tiled = jnp.tile(jnp.pad(diagonals, (0, 1)), rows)[: rows * (period - 1)]
    return tiled.reshape(rows, period - 1)[:, rows - 1 : rows - 1 + columns]


def affine(x: Array, kernel: nnx.Param, bias: nnx.Param) -> Array:
    """x W + b in the dtype of x; b is added in its own, as its gradient sums over B L terms."""
    y = x @ kernel[...].astype(x.dtype)
    return (y + jnp.broadcast_to(bias[...], y.shape)).astype(x.dtype)
