"""Builds task, model and optimizer from a config, before any data is read."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from lra.config.build import build_task, data_arguments, model_builder
from lra.config.options import CONF
from lra.data.store import Store, prepare
from lra.errors import ConfigError, LraError
from lra.runs.progress import preparing
from lra.tasks.base import Task
from lra.training import distributed
from lra.training.memory import is_out_of_memory
from lra.training.optimizer import adamw
from lra.training.profiling import profiled_steps


class Setup:
    """Task, model and optimizer of a config.

    Attributes:
        task: the task.
        graph, params, batch_stats, constants: the model, split by `nnx.split`; `constants` holds
            all variables that are neither parameters nor batch statistics.
        order_key, dropout_key: PRNG keys of the batch order and of dropout.
        tx: the optimizer.
        groups: its parameter groups.
    Raises:
        ConfigError: a value that the task, the model or the optimizer refuses.
    """

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
                "trainer.micro_batch=auto makes the result depend on the free memory, because "
                "batch norm computes its statistics per micro-batch; set trainer.micro_batch to "
                "a number or null, or backbone.norm to layer, rms or none"
            )
        self.ema, self.label_smoothing = cfg.optim.ema, cfg.optim.label_smoothing
        self.tx, self.groups = adamw(
            cast(dict[str, Any], OmegaConf.to_container(cfg.optim)), cfg.trainer.steps, self.params
        )


def check_compatible(cfg: DictConfig) -> None:
    """Checks keys against each other.

    Raises:
        ConfigError: the backbone ignores trainer.precision or trainer.remat, trainer.profile names
            steps that the run does not have, or the values of a named protocol were changed
            without changing its name.
    """
    profiled_steps(cfg.trainer.profile, cfg.trainer.steps)
    for key, default in (("precision", "float32"), ("remat", "none")):
        if key not in cfg.backbone and cfg.trainer[key] not in (default, "tf32"):
            raise ConfigError(
                f"trainer.{key}={cfg.trainer[key]} has no effect: "
                f"this backbone has no argument {key}"
            )
    named = CONF / "protocol" / f"{cfg.protocol.name}.yaml"
    if named.exists() and OmegaConf.load(named) != cfg.protocol:
        raise ConfigError(
            f"protocol.name={cfg.protocol.name} with other values is another protocol; "
            f"set protocol.name to a new name"
        )


def load_store(cfg: DictConfig, task: Task) -> Store:
    """The task's data, prepared if necessary; with several processes, on each of them.

    Raises:
        LraError: the data cannot be prepared, or a batch is larger than the training split.
    """
    # Raise an error of one process on all; otherwise the others hang in a collective.
    store = distributed.run_on_all(
        lambda: preparing(task, partial(prepare, task, **data_arguments(cfg)))
    )
    # Setup checks this only for tasks that know their size before they are prepared
    check_batch_size(cfg, len(store.splits["train"]))
    return store


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder or in JAX_COMPILATION_CACHE_DIR."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "lra" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # the default skips programs that compile in under a second, of which a start has dozens
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def check_batch_size(cfg: DictConfig, count: int) -> None:
    """Raises ConfigError if a batch is larger than the training split."""
    if count < cfg.trainer.batch_size:
        raise ConfigError(
            f"trainer.batch_size={cfg.trainer.batch_size} exceeds the {count} training examples"
        )


def build(builder: Callable[..., nnx.Module], key: jax.Array) -> tuple:
    """Builds the model; returns its graph, parameters, batch statistics and constants."""
    try:
        model = builder(rngs=nnx.Rngs(params=key))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise LraError(
            "out of memory while the model was built; lower backbone.width or backbone.depth, or "
            "the sizes in the section model"
        ) from error
    graph, *variables = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    # weak types, as of jnp.full(shape, 0.5), change in the first step, which would then recompile
    return graph, *jax.tree.map(
        lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, variables
    )
