"""The selective scan: a state-space model whose step sizes, B and C depend on the input.

Paper: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv
2312.00752, algorithm 2 and section 3.3. Reference code read: state-spaces/mamba, `mamba_simple.py`.

As in the paper the states of the whole sequence, N times the input, are not stored: each chunk of
the sequence saves only its initial state, and the backward pass recomputes its states.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from models.ops.blocks import merge_blocks, split_blocks


def selective_scan(
    u: Float[Array, "B L E"],
    delta: Float[Array, "B L E"],
    a: Float[Array, "E N"],
    b: Float[Array, "B L N"],
    c: Float[Array, "B L N"],
) -> Float[Array, "B L E"]:
    """y_t = C_t h_t with h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and h_{-1} = 0.

    Each of the E channels has its own states. A is discretized by zero-order hold and B by Euler's
    rule, as in the paper's code (equation 4 of the paper has zero-order hold for both). Gradients
    are exact; forward mode (`jax.jvp`) does not work.

    Args:
        u: inputs.
        delta: step sizes, positive.
        a: diagonals of A; negative or the states grow without bound.
        b, c: input and output matrices of each step, for all channels.
    Source: Gu & Dao 2023, equation (2a), (2b) and algorithm 2.
    """
    batch, length, channels = u.shape
    size = chunk_length(length, batch * channels * a.shape[1])

    def chunks(x):  # (chunks, size, B, .); the zeros at the end do not change the state
        return jnp.transpose(split_blocks(x, size), (1, 2, 0, 3))

    @jax.checkpoint
    def one_chunk(state, inputs):
        u, delta, b, c = inputs
        decay = jnp.exp(delta[..., None] * a[None, None])  # (size, B, E, N)
        drive = (delta * u)[..., None] * b[:, :, None, :]
        drive = drive.at[0].add(decay[0] * state)
        states = varying_recurrence(decay, drive, False)
        return states[-1], jnp.einsum("tben,tbn->tbe", states, c)

    start = jnp.zeros((batch, channels, a.shape[1]), u.dtype)
    _, y = lax.scan(one_chunk, start, (chunks(u), chunks(delta), chunks(b), chunks(c)))
    return merge_blocks(jnp.transpose(y, (2, 0, 1, 3)), length)


def selective_step(
    state: Float[Array, "B E N"],
    u: Float[Array, "B E"],
    delta: Float[Array, "B E"],
    a: Float[Array, "E N"],
    b: Float[Array, "B N"],
    c: Float[Array, "B N"],
) -> tuple[Float[Array, "B E N"], Float[Array, "B E"]]:
    """One step of `selective_scan`: the next state and the output."""
    state = jnp.exp(delta[..., None] * a[None]) * state + (delta * u)[..., None] * b[:, None, :]
    return state, jnp.einsum("ben,bn->be", state, c)


def chunk_length(length: int, states: int) -> int:
    """Steps in a chunk of `states` numbers per step: a power of two from 16 to 256, at most L."""
    # On a CPU, 4 MB in float32 take half the time of 16 MB, which exceed its caches. Elsewhere few
    # chunks are faster, because they run in sequence.
    wanted = 2**20 if jax.default_backend() == "cpu" else 2**24
    room = min(max(wanted // states, 16), 256, max(length, 1))
    return 2 ** (room.bit_length() - 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def varying_recurrence(
    decay: Float[Array, "L *S"], drive: Float[Array, "L *S"], reverse: bool
) -> Float[Array, "L *S"]:
    """All states of h_t = decay_t h_{t-1} + drive_t, time in front.

    With `reverse`, of h_t = decay_t h_{t+1} + drive_t. The backward pass is the reversed
    recurrence; autodiff would save each level of the scan.
    """
    steps, levels = partial(_by_steps, reverse=reverse), partial(_by_levels, reverse=reverse)
    return lax.platform_dependent(decay, drive, cpu=steps, default=levels)


def _forward(decay, drive, reverse):
    states = varying_recurrence(decay, drive, reverse)
    return states, (decay, states)


def _backward(reverse, saved, cotangent):
    decay, states = saved
    none = jnp.zeros_like(decay[:1])
    # the decay of step t + 1 multiplies the cotangent of t; decay_t multiplied the state of t - 1
    if reverse:
        carried, before = jnp.concatenate([none, decay[:-1]]), jnp.concatenate([states[1:], none])
    else:
        carried, before = jnp.concatenate([decay[1:], none]), jnp.concatenate([none, states[:-1]])
    d_drive = varying_recurrence(carried, cotangent, not reverse)
    return d_drive * before, d_drive


varying_recurrence.defvjp(_forward, _backward)


def _by_steps(decay, drive, reverse):
    def step(state, inputs):
        state = inputs[0] * state + inputs[1]
        return state, state

    return lax.scan(step, jnp.zeros_like(drive[0]), (decay, drive), reverse=reverse)[1]


def _by_levels(decay, drive, reverse):
    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return lax.associative_scan(combine, (decay, drive), reverse=reverse)[1]
