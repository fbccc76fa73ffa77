"""Computes all states of a recurrence with a full matrix, h_t = f(h_{t-1} A + bu_t).

Paper: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv
2303.06349, equation (1), section 3.1. The steps run in order, because a parallel scan over matrix
products costs N times the work.

Deviation: the backward pass is the reversed recurrence, needs only the states, and computes the
gradient of A as one matrix product.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from models.ops.products import matmul_highest

# each function with its derivative in terms of its value
ACTIVATIONS = {
    "none": (lambda x: x, jnp.ones_like),
    "tanh": (jnp.tanh, lambda y: 1 - y**2),
    "relu": (jax.nn.relu, lambda y: (y > 0).astype(y.dtype)),
}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense_recurrence(
    a: Float[Array, "N N"],
    bu: Float[Array, "B L N"],
    activation: str = "none",
    reverse: bool = False,
) -> Float[Array, "B L N"]:
    """All states of h_t = f(h_{t-1} A + bu_t) with h_{-1} = 0.

    First-order gradients are exact; forward mode (`jax.jvp`) is not supported.

    Args:
        a: rows multiply the previous state, columns give the next one.
        bu: the input, already multiplied by B.
        activation: none | tanh | relu, f.
        reverse: computes h_t = f(h_{t+1} A + bu_t) with h_L = 0.
    """
    return _steps(a, bu, ACTIVATIONS[activation][0], reverse)


def _forward(a, bu, activation, reverse):
    states = dense_recurrence(a, bu, activation, reverse)
    return states, (a, states)


def _backward(activation, reverse, saved, cotangent):
    a, states = saved
    slope = ACTIVATIONS[activation][1](states)
    # d_t, the cotangent of the argument of f: d_t = slope_t (c_t + d_{t+1} A^T)
    dbu = _steps(a.T, cotangent, lambda x, slope: slope * x, not reverse, slope)
    late, early = (dbu[:, :-1], states[:, 1:]) if reverse else (dbu[:, 1:], states[:, :-1])
    return jnp.einsum("bln,blm->nm", early, late), dbu


dense_recurrence.defvjp(_forward, _backward)


def _steps(a, driven, f, reverse, *more):
    """h_t = f(h_{t-1} A + driven_t, *more_t), step by step."""
    length = driven.shape[1]

    # time stays the second axis, as in `models.ops.recurrence.states_by_steps`
    def step(count, carry):
        state, states = carry
        t = length - 1 - count if reverse else count
        at = partial(lax.dynamic_index_in_dim, index=t, axis=1, keepdims=False)
        state = f(matmul_highest(state, a) + at(driven), *map(at, more))
        return state, lax.dynamic_update_index_in_dim(states, state, t, axis=1)

    return lax.fori_loop(0, length, step, (jnp.zeros_like(driven[:, 0]), jnp.zeros_like(driven)))[1]
