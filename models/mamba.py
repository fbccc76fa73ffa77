"""Mamba's block with the selective state-space model S6.

    x, z = in_proj(u),   x = silu(conv(x)),   Delta, B, C = functions of x
    y = S6(x),   out_proj(y * silu(z))

(figure 3, algorithm 2). The gate is part of the mixer, so that the block around it has only a norm
and the residual.

Paper: Gu & Dao 2023, "Mamba" (arXiv 2312.00752). Reference code read: state-spaces/mamba,
`mamba_simple.py`. Deviations: docs/models/mamba.md.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import check_positive, expanded_width
from models.mixer import Mask, MixerModule, Sequences
from models.ops.selective_scan import selective_scan, selective_step
from models.ops.state_space import log_uniform_steps


class Mamba(MixerModule):
    """Gated block around a selective state-space model; causal.

    Args:
        state_size: N, real states of each of the E inner channels.
        expand: E / D; E must be whole.
        conv_size: taps of the causal depthwise convolution before the state-space model.
        dt_rank: rank of the projection to the step sizes; None for ceil(D / 16).
        dt_min, dt_max: range of the initial step sizes, log-uniform.
    Raises:
        ValueError: a size below 1, E is not a whole number, or the range is empty.
    """

    causal = True

    def __init__(
        self,
        width: int,
        seq_len: int,
        *,
        state_size: int,
        expand: float | int,
        conv_size: int,
        dt_rank: int | None,
        dt_min: float | int,
        dt_max: float | int,
        rngs: nnx.Rngs,
    ):
        check_positive(state_size=state_size, conv_size=conv_size, dt_rank=dt_rank)
        inner = expanded_width(expand, width)
        rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        self.state_size, self.rank, self.conv_size, self.inner = state_size, rank, conv_size, inner
        key = rngs.params
        self.in_proj = nnx.Param(uniform(key, (width, 2 * inner), width))
        self.conv_kernel = nnx.Param(uniform(key, (conv_size, inner), conv_size))
        self.conv_bias = nnx.Param(uniform(key, (inner,), conv_size))
        self.x_proj = nnx.Param(uniform(key, (inner, rank + 2 * state_size), inner))
        self.dt_proj = nnx.Param(uniform(key, (rank, inner), rank))
        # the floor is that of the published code
        dt = jnp.maximum(jnp.exp(log_uniform_steps(key(), (inner,), dt_min, dt_max)), 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # softplus of it is dt
        # S4D-Real: A = -1, -2, ..., -N in every channel
        self.a_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1.0, state_size + 1)), (inner, 1)))
        self.d = nnx.Param(jnp.ones((inner,)))
        self.out_proj = nnx.Param(uniform(key, (inner, width), inner))

    def __call__(
        self, x: Sequences, mask: Mask, *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> Sequences:
        u, z = jnp.split(x @ self.in_proj[...].astype(x.dtype), 2, axis=-1)  # (B, L, E)
        # the backward pass recomputes taps and gates; autodiff would save 13 arrays of (B, L, E)
        u, delta, b, c = jax.checkpoint(self.convolved)(u)
        # 16-bit states would stop decaying after a few hundred steps
        y = selective_scan(u.astype(delta.dtype), delta, self.a(delta.dtype), b, c)
        return jax.checkpoint(self.gated)(y, u, z)

    def convolved(self, u: Float[Array, "B L E"]) -> tuple[Array, Array, Array, Array]:
        """The inputs of the state-space model and the step sizes, B and C computed from them."""
        # the kernel is not cast, because its gradient is a sum over B L terms
        kernel, dtype = self.conv_kernel[...], u.dtype
        padded = jnp.pad(u, ((0, 0), (self.conv_size - 1, 0), (0, 0)))
        taps = (
            padded[:, i : i + u.shape[1]] * kernel[i][None, None] for i in range(self.conv_size)
        )
        u = jax.nn.silu((sum(taps) + self.conv_bias[...][None, None]).astype(dtype))
        return u, *self.selected(u)

    def init_state(self, batch_size: int) -> tuple[Float[Array, "B W E"], Float[Array, "B E N"]]:
        """Zeros: the last W = conv_size - 1 inputs of the convolution, and the recurrent states."""
        window = jnp.zeros((batch_size, self.conv_size - 1, self.inner))
        return window, jnp.zeros((batch_size, self.inner, self.state_size))

    def step(
        self, state: tuple[Float[Array, "B W E"], Float[Array, "B E N"]], u_t: Float[Array, "B D"]
    ) -> tuple[tuple[Float[Array, "B W E"], Float[Array, "B E N"]], Float[Array, "B D"]]:
        window, states = state
        u, z = jnp.split(u_t @ self.in_proj[...].astype(u_t.dtype), 2, axis=-1)  # (B, E)
        window = jnp.concatenate([window, u[:, None].astype(window.dtype)], axis=1)
        u = jnp.einsum("bwe,we->be", window, self.conv_kernel[...]) + self.conv_bias[...][None]
        u = jax.nn.silu(u.astype(u_t.dtype))
        delta, b, c = self.selected(u)
        states, y = selective_step(states, u.astype(delta.dtype), delta, self.a(delta.dtype), b, c)
        return (window[:, 1:], states), self.gated(y, u, z)

    def selected(self, u: Array) -> tuple[Array, Array, Array]:
        """Step sizes (..., E) and matrices B, C (..., N) of inputs u (..., E), at least float32."""
        dtype = jnp.promote_types(u.dtype, jnp.float32)
        selected = (u @ self.x_proj[...].astype(u.dtype)).astype(dtype)
        low, b, c = jnp.split(selected, [self.rank, self.rank + self.state_size], axis=-1)
        delta = low @ self.dt_proj[...].astype(dtype)
        bias = jnp.broadcast_to(self.dt_bias[...].astype(dtype), delta.shape)
        return jax.nn.softplus(delta + bias), b, c

    def a(self, dtype) -> Float[Array, "E N"]:
        """The diagonals of A."""
        return -jnp.exp(self.a_log[...].astype(dtype))

    def gated(self, y: Array, u: Array, z: Array) -> Array:
        """The output: skip D u, gate and projection to the width."""
        skip = jnp.broadcast_to(self.d[...].astype(y.dtype), y.shape) * u.astype(y.dtype)
        gated = (y + skip).astype(z.dtype) * jax.nn.silu(z)
        return gated @ self.out_proj[...].astype(z.dtype)


def uniform(key, shape: tuple[int, ...], fan_in: int) -> Array:
    """Uniform in +-1/sqrt(fan_in), PyTorch's initialization of linear maps and convolutions."""
    bound = fan_in**-0.5
    return key.uniform(shape, minval=-bound, maxval=bound)
