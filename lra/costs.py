"""What does a model cost? Parameters, operations and recurrent state, counted from shapes: no array is made, nothing runs.

Operations are counted in the jaxpr and not asked of XLA, whose `cost_analysis` counts the body of a loop once, whatever its
length, so that a recurrence over 16,384 steps would look free.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core
from omegaconf import DictConfig
from tabulate import tabulate

from lra.config import build_task, compose, model_builder, options
from lra.errors import ConfigError

# what moves, names or makes up numbers without calculating
# fmt: off
FREE = frozenset((
    "broadcast", "broadcast_in_dim", "bitcast_convert_type", "complex", "concatenate", "conj", "convert_element_type",
    "copy", "copy_p", "device_put", "dynamic_slice", "dynamic_update_slice", "empty", "expand_dims", "gather", "get",
    "imag", "iota", "optimization_barrier", "pad", "platform_index", "random_bits", "random_fold_in", "random_seed",
    "random_split", "random_unwrap", "random_wrap", "real", "reduce_precision", "reshape", "rev", "select_n",
    "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "swap", "threefry2x32", "transpose",
))
# fmt: on
COMPLEX = {"mul": 6, "div": 11, "square": 6, "add": 2, "sub": 2, "neg": 2}  # real operations of a complex one; others 2


class Cost(NamedTuple):
    """Sizes of a model for a task; None where there is none, or where it cannot be counted."""

    width: int
    depth: int
    params: int
    flops: int | None
    state: int | None
    note: str = ""  # why `flops` is None


def cost(cfg: DictConfig) -> Cost:
    """The cost of a resolved config's model: see `parameters`, `flops` (of one example, evaluated) and `state_size`.

    Raises:
        ConfigError: the task or the model refuses a value.
    """
    task = build_task(cfg)
    model = abstract_model(cfg, task)
    graph, variables = nnx.split(model)
    pair = (2,) if task.dual else ()
    features = (task.num_features,) if task.num_tokens is None else ()
    kind = jnp.float32 if task.num_tokens is None else jnp.int32
    inputs = jax.ShapeDtypeStruct((1, *pair, task.seq_len, *features), kind)
    lengths = jax.ShapeDtypeStruct((1, *pair), jnp.int32)

    def forward(variables, inputs, lengths):
        return nnx.merge(graph, variables)(inputs, lengths, train=False)

    operations, note = None, ""
    try:
        operations = flops(forward, variables, inputs, lengths)
    except UncountedError as error:
        note = f"operations not counted: {error}"
    return Cost(cfg.backbone.width, cfg.backbone.depth, parameters(model), operations, state_size(model), note)


def abstract_model(cfg: DictConfig, task) -> Any:
    """The model of a config, shapes in place of arrays.

    Raises:
        ConfigError: the model refuses a value.
    """
    build = model_builder(cfg, task)
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=jax.random.key(0))))


def parameters(model: nnx.Module) -> int:
    """How many numbers are trained."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def state_size(model: Any) -> int | None:
    """Real numbers that the recurrent form keeps for one sequence, all layers together; a complex one counts as two.

    None where a mixer has no recurrent form, or none with these options.
    """
    graph, variables = nnx.split(model)

    def states(variables):
        return [block.mixer.init_state(1) for block in nnx.merge(graph, variables).blocks]

    if not all(hasattr(block.mixer, "init_state") for block in model.blocks):
        return None
    try:
        leaves = jax.tree.leaves(jax.eval_shape(states, variables))
    except ValueError:  # bidirectional, say
        return None
    return sum(leaf.size * (2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1) for leaf in leaves)


# --- the table of `lra models` -------------------------------------------------------------------------------------

HEADERS = ("model", "width", "depth", "parameters", "FLOPs", "state")
FORMATS = {"terminal": "simple", "markdown": "pipe", "latex": "latex_booktabs"}


def table(overrides: Sequence[str], format: str = "terminal") -> str:
    """Costs of the models on a task, as text; one that cannot be built has the reason in its row.

    Args:
        overrides: as for `lra train`; `model=A,B` restricts the rows.
        format: terminal, markdown, latex or csv (plain numbers).
    Raises:
        ConfigError: an override is no KEY=VALUE, or no model can be built, all for one reason.
    """
    if stray := [word for word in overrides if "=" not in word]:
        raise ConfigError(f"{stray[0]}: expected KEY=VALUE words as for `lra train`, such as task=listops")
    rows: dict[str, Cost | ConfigError] = {}
    title = ""
    for name, words in _each_model(overrides):
        try:
            cfg = compose(words)
            title = f"{cfg.names.task}, protocol {cfg.names.protocol}; "
            rows[name or cfg.names.model] = cost(cfg)
        except ConfigError as error:
            rows[name] = error
    reasons = {str(row) for row in rows.values() if isinstance(row, ConfigError)}
    if len(reasons) == 1 and all(isinstance(row, ConfigError) for row in rows.values()):
        raise ConfigError(reasons.pop())
    if format == "csv":
        return _csv(rows)
    cells = [_cells(name, row, "{:,}".format) for name, row in rows.items()]
    noted = [*HEADERS, ""] if any(row[-1] for row in cells) else HEADERS
    body = tabulate(
        [row[: len(noted)] for row in cells],
        headers=noted,
        tablefmt=FORMATS[format],
        disable_numparse=True,
        colalign=("left", *["right"] * (len(HEADERS) - 1), "left")[: len(noted)],
    )
    about = (
        f"{title}FLOPs: one example, forward, on {jax.default_backend()}; state: numbers a step keeps for one sequence"
    )
    return f"{about}\n\n{body}\n" if format in ("terminal", "markdown") else f"{body}\n"


