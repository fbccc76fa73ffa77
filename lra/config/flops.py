"""Counts the floating-point operations of a JAX function in its jaxpr.

XLA's `cost_analysis` is not used, because it counts the body of a loop once, whatever its length.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Primitives that move, name or generate numbers without arithmetic.
# fmt: off
FREE = frozenset((
    "broadcast", "broadcast_in_dim", "bitcast_convert_type", "complex", "concatenate", "conj",
    "convert_element_type", "copy", "copy_p", "device_put", "dynamic_slice",
    "dynamic_update_slice", "empty", "expand_dims", "gather", "get", "imag", "iota",
    "optimization_barrier", "pad", "platform_index", "random_bits", "random_fold_in",
    "random_seed", "random_split", "random_unwrap", "random_wrap", "real", "reduce_precision",
    "reshape", "rev", "select_n", "sharding_constraint", "slice", "split", "squeeze",
    "stop_gradient", "swap", "threefry2x32", "transpose",
))
# fmt: on
# Real operations of one complex operation; 2 for any other.
COMPLEX = {"mul": 6, "div": 11, "square": 6}


class UncountedError(ValueError):
    """The number of operations depends on more than the shapes."""


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations on real numbers in one call of `function`.

    Matrix products and convolutions count 2 for each multiply-add (8 if complex), an FFT
    5 n log2 n (half if one side is real), a reduction 1 for each input element, anything else 1
    for each output element (`COMPLEX` if complex), and moving data 0. A loop counts its body
    times its length. A conditional counts the branch of this backend
    (`lax.platform_dependent`), or else its most expensive branch.

    Args:
        args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        UncountedError: a while loop whose number of steps depends on values.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name in FREE:
        return 0
    if name == "while":
        raise UncountedError("a while loop whose number of steps depends on values")
    if name == "cond":
        return _count_branches(params)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * _count(params["jaxpr"])
    if inner := _inner(params):  # a call: jit, remat, custom derivatives
        return _count(inner)
    out: Any = equation.outvars[0].aval
    sources: list[Any] = [v.aval for v in equation.invars]
    is_complex = jnp.iscomplexobj(out)
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        each = math.prod(sources[0].shape[axis] for axis in contracted)
        return (8 if is_complex else 2) * out.size * each
    if name == "conv_general_dilated":
        filters = sources[1].shape[params["dimension_numbers"].rhs_spec[0]]
        return (8 if is_complex else 2) * out.size * (sources[1].size // max(filters, 1))
    if name == "fft":
        whole = max(sources[0].size, out.size)  # the real side of a real FFT has the full length
        half = 1 if is_complex and jnp.iscomplexobj(sources[0]) else 0.5
        return round(5 * whole * math.log2(max(math.prod(params["fft_lengths"]), 1)) * half)
    if name.startswith(("reduce_", "cum", "arg")):
        return sources[0].size * (2 if jnp.iscomplexobj(sources[0]) else 1)
    if name.startswith("scatter"):
        return 0 if name == "scatter" else sources[2].size
    if name in ("sort", "top_k"):
        length = sources[0].shape[params.get("dimension", -1)]
        return sources[0].size * math.ceil(math.log2(max(length, 2)))
    return out.size * (COMPLEX.get(name, 2) if is_complex else 1)


def _count_branches(params: dict[str, Any]) -> int:
    branches = [branch.jaxpr for branch in params["branches"]]
    for branch, platforms in zip(branches, params.get("branches_platforms") or (), strict=False):
        if platforms is None or jax.default_backend() in platforms:
            return _count(branch)
    return max(map(_count, branches))


def _inner(params: dict[str, Any]) -> core.Jaxpr | None:
    """The first jaxpr among an equation's parameters, a function before its derivative rule."""
    for key in ("call_jaxpr", "fun_jaxpr", "jaxpr", *params):
        value = params.get(key)
        value = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if isinstance(value, core.Jaxpr):
            return value
    return None
