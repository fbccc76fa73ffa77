"""Gated recurrent unit (GRU).

    r_t = sigmoid(W_r u_t + U_r h_{t-1} + b_r)            equation (5)
    z_t = sigmoid(W_z u_t + U_z h_{t-1} + b_z)            equation (6)
    n_t = tanh(W u_t + b + r_t (U h_{t-1} + c))           equation (8)
    h_t = z_t h_{t-1} + (1 - z_t) n_t                     equation (7)
    y_t = V h_t + a

Paper: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder"
(arXiv 1406.1078). Reference: the equations of cuDNN.

The reset gate acts after the product with U, as in version 1 of the paper and in cuDNN, with one
matrix product per step instead of two dependent ones; in version 3 and in Chung et al. 2014
(arXiv 1412.3555) the candidate is tanh(W u_t + U (r_t h_{t-1})).

Deviations: biases as in cuDNN, without the redundant ones (Cho et al. have none); the output matrix
V, which serves any state size and both directions.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least_float32, check_positive, require_causal
from models.mixer import Mask, MixerModule, Sequences
from models.ops.products import matmul_highest


class GRU(MixerModule):
    """Gated recurrent unit with L dependent steps; causal unless bidirectional.

    Args:
        state_size: H.
        bidirectional: adds a unit with its own parameters over the reversed sequence.
    Raises:
        ValueError: state_size is below 1.
    """

    def __init__(
        self, width: int, seq_len: int, *, state_size: int, bidirectional: bool, rngs: nnx.Rngs
    ):
        check_positive(state_size=state_size)
        self.causal = not bidirectional
        directions, key = (2 if bidirectional else 1), rngs.params
        orthogonal = jax.nn.initializers.orthogonal()
        # the last axis holds r, z, n
        drawn = key.normal((directions, width, 3 * state_size))
        self.input_kernel = nnx.Param(drawn / math.sqrt(width))
        self.input_bias = nnx.Param(jnp.zeros((directions, 3 * state_size)))
        square = [orthogonal(key(), (state_size, state_size)) for _ in range(3 * directions)]
        gates = [jnp.concatenate(square[3 * k : 3 * k + 3], axis=1) for k in range(directions)]
        self.recurrent_kernel = nnx.Param(jnp.stack(gates))
        self.candidate_bias = nnx.Param(jnp.zeros((directions, state_size)))
        inner = directions * state_size
        self.output_kernel = nnx.Param(key.normal((inner, width)) / math.sqrt(inner))
        self.output_bias = nnx.Param(jnp.zeros((width,)))

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        # (L, B, D) for the scan; the gates would be three times as large to transpose
        u = at_least_float32(jnp.swapaxes(x, 0, 1))
        both = u[None] if self.causal else jnp.stack([u, jnp.flip(u, axis=0)])
        gates = jax.vmap(affine)(both, self.input_kernel[...], self.input_bias[...])
        if not self.causal:
            # padding comes first in the reversed sequence: an update gate of sigmoid(1e4) = 1
            # keeps the state 0
            padding = jnp.flip(~mask, axis=1).T[..., None]
            size = self.recurrent_kernel.shape[1]
            update = (1, ..., slice(size, 2 * size))
            gates = gates.at[update].set(jnp.where(padding, 1e4, gates[update]))
        # one scan for both directions, (K, L, B, H)
        h = jax.vmap(states)(gates, self.recurrent_kernel[...], self.candidate_bias[...])
        h = h[0] if self.causal else jnp.concatenate([h[0], jnp.flip(h[1], axis=0)], axis=-1)
        y = affine(h, self.output_kernel[...], self.output_bias[...])
        return jnp.swapaxes(y, 0, 1).astype(x.dtype)

    def init_state(self, batch_size: int) -> Float[Array, "B H"]:
        """The state before the first input, zero; a ValueError if the model is bidirectional."""
        require_causal(self.causal)
        return jnp.zeros((batch_size, self.recurrent_kernel.shape[1]), jnp.float32)

    def step(
        self, state: Float[Array, "B H"], u_t: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B H"], Float[Array, "B D"]]:
        gates = affine(at_least_float32(u_t), self.input_kernel[0], self.input_bias[0])
        state = next_state(state, gates, self.recurrent_kernel[0], self.candidate_bias[0])
        y = affine(state, self.output_kernel[...], self.output_bias[...])
        return state, y.astype(u_t.dtype)


def affine(
    x: Float[Array, "*B D"], kernel: Float[Array, "D G"], bias: Float[Array, " G"]
) -> Float[Array, "*B G"]:
    """x W + b."""
    y = x @ kernel
    return y + jnp.broadcast_to(bias, y.shape)


def states(
    gates: Float[Array, "L B G"],
    recurrent_kernel: Float[Array, "H G"],
    candidate_bias: Float[Array, " H"],
) -> Float[Array, "L B H"]:
    """All states from a zero initial state, given the input part of r, z and n (G = 3 H)."""

    # a scan: the backward pass of a `fori_loop` that fills an array copies it at every step
    def step(h, gates_t):
        h = next_state(h, gates_t, recurrent_kernel, candidate_bias)
        return h, h

    start = jnp.zeros((gates.shape[1], recurrent_kernel.shape[0]), gates.dtype)
    return jax.lax.scan(step, start, gates)[1]


def next_state(
    h: Float[Array, "B H"],
    gates: Float[Array, "B G"],
    recurrent_kernel: Float[Array, "H G"],
    candidate_bias: Float[Array, " H"],
) -> Float[Array, "B H"]:
    """Equations (5) to (8) for one position."""
    r_in, z_in, n_in = jnp.split(gates, 3, axis=-1)
    r_h, z_h, n_h = jnp.split(matmul_highest(h, recurrent_kernel), 3, axis=-1)
    r, z = jax.nn.sigmoid(r_in + r_h), jax.nn.sigmoid(z_in + z_h)
    n = jnp.tanh(n_in + r * (n_h + candidate_bias[None]))
    return z * h + (1 - z) * n
