"""A saved run: its record, config, data and weights, and the logits of its model."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from lra.config.build import build_task, check_recorded_targets, data_arguments
from lra.config.compose import check_resolved, resolve, upgrade_config
from lra.config.messages import translated_errors
from lra.config.schema import COMPLETE_SECTIONS, keys_in_eval
from lra.data.store import Split, Store, prepare
from lra.errors import ConfigError, DataError, LraError, MismatchError, RunFolderError
from lra.runs import records
from lra.runs.progress import preparing
from lra.tasks.base import Task
from lra.training.checkpoint import Checkpoints, check_metadata
from lra.training.determinism import use_deterministic_ops
from lra.training.evaluation import predict, sample_rows, score
from lra.training.memory import is_out_of_memory
from lra.training.recorder import CHECKPOINTS, describe_data
from lra.training.setup import Setup, use_compilation_cache
from lra.training.state import Best, State, initial_state, selected_weights
from lra.training.step import make_step_functions


class SavedRun:
    """Reads the record of a run, and its data and weights on first use. Sets JAX up for its config.

    Args:
        overrides: KEY=VALUE of the keys in `keys_in_eval`.
        split: train, val or test.
        weights: best or last; None for those that the protocol selects.
        examples: number of examples of the split, chosen as the run chose its own; None for those
            that the run scored.
        allow_targets: classes outside `lra` and `models` that the record may name.

    Raises:
        RunFolderError: the folder holds no record, or no checkpoint that can be read.
        ConfigError: an override of another key, or a config that cannot be built or is not trusted.
        DataError: the split differs from the data of the run.
        LraError: a batch does not fit into device memory.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str] = (),
        *,
        split: str = "test",
        weights: str | None = None,
        examples: int | None = None,
        allow_targets: Sequence[str] = (),
    ):
        record = records.read_record(folder)
        if record is None:
            raise RunFolderError(
                f"{folder} holds no run; name a run folder such as "
                "runs/TASK/MODEL/strict-s0-1a2b3c4d"
            )
        self.folder, self.record, self.split = folder, record, split
        check_recorded_targets(record["config"], allow_targets)
        with translated_errors(overrides):  # such as a missing section
            self.cfg = cfg = resolved_config(record, overrides)
            self.rule = weights or cfg.protocol.select
            self.task = build_task(cfg)
            # groups have no arrays in a checkpoint, and patterns of others may match very slowly
            cfg.optim.groups = cfg.optim.no_decay = None
            self.limit: int | None = examples or self.scored_examples(split)
        # the training functions are never called, so the batch size is irrelevant
        self._forward = cache(lambda setup: make_step_functions(setup, 1).predict)
        if cfg.trainer.deterministic:
            use_deterministic_ops(True)
        if cfg.trainer.compilation_cache:
            use_compilation_cache()

    @cached_property
    def store(self) -> Store:
        return preparing(self.task, partial(prepare, self.task, **data_arguments(self.cfg)))

    @cached_property
    def whole_split(self) -> Split:
        """All examples of the split, memory-mapped."""
        recorded = (self.record.get("data") or {}).get("splits") or {}
        if describe_data(self.store)["splits"][self.split] != recorded.get(self.split):
            raise DataError(
                f"{self.split} under data.root={self.cfg.data.root} differs from the data of the "
                "run; set data.root to the data of the run"
            )
        return self.store.splits[self.split]

    @cached_property
    def data(self) -> Split:
        """The evaluated examples."""
        return self.evaluated(self.whole_split)

    @property
    def rows(self) -> np.ndarray:
        """The row of the split (n,) of each evaluated example, ascending."""
        return self.rows_of(self.whole_split)

    def rows_of(self, split: Split) -> np.ndarray:
        how = (self.record.get("data") or {}).get("sample", "first")
        return sample_rows(np.asarray(split.labels), self.limit, how)

    def evaluated(self, split: Split) -> Split:
        """The examples of a split that are evaluated, all as views of the mapped memory."""
        rows = self.rows_of(split)
        if len(rows) < len(split):
            return split.batch(rows)
        return Split(split.inputs.view(np.ndarray), np.asarray(split.lengths), split.labels)

    def scored_examples(self, split: str) -> int | None:
        """The number of examples of a split that the run scored; None for all."""
        trainer = self.cfg.trainer
        return trainer.train_eval_examples if split == "train" else trainer.eval_examples

    @cached_property
    def eval_batch(self) -> int:
        """Examples of an evaluation batch: as in training, those of the largest scored split."""
        splits = (self.record.get("data") or {}).get("splits") or {}
        counts = {name: entry.get("count", 0) for name, entry in splits.items()}
        if not counts:
            raise RunFolderError(f"{self.folder}: the record has no data.splits; run it again")
        scored = (min(count, self.scored_examples(name) or count) for name, count in counts.items())
        return min(self.cfg.trainer.eval_batch_size, max(scored))

    @cached_property
    def setup(self) -> Setup:
        return Setup(self.cfg)

    @cached_property
    def checkpoint(self) -> tuple[State, Best, int]:
        """State, best weights and step of the newest checkpoint."""
        path, saved = self.folder / CHECKPOINTS, None
        if path.is_dir():
            state, best = initial_state(self.setup)
            with closing(Checkpoints(path, read_only=True)) as checkpoints:
                saved = checkpoints.restore((state, best[:2]))
        if saved is None:
            raise RunFolderError(
                f"{self.folder} holds no checkpoint: the run did not keep its weights, or it ended "
                "before its first checkpoint"
            )
        check_metadata(self.folder, saved.progress, self.task.vocab)
        (state, (params, batch_stats)), found = saved.state, saved.progress["best"]
        return state, Best(params, batch_stats, found["step"], found["accuracy"]), saved.step

    @cached_property
    def weights(self) -> tuple[Any, Any]:
        """(params, batch_stats) of the requested weights."""
        state, best, _ = self.checkpoint
        return selected_weights(self.rule, state, best)

    @property
    def weights_step(self) -> int:
        """The step at which the requested weights were saved."""
        state, best, _ = self.checkpoint
        return best.step if self.rule == "best" else int(state.step)

    @property
    def recorded_step(self) -> int:
        """The step of the selected weights according to the record."""
        return (self.record.get("selection") or {}).get("step", self.record.get("step", 0))

    @property
    def title(self) -> str:
        return "{model} on {task}, protocol {protocol}, seed {seed}".format_map(self.record)

    @property
    def scores_recorded(self) -> bool:
        """Whether the run is finished and recorded the scores of the requested weights."""
        return self.record["status"] == "finished" and self.rule == self.cfg.protocol.select

    @property
    def recorded_scores(self) -> Mapping[str, Any]:
        """The recorded scores of the requested split."""
        return (self.record.get("metrics") or {}).get(self.split) or {}

    def stored_predictions(self) -> dict[str, np.ndarray] | None:
        """The content of predictions.npz if it belongs to the requested split and weights.

        Raises:
            MismatchError: it does not give the recorded scores of test.
        """
        if self.split != "test" or not self.scores_recorded:
            return None
        stored = records.read_predictions(self.folder)
        if stored is not None:
            found = score(stored["logits"], stored["labels"])
            check_scores(self.recorded_scores, found, f"the logits in {records.PREDICTIONS}")
        return stored

    def logits(
        self, inputs: np.ndarray, lengths: np.ndarray, setup: Setup | None = None
    ) -> np.ndarray:
        """Logits (n, C) or (n, T, C) of examples by the requested weights.

        A batch holds as many positions as an evaluation batch of the run. `setup` is a model for
        another length; None for the model of the run.
        """
        setup, size = setup or self.setup, self.eval_batch
        positions = inputs.shape[lengths.ndim]
        batch = max(1, min(size * self.task.seq_len // positions, max(size, len(lengths))))
        forward = partial(self._forward(setup), *self.weights, setup.constants)
        try:
            return predict(forward, inputs, lengths, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise LraError(
                f"out of memory at trainer.eval_batch_size={size}; set it lower"
            ) from error


def load_run(
    folder: str | Path,
    *,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    allow_targets: Sequence[str] = (),
) -> tuple[Any, Task]:
    """The trained model of a run (an `nnx.Module`) and its task; the arguments of `SavedRun`.

    Its inputs are those of `task.encode`, or of `task.decode` for a split.
    """
    run = SavedRun(Path(folder), overrides, weights=weights, allow_targets=allow_targets)
    return nnx.merge(run.setup.graph, *run.weights, run.setup.constants), run.task


def resolved_config(record: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """The config of a record with overrides; keys that the record lacks have today's defaults."""
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or key not in keys_in_eval():
            raise ConfigError(
                f"{word}: the config of a saved run is fixed; KEY=VALUE may set "
                f"{', '.join(keys_in_eval())}"
            )
    for section in ("task", "model", "protocol", "backbone", *COMPLETE_SECTIONS):
        if section not in record["config"]:
            raise ConfigError(f"the config of the record lacks the section {section}")
    check_resolved(record["config"])
    config = OmegaConf.create(upgrade_config(record["config"]))
    if batch := record.get("eval_batch"):  # the batch that fit, and that gave the stored bits
        config.trainer.eval_batch_size = batch
    cfg = cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides))))
    choices = {key: record.get(key) for key in ("task", "model", "experiment")}
    return resolve(cfg, choices, overrides)


def check_scores(
    recorded: Mapping[str, Any],
    found: Mapping[str, Any],
    origin: str,
    *,
    ties: float = 0.0,
    loss_tolerance: float = 1e-6,
) -> None:
    """Checks the scores of a record against those of logits from `origin`.

    Args:
        ties: fraction of labels that may have another class, as the two largest logits are close.
        loss_tolerance: relative.

    Raises:
        MismatchError: a score differs.
    """
    for name, value in found.items():
        stated = recorded.get(name)
        allowed = loss_tolerance * max(1.0, abs(value)) if name == "loss" else ties + 1e-9
        if stated is not None and not abs(stated - value) <= allowed:
            raise MismatchError(
                f"record.json states {name} {stated:.6g}, but {origin} give {value:.6g}; one of "
                "them is not of this run"
            )