def _each_model(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, overrides that choose it alone); an experiment names its model itself."""
    if any(word.startswith("experiment=") and word != "experiment=null" for word in overrides):
        yield "", list(overrides)
        return
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("model=")]
    names = chosen[-1].split(",") if chosen else options("model")
    others = [word for word in overrides if not word.startswith("model=")]
    yield from ((name, [*others, f"model={name}"]) for name in dict.fromkeys(names))


def _cells(name: str, row: "Cost | ConfigError", shown: Callable[[int], str]) -> list[str]:
    """One row, the note last."""
    if isinstance(row, ConfigError):
        return [name, *["-"] * (len(HEADERS) - 1), str(row)]
    return [name, *("-" if number is None else shown(number) for number in row[:-1]), row.note]


def _csv(rows: "Mapping[str, Cost | ConfigError]") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADERS, "note"])
    for name, row in rows.items():
        writer.writerow("" if cell == "-" else cell for cell in _cells(name, row, str))
    return text.getvalue()


# --- operations ----------------------------------------------------------------------------------------------------


class UncountedError(ValueError):
    """A program whose operations depend on more than its shapes."""


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations on real numbers in one call of `function`; `args` may be `jax.ShapeDtypeStruct`s.

    Products of matrices and convolutions count 2 for each multiply-add (8 where complex), an FFT 5 n log2 n (half where one
    side is real), a reduction 1 for each number it reads, all else 1 for each number it makes (COMPLEX lists the complex
    ones), and what only moves numbers nothing. A loop counts its body times its length; of branches the one counts that this
    backend runs, where `lax.platform_dependent` says so, else the most expensive one.

    Raises:
        UncountedError: a while loop whose number of steps the values decide.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name in FREE:
        return 0
    if name == "while":
        raise UncountedError("a while loop whose number of steps the values decide")
    if name == "cond":
        return _count_branches(params)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * _count(params["jaxpr"])
    if inner := list(_inner(params)):  # a call: jit, remat, custom derivatives
        return _count(inner[0])
    out: Any = equation.outvars[0].aval
    sources: list[Any] = [v.aval for v in equation.invars]
    is_complex = jnp.issubdtype(out.dtype, jnp.complexfloating)
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        each = math.prod(sources[0].shape[axis] for axis in contracted)
        return (8 if is_complex else 2) * out.size * each
    if name == "conv_general_dilated":
        filters = sources[1].shape[params["dimension_numbers"].rhs_spec[0]]
        return (8 if is_complex else 2) * out.size * (sources[1].size // max(filters, 1))
    if name == "fft":
        return _count_fft(params["fft_lengths"], sources[0], out)
    if name.startswith(("reduce_", "cum", "arg")):
        return sources[0].size * (2 if jnp.issubdtype(sources[0].dtype, jnp.complexfloating) else 1)
    if name.startswith("scatter"):
        return 0 if name == "scatter" else sources[2].size
    if name in ("sort", "top_k"):
        length = sources[0].shape[params.get("dimension", -1)]
        return sources[0].size * math.ceil(math.log2(max(length, 2)))
    return out.size * (COMPLEX.get(name, 2) if is_complex else 1)


def _count_fft(lengths: tuple[int, ...], source: Any, out: Any) -> int:
    length = math.prod(lengths)
    is_real = not (jnp.iscomplexobj(source) and jnp.iscomplexobj(out))
    # the real side has the full length
    whole = max(source.size, out.size)
    return round(5 * whole * math.log2(max(length, 1)) * (0.5 if is_real else 1))


def _count_branches(params: dict[str, Any]) -> int:
    branches = [branch.jaxpr for branch in params["branches"]]
    for branch, platforms in zip(branches, params.get("branches_platforms") or (), strict=False):
        if platforms is None or jax.default_backend() in platforms:
            return _count(branch)
    return max(map(_count, branches))


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters, what it calls first: a derivative rule stands behind its function."""
    for key in ("call_jaxpr", "fun_jaxpr", "jaxpr", *params):
        value = params.get(key)
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
