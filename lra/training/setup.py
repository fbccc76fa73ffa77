"""Builds task, model and optimizer from a config, before any data is read."""

from collections.abc import Callable
from typing import Any, cast

import jax
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from lra.config.build import build_task, model_builder
from lra.errors import ConfigError
from lra.training.optimizer import adamw


class Setup:
    """What a config builds before any data is read: task, model, optimizer. Refuses what does not fit together."""

    def __init__(self, cfg: DictConfig):
        self.task, self.precision = build_task(cfg), cfg.trainer.precision
        count = (self.task.split_sizes() or {}).get("train")
        if count is not None:
            check_batch_size(cfg, count)
        model_key, self.order_key, self.dropout_key = jax.random.split(jax.random.key(cfg.seed), 3)
        self.graph, self.params, self.batch_stats, self.constants = build(
            model_builder(cfg, self.task), model_key
        )
        if cfg.trainer.micro_batch == "auto" and jax.tree.leaves(self.batch_stats):
            raise ConfigError(
                "trainer.micro_batch=auto would let the free memory choose the batches that batch norm sees, and so the "
                "result; set trainer.micro_batch to a number or null, or backbone.norm to layer, rms or none"
            )
        self.ema, self.label_smoothing = cfg.optim.ema, cfg.optim.label_smoothing
        self.tx, self.groups = adamw(
            cast(dict[str, Any], OmegaConf.to_container(cfg.optim)), cfg.trainer.steps, self.params
        )


def check_batch_size(cfg: DictConfig, count: int) -> None:
    if count < cfg.trainer.batch_size:
        raise ConfigError(
            f"trainer.batch_size={cfg.trainer.batch_size} exceeds the {count} training examples"
        )


def build(builder: Callable[..., nnx.Module], key: jax.Array) -> tuple:
    """Make the model; returns (graph, params, batch statistics, everything else that is fixed)."""
    try:
        model = builder(rngs=nnx.Rngs(params=key))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    graph, *variables = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    # a weak type (of `jnp.full(shape, 0.5)`, say) would be lost in the first step, and the second would compile again
    return graph, *jax.tree.map(
        lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, variables
    )
