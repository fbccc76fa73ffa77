"""Computes all states of a diagonal linear recurrence, h_t = lam * h_{t-1} + bu_t.

Paper: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv
2303.06349, equation (5). Reference code read: NicolasZucchet/minimal-LRU, to whose values the tests
compare.

Deviation: the reference runs an associative scan over pairs (lam^n, state) for each sequence, and
autodiff saves its levels. Here a CPU runs the steps in order, an accelerator runs blocks of steps
in parallel, and the backward pass is the reversed recurrence and saves only the states.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

_BLOCK = 8  # in longer blocks XLA recomputes each state for every later one instead of storing it


def linear_recurrence(
    lam: Inexact[Array, " N_lam"], bu: Inexact[Array, "B L N"], reverse: bool = False
) -> Inexact[Array, "B L N"]:
    """All states of h_t = lam * h_{t-1} + bu_t with h_{-1} = 0.

    Gradients are exact and cost one more recurrence. Second derivatives work, forward mode
    (`jax.jvp`) does not.

    Args:
        lam: decay of each state, real or complex; |lam| < 1 or the states grow without bound.
        bu: the input, already multiplied by B.
        reverse: computes h_t = lam * h_{t+1} + bu_t with h_L = 0.
    Returns:
        the states in the precision of `bu`, complex if either argument is.
    Raises:
        ValueError: `lam` and `bu` disagree on N.
    """
    if lam.shape[0] != bu.shape[2]:
        raise ValueError(
            f"lam has {lam.shape[0]} states and bu has {bu.shape[2]}; "
            "both must have model.state_size"
        )
    # explicit dtypes, because strict promotion refuses even `promote_types`
    double = bu.dtype in (jnp.float64, jnp.complex128)
    if jnp.iscomplexobj(lam) or jnp.iscomplexobj(bu):
        dtype = jnp.complex128 if double else jnp.complex64
        return _states(lam.astype(dtype), bu.astype(dtype), reverse)
    # 16-bit states would stop decaying after a few hundred steps
    dtype = jnp.float64 if double else jnp.float32
    return _states(lam.astype(dtype), bu.astype(dtype), reverse).astype(bu.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _states(
    lam: Inexact[Array, " N"], bu: Inexact[Array, "B L N"], reverse: bool
) -> Inexact[Array, "B L N"]:
    steps = partial(states_by_steps, reverse=reverse)
    blocks = partial(states_by_blocks, reverse=reverse)
    return lax.platform_dependent(lam, bu, cpu=steps, default=blocks)


def _states_forward(lam, bu, reverse):
    states = _states(lam, bu, reverse)
    return states, (lam, states)


def _states_backward(reverse, saved, cotangent):
    # no conjugates: JAX defines cotangents by the transpose, and the caller of `grad` conjugates
    lam, states = saved
    dbu = _states(lam, cotangent, not reverse)
    late, early = (dbu[:, :-1], states[:, 1:]) if reverse else (dbu[:, 1:], states[:, :-1])
    terms = late * early
    if not jnp.iscomplexobj(terms):
        return jnp.sum(terms, axis=(0, 1)), dbu
    # XLA:CPU reduces complex numbers three times slower than both parts
    return lax.complex(jnp.sum(terms.real, axis=(0, 1)), jnp.sum(terms.imag, axis=(0, 1))), dbu


_states.defvjp(_states_forward, _states_backward)


def states_by_steps(
    lam: Inexact[Array, " N"], bu: Inexact[Array, "B L N"], reverse: bool = False
) -> Inexact[Array, "B L N"]:
    """`linear_recurrence` step by step, for a CPU: one read and one write of the states."""
    length = bu.shape[1]

    # not `lax.scan`: transposing complex states takes XLA:CPU longer than the recurrence
    def step(count, carry):
        state, states = carry
        t = length - 1 - count if reverse else count
        state = lam[None, None] * state + lax.dynamic_slice_in_dim(bu, t, 1, axis=1)
        return state, lax.dynamic_update_slice_in_dim(states, state, t, axis=1)

    return lax.fori_loop(0, length, step, (jnp.zeros_like(bu[:, :1]), jnp.zeros_like(bu)))[1]


def states_by_blocks(
    lam: Inexact[Array, " N"], bu: Inexact[Array, "B L N"], reverse: bool = False
) -> Inexact[Array, "B L N"]:
    """`linear_recurrence` in O(log L) dependent steps, for an accelerator.

    Blocks of 8 steps run in parallel from a zero state. The same recurrence over blocks gives the
    true initial states of the blocks, whose decayed contributions are added.

    Powers of lam are repeated products: at L = 16,384 and |lam| = 0.9999 the relative error of
    complex64 states is 1e-4, as with `lax.associative_scan`; the steps in order have 3e-6. XLA
    fuses the steps of a block into one kernel, which accesses the states about 5 times instead of
    the 16 of `lax.associative_scan` (bytes as counted by XLA, at L = 2048).
    """
    batch, length, states = bu.shape
    blocks = -(-length // _BLOCK)
    padding = blocks * _BLOCK - length
    filled, later = ((padding, 0), (0, 1)) if reverse else ((0, padding), (1, 0))
    x = jnp.pad(bu, ((0, 0), filled, (0, 0))).reshape(batch, blocks, _BLOCK, states)
    times = range(_BLOCK - 1, -1, -1) if reverse else range(_BLOCK)
    h, state = {}, jnp.zeros_like(x[:, :, 0])
    for t in times:
        h[t] = state = lam[None, None] * state + x[:, :, t]
    if blocks > 1:
        ends = state[:, 1:] if reverse else state[:, :-1]
        start = jnp.pad(states_by_blocks(lam**_BLOCK, ends, reverse), ((0, 0), later, (0, 0)))
        for t in times:
            start = lam[None, None] * start
            h[t] = h[t] + start
    y = jnp.stack([h[t] for t in range(_BLOCK)], axis=2).reshape(batch, blocks * _BLOCK, states)
    return y[:, padding:] if reverse else y[:, :length]
