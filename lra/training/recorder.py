"""Records a training run: record.json, metrics, predictions, trackers and the console.

With several processes only the first one writes and prints.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from omegaconf import DictConfig

from lra.config.compose import run_config, to_container
from lra.config.rules import parse_duration
from lra.data.store import Store
from lra.errors import (
    ConfigError,
    DataError,
    DivergedError,
    LraError,
    PreemptedError,
    RunFolderError,
)
from lra.runs import records, sanity
from lra.runs.machine import git_commit, peak_bytes, versions
from lra.runs.progress import Reporter
from lra.runs.run_folder import RunFolder
from lra.runs.tracking import Tracker, make_tracker
from lra.tasks.base import SPLITS
from lra.training import distributed
from lra.training.checkpoint import (
    Restored,
    checkpoint_metadata,
    has_checkpoint,
    newest_progress,
)
from lra.training.optimizer import Group
from lra.training.preemption import Deadline
from lra.training.timing import compile_seconds

CHECKPOINTS = "checkpoints"  # subfolder of a run's folder

log = logging.getLogger(__name__)


class Recorder:
    """Writes the record and the metrics of one run.

    Attributes:
        record: the content of record.json; `save` writes it.
        deadline: when the run must save and stop.
        reporter: prints progress.
        checkpoints: folder of the checkpoints.

    Args:
        previous: the record that an earlier start of this run left; empty for a new run.
        num_classes: C of the task.
        groups: parameter groups of the optimizer.
        num_devices: devices that share a batch, over all processes.
        started: start of the run on the monotonic clock, in seconds.
    """

    def __init__(
        self,
        cfg: DictConfig,
        folder: RunFolder,
        previous: dict[str, Any],
        *,
        num_classes: int,
        groups: list[Group],
        num_devices: int,
        started: float,
    ):
        self.cfg, self.folder, self.started = cfg, folder, started
        self.deadline = Deadline(parse_duration(cfg.trainer.time_limit), started)
        self.num_classes, self.groups = num_classes, groups
        self.previous = previous
        self.record = initial_record(cfg, previous, groups, num_devices)
        self.metrics_lines = 0  # that metrics.jsonl should have
        self.tracker = Tracker()
        self.reporter = Reporter(
            cfg.trainer.steps,
            cfg.trainer.batch_size,
            live=cfg.trainer.progress,
            quiet=not distributed.is_first(),
        )
        self.checkpoints = folder.path / CHECKPOINTS

    def add_data(self, store: Store) -> None:
        """Records the data of the run and whether only a part of a split is scored."""
        data, limit = describe_data(store), self.cfg.trainer.eval_examples
        scored = [len(store.splits[name]) for name in ("val", "test")]
        data["partial"] = data["partial"] or (limit is not None and max(scored) > limit)
        # a run that resumes scores the examples of its earlier evaluations
        earlier = self.resumed_record().get("data")
        data["sample"] = earlier.get("sample", "first") if earlier else "stratified"
        self.record |= {"data": data, "reference": store.manifest["reference"]}

    def resumed_record(self) -> dict[str, Any]:
        """The record of an earlier start whose checkpoint is resumed, else empty."""
        return self.previous if has_checkpoint(self.checkpoints) else {}

    def sizes(self, micro_batch: int, eval_batch: int) -> None:
        """Records how many examples are held in memory at once."""
        self.record |= {"micro_batch": micro_batch, "eval_batch": eval_batch}

    def resume(self, saved: Restored | None) -> None:
        """Records the checkpoint that the run continues from; None for a new start.

        Raises:
            RunFolderError: the checkpoint was trained on other data.
        """
        record = self.record
        if saved is None:
            record |= {"selection": None, "first_loss": None, "at_chance": None}
            return
        if (self.previous.get("data") or record["data"])["splits"] != record["data"]["splits"]:
            raise RunFolderError(
                f"{self.folder.path} was trained on other data; choose another output.root"
            )
        record["resumed_from"].append(saved.step)
        record["damaged_checkpoints"] += saved.damaged
        record["selection"] = saved.progress["selection"]
        # these are absent in old checkpoints
        record["first_loss"] = saved.progress.get("first_loss")
        self.metrics_lines = saved.progress.get("metrics_lines", 0)

    def progress(self, vocab: Sequence[str] | None) -> dict[str, Any]:
        """What a checkpoint keeps for `resume` and, without record.json, for `previous_record`."""
        return records.to_json(
            {
                "record": self.record,
                "metrics_lines": self.metrics_lines,
                "selection": self.record["selection"],
                "first_loss": self.record["first_loss"],
                **checkpoint_metadata(self.record["config"], vocab),
            }
        )

    def start(self, step: int) -> None:
        """Opens the trackers and prints the header of a run that begins or resumes at `step`."""
        self.record["segments"] = self._segments(step)
        self._truncate_metrics(step)
        self.save(step=step)
        if distributed.is_first():
            self.tracker = make_tracker(
                self.cfg.tracker,
                self.folder.path,
                config=self.record["config"],
                names=to_container(self.cfg.names),
                seed=self.cfg.seed,
            )
        lr = self.cfg.optim.lr
        rates = [
            (g.name, lr * g.lr_factor, g.weight_decay, len(g.paths), g.num_params)
            for g in self.groups
        ]
        self.reporter.header(self.record, rates, self.folder.path)

    def _truncate_metrics(self, step: int) -> None:
        """Removes the lines after `step`; warns of lost lines and records their number."""
        found, expected = self.folder.truncate_metrics(step), self.metrics_lines
        self.metrics_lines = max(found, expected)  # old checkpoints do not state it
        lost, known = self.metrics_lines - found, self.record["lost_metrics"]
        self.record["lost_metrics"] = lost
        if lost > known:
            self.warn(
                f"{self.folder.path / records.METRICS} lacks {lost} of the {expected} lines up to "
                f"step {step}; the run continues without them, and curves have a gap"
            )

    def _segments(self, step: int) -> list[dict[str, Any]]:
        """What trained which steps: earlier starts whose steps are kept, and this one."""
        earlier = [part for part in self.previous.get("segments") or [] if part["step"] < step]
        keys = ("micro_batch", "commit", "versions")
        own = {"step": step, **self.record["device"], **{key: self.record[key] for key in keys}}
        return [*earlier, own]

    def first_loss(self, loss: float) -> None:
        """Records the mean loss of the first batch, in nats; warns if it is far from log(C)."""
        self.record["first_loss"] = loss
        tolerance = self.cfg.trainer.first_loss_tolerance
        if problem := sanity.first_loss_problem(loss, self.num_classes, tolerance):
            self.warn(problem)

    def start_time(self) -> None:
        """Records the seconds from the start to the first step, and those of them that compile."""
        self.record["time"] |= {
            "first_step_s": round(time.monotonic() - self.started, 3),
            "compile_s": round(compile_seconds(self.started), 3),
        }

    def rate(self, summary: dict[str, float]) -> None:
        """Records the training rate, `CallTimer.summary`."""
        self.record["time"] |= summary

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and sends it to the trackers."""
        self.folder.append_metrics({"step": step, **values})
        self.metrics_lines += 1
        self.tracker.log(step, values)

    def evaluation(
        self, step: int, scores: dict[str, Any], best: tuple[int, float], labels: np.ndarray
    ) -> None:
        """Records an evaluation on validation and which weights the protocol would select now.

        Args:
            best: step and accuracy of the best weights, this evaluation included.
            labels: of the validation split.
        """
        self.metrics(step, {"val/loss": scores["loss"], "val/accuracy": scores["accuracy"]})
        self.reporter.evaluation(step, scores, improved=best[0] == step)
        rule = self.cfg.protocol.select
        selected = best if rule == "best" else (step, scores["accuracy"])
        self.record["selection"] = {
            "rule": rule,
            "step": selected[0],
            "val_accuracy": selected[1],
            "last_step": step,
            "last_val_accuracy": scores["accuracy"],
        }
        self.check_chance(step, labels)

    def check_chance(self, step: int, labels: np.ndarray) -> None:
        """Records whether validation accuracy is at chance late in training; warns once."""
        cfg, accuracy = self.cfg.trainer, self.record["selection"]["last_val_accuracy"]
        if cfg.chance_after is None or step < cfg.chance_after * cfg.steps:
            return
        chance = sanity.chance(labels, self.num_classes)
        earlier = self.record["at_chance"]
        self.record["at_chance"] = sanity.is_at_chance(accuracy, chance, labels.size)
        if self.record["at_chance"] and earlier is None:
            self.warn(sanity.chance_warning(accuracy, chance, step, cfg.steps))

    def warn(self, message: str) -> None:
        if distributed.is_first():
            log.warning(message)

    def save(self, **changes: Any) -> None:
        """Writes record.json with `changes`."""
        self.record |= changes
        earlier = (self.previous.get("time") or {}).get("wall_s", 0.0)
        self.record["time"]["wall_s"] = round(earlier + time.monotonic() - self.started, 2)
        self.folder.write_record(self.record)

    def scoring(self, count: int, stopped_early: dict[str, Any] | None) -> None:
        """Notes the end of training and the number of test examples that are scored next."""
        self.record["stopped_early"] = stopped_early
        self.reporter.scoring(count, stopped_early)

    def finish(
        self,
        step: int,
        scores: dict[str, dict[str, Any]],
        logits: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        """Writes the predictions, the scores of all splits, and the status "finished".

        Args:
            scores: of each split.
            logits, labels: of the test split, (n, C) and (n,) or (n, T, C) and (n, T).
            rows: (n,), the row of the test split of each example.
        """
        self.folder.write_predictions(logits, labels, rows)
        self.record |= {"metrics": {name: scores[name] for name in SPLITS}, "step": step}
        chance = sanity.chance(labels, self.num_classes)
        self.record["learned"] = not sanity.is_at_chance(
            scores["test"]["accuracy"], chance, labels.size
        )
        self._end("finished", None)
        self.reporter.finished(self.record, self.tracker.sync_hint)

    def fail(self, error: BaseException) -> None:
        """Writes the error that ends the run; a full disk must not hide it.

        Data that are missing or do not fit the config leave no folder of a run that never started.
        """
        if isinstance(error, (ConfigError, DataError)) and self.folder.read_record() is None:
            self.folder.remove_if_empty()
            return
        try:
            self._end(_status_of(error), error)
        except LraError as second:
            if not (isinstance(error, RunFolderError) and isinstance(second, RunFolderError)):
                log.warning(str(second))  # otherwise both say that the folder was removed

    def _end(self, status: str, error: BaseException | None) -> None:
        self.record["memory"] = {"peak_bytes": peak_bytes()}
        message = None if error is None else f"{type(error).__name__}: {error}"
        scores = {
            f"{split}/{key}": value
            for split, part in (self.record["metrics"] or {}).items()
            for key, value in part.items()
        }
        try:
            self.save(status=status, error=message)
        finally:  # also on a full disk: W&B's exit hook would wait for an unfinished run
            self.tracker.summary({"status": status, **scores})
            self.tracker.finish(status, self.deadline.tracker_seconds())


def _status_of(error: BaseException) -> str:
    """The status of a run that ended with `error`."""
    if isinstance(error, (PreemptedError, KeyboardInterrupt)):
        return "preempted"
    return "diverged" if isinstance(error, DivergedError) else "failed"


def initial_record(
    cfg: DictConfig, previous: dict[str, Any], groups: list[Group], num_devices: int
) -> dict[str, Any]:
    """The record before the data is read.

    Fields that this start has not computed yet keep their previous values, so that a resume that
    fails early does not lose them.
    """
    device = jax.devices()[0]
    sizes = {group.name: group.num_params for group in groups}
    kept = (
        "data",
        "reference",
        "selection",
        "micro_batch",
        "eval_batch",
        "first_loss",
        "at_chance",
    )
    return {
        "status": "running",
        "error": None,
        **{key: cfg.names[key] for key in ("task", "model", "protocol", "experiment")},
        "seed": cfg.seed,
        "config": run_config(cfg),
        "command": cfg.names.command,
        **{key: previous.get(key) for key in kept},
        "step": previous.get("step", 0),
        "metrics": None,
        "params": {"total": sum(sizes.values()), "groups": sizes},
        "segments": list(previous.get("segments") or []),
        "resumed_from": list(previous.get("resumed_from") or []),
        "damaged_checkpoints": list(previous.get("damaged_checkpoints") or []),
        "lost_metrics": previous.get("lost_metrics") or 0,
        "tuning_runs": cfg.tuning_runs,
        "commit": git_commit(),
        "versions": versions(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": num_devices,
            "processes": jax.process_count(),
        },
        "stopped_early": None,
        "learned": None,
        "time": dict(previous.get("time") or {}),
        "memory": None,
    }


def previous_record(folder: RunFolder, config: dict[str, Any], resume: str) -> dict[str, Any]:
    """The record that an earlier start of this run left; empty if there was none.

    A run that failed before its first checkpoint may be overwritten. If record.json is lost, it is
    taken from the newest checkpoint.

    Raises:
        RunFolderError: the folder holds another run, or `resume` is not auto and it holds this one,
            or it holds checkpoints without any record.
    """
    record = folder.read_record()
    if record is None:
        return _lost_record(folder.path, config, resume)
    _check_same_run(folder.path, record["config"], config)
    if resume != "auto" and _is_worth_keeping(record, folder.path):
        raise RunFolderError(
            f"{folder.path} holds this run already, {record['status']} at step "
            f"{record.get('step', 0)}; resume=auto continues it (or shows a finished run again), "
            f"another output.root or seed starts a new one"
        )
    return record


def _check_same_run(folder: Path, found: dict[str, Any], config: dict[str, Any]) -> None:
    if records.config_hash(found) != records.config_hash(config):
        raise RunFolderError(
            f"{folder} holds another run; choose another output.root or remove that folder"
        )


def _lost_record(folder: Path, config: dict[str, Any], resume: str) -> dict[str, Any]:
    """The record as the newest checkpoint holds it; empty without checkpoints."""
    if not has_checkpoint(folder / CHECKPOINTS):
        return {}
    found = f"{folder} holds checkpoints but no {records.RECORD}"
    if resume != "auto":
        raise RunFolderError(
            f"{found}; resume=auto continues from the newest checkpoint, another output.root or "
            "seed starts a new run"
        )
    step, progress = newest_progress(folder / CHECKPOINTS)
    record = progress.get("record")
    if record is None:
        raise RunFolderError(
            f"{found}, and no checkpoint that can be read holds a copy of it; put {records.RECORD} "
            "back, or remove the folder to start anew"
        )
    _check_same_run(folder, record["config"], config)
    log.warning(f"{found}; the run continues with the copy in the checkpoint of step {step}")
    return record


def _is_worth_keeping(record: dict[str, Any], folder: Path) -> bool:
    return record["status"] in ("finished", "diverged") or has_checkpoint(folder / CHECKPOINTS)


def describe_data(store: Store) -> dict[str, Any]:
    """The record's `data`: source, content hashes and counts of each split."""
    parts = store.manifest["splits"].items()
    splits = {name: {"count": part["count"], "sha256": part["sha256"]} for name, part in parts}
    return {
        "source": store.manifest["source"],
        "key": data_key(splits),
        "partial": store.manifest["partial"],
        "splits": splits,
    }


def data_key(splits: Mapping[str, Any]) -> str:
    """A hash of the content, so that the same files in another folder are the same data."""
    content = "".join(splits[name]["sha256"] for name in SPLITS)
    return hashlib.sha256(content.encode()).hexdigest()
