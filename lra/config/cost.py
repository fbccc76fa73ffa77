"""Computes a model's parameters, FLOPs and recurrent state from shapes alone."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from omegaconf import DictConfig

from lra.config.build import build_task, model_builder
from lra.config.flops import UncountedError, flops
from models.mixer import StreamingMixer


class Cost(NamedTuple):
    """Sizes of a model for a task.

    Attributes:
        flops: of one example, forward, in evaluation; None if they cannot be counted, with the
            reason in `note`.
        state: see `state_size`.
    """

    width: int
    depth: int
    params: int
    flops: int | None
    state: int | None
    note: str = ""


def cost(cfg: DictConfig) -> Cost:
    """The cost of a resolved config's model; raises ConfigError if the model cannot be built."""
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
    size = (cfg.backbone.width, cfg.backbone.depth, parameters(model))
    return Cost(*size, operations, state_size(model), note)


def abstract_model(cfg: DictConfig, task) -> Any:
    """The model of a config with shapes for arrays; raises ConfigError for a refused value."""
    build = model_builder(cfg, task)
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=jax.random.key(0))))


def parameters(model: nnx.Module) -> int:
    """Number of trained parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def state_size(model: Any) -> int | None:
    """Real numbers in the recurrent state of one sequence, over all layers; a complex one is two.

    None if a mixer has no recurrent form with its options.
    """
    graph, variables = nnx.split(model)

    def states(variables):
        return [block.mixer.init_state(1) for block in nnx.merge(graph, variables).blocks]

    if not all(isinstance(block.mixer, StreamingMixer) for block in model.blocks):
        return None
    try:
        leaves = jax.tree.leaves(jax.eval_shape(states, variables))
    except ValueError:  # such as a bidirectional mixer
        return None
    return sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves)
