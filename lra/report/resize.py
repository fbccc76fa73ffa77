"""Rebuilds the model of a saved run for inputs of another length."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import jax
from omegaconf import DictConfig, OmegaConf

from lra.config.build import build_task, model_builder
from lra.config.messages import nearest, translated_errors
from lra.config.schema import check_config
from lra.errors import ConfigError
from lra.report.saved_run import SavedRun
from lra.training.setup import Setup, build


def split_settings(words: Sequence[str]) -> list[list[str]]:
    """Splits task.KEY=A,B,... words into one list of task.KEY=VALUE words for each setting.

    Setting i takes value i of each key; a key with a single value has it in every setting.
    """
    if not words:
        raise ConfigError(
            "length: expected a task.KEY=VALUE that makes the task longer, such as "
            "task.length=128,256"
        )
    keys, texts = zip(*(word.split("=", 1) for word in words), strict=True)
    values = [text.split(",") if text[:1] not in "[{" else [text] for text in texts]
    count = max(map(len, values))
    for word, options in zip(words, values, strict=True):
        if len(options) not in (1, count):
            raise ConfigError(
                f"{word} has {len(options)} values and another key {count}; "
                "give each key the same number of values, or one"
            )
    return [
        [f"{key}={options[i % len(options)]}" for key, options in zip(keys, values, strict=True)]
        for i in range(count)
    ]


def resized_setup(run: SavedRun, words: Sequence[str]) -> Setup:
    """The model of a run for its task with other settings, if only lengths and no shapes change."""
    known = [name for name in run.cfg.task if not name.startswith(("_", "name", "hparams"))]
    for word in words:
        key = word.partition("=")[0].removeprefix("task.")
        if key.partition(".")[0] not in known:
            raise ConfigError(
                f"task={run.task.name} has no {key} to set{nearest(key, known)}; "
                f"it has: {', '.join(known)}"
            )
    with translated_errors(words):
        cfg = cast(DictConfig, OmegaConf.merge(run.cfg, OmegaConf.from_dotlist(list(words))))
        check_config(cfg)
    task = build_task(cfg)
    for name in ("vocab", "num_tokens", "num_classes", "num_features", "dual"):
        found, trained = getattr(task, name), getattr(run.task, name)
        if found != trained:
            if name == "vocab" and found and trained:
                name, found, trained = "vocab size", len(found), len(trained)
            raise ConfigError(
                f"{' '.join(words)}: {name.replace('_', ' ')} is {found} there and {trained} in "
                "the run; only lengths may change"
            )
    cfg.trainer.batch_size = 1  # there may be fewer training examples than the batch of the run
    setup = Setup(cfg)
    old, new = parameter_shapes(run.setup), parameter_shapes(setup)
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"{' '.join(words)}: the parameters of this model depend on the length: {name} is "
                f"{old.get(name, 'absent')} at {run.task.seq_len} positions and "
                f"{new.get(name, 'absent')} at {setup.task.seq_len}; the model runs only at "
                "the length it was trained at"
            )
    return setup


def setup_for_windows(run: SavedRun, size: int) -> tuple[Setup, int]:
    """The model of a run for the shortest inputs of at least `size` positions, and their length.

    The length is that of the run if parameters depend on it. Constants such as filters stay those
    of the run, because only the input is shorter.
    """
    while size < run.task.seq_len:
        task, setup = copy.copy(run.task), copy.copy(run.setup)
        task.seq_len = size
        builder = model_builder(run.cfg, task)
        try:
            setup.graph, setup.params, setup.batch_stats, _ = build(builder, jax.random.key(0))
        except ConfigError:  # the model refuses inputs this short
            size *= 2
            continue
        if parameter_shapes(setup) != parameter_shapes(run.setup):
            break
        return setup, size
    return run.setup, run.task.seq_len


def parameter_shapes(setup: Setup) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and batch statistics by name."""
    leaves: Any = jax.tree_util.tree_leaves_with_path((setup.params, setup.batch_stats))
    return {
        jax.tree_util.keystr(path[1:-1], simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
    }
