"""Trains one model on one task: prepares data, runs steps, evaluates, saves, scores the test split.

Many steps run in one jitted call (`lra.training.step`). Logging, evaluation, checkpoints and
signals are handled between calls. Neither the length of a call nor an interruption changes a
result.
"""

import time
from contextlib import closing
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import DictConfig

from lra.errors import DivergedError, PreemptedError
from lra.runs import sanity
from lra.tasks.base import SPLITS
from lra.training import distributed
from lra.training.checkpoint import Checkpoints, check_metadata
from lra.training.data_parallel import DataParallel
from lra.training.evaluation import predict, sample_rows, score
from lra.training.micro_batch import choose_sizes, make_batches
from lra.training.preemption import Signals
from lra.training.prefetch import TrainingBatches, place_data
from lra.training.profiling import Profile, profiled_steps
from lra.training.recorder import Recorder
from lra.training.schedules import plateau_scale, plateau_update, schedule
from lra.training.setup import Setup, load_store
from lra.training.state import (
    Best,
    Examples,
    State,
    copy_tree,
    eval_weights,
    initial_state,
    selected_weights,
)
from lra.training.step import StepFunctions
from lra.training.timing import CallTimer

MIN_EVAL_EVERY = 100  # steps, unless trainer.eval_every is set


class Trainer:
    """Trains one run; `run` calls the other methods in order."""

    def __init__(self, cfg: DictConfig, setup: Setup, devices: DataParallel, recorder: Recorder):
        self.cfg, self.setup, self.devices, self.recorder = cfg, setup, devices, recorder
        self.checkpoints = Checkpoints(recorder.checkpoints)
        self.deadline = recorder.deadline
        steps = profiled_steps(cfg.trainer.profile, cfg.trainer.steps)
        self.profile = Profile(steps, recorder.folder.path / "profile", recorder.reporter.print)

    def run(self, signals: Signals) -> None:
        """Trains, then scores the test split once."""
        self.data = self.load_data()
        self.batches, self.step_fns, self.eval_batch = self.choose_batches()
        with closing(self.checkpoints):
            state, best = self.restore()
            self.recorder.start(int(state.step))
            self.batches.start(int(state.step))
            with (
                signals.deferred(),
                self.recorder.reporter.bar,
                closing(self.batches),
                closing(self.profile),
            ):
                state, best = self.loop(state, best, signals)
        self.finish(state, best)

    def load_data(self) -> dict[str, Examples]:
        """The splits, prepared if necessary and placed on the devices or on the host."""
        cfg = self.cfg
        store = load_store(cfg, self.setup.task)
        self.recorder.add_data(store)
        distributed.check_same_data(self.recorder.record["data"]["key"])
        data = place_data(store, self.devices, cfg.data.placement)
        limit = dict.fromkeys(SPLITS, cfg.trainer.eval_examples)
        limit["train"] = cfg.trainer.train_eval_examples
        how = self.recorder.record["data"]["sample"]
        self.scored_rows = {
            name: sample_rows(np.asarray(store.splits[name].labels), limit[name], how)
            for name in SPLITS
        }
        return data | {name: self.scored(name, data[name]) for name in ("val", "test")}

    def scored(self, name: str, split: Examples) -> Examples:
        """The examples of a split that are scored."""
        rows = self.scored_rows[name]
        return split if len(rows) == len(split.labels) else Examples(*(x[rows] for x in split))

    def choose_batches(self) -> tuple[TrainingBatches, StepFunctions, int]:
        """The source of batches, the jitted functions, and the evaluation batch size."""
        cfg, setup, devices = self.cfg.trainer, self.setup, self.devices
        variables = (setup.params, setup.batch_stats, setup.constants)
        setup.params, setup.batch_stats, setup.constants = devices.replicate(variables)
        make = cache(partial(make_batches, self.cfg, setup, self.data["train"], devices))
        micro_batch = cfg.micro_batch or cfg.batch_size
        counts = {name: len(split.labels) for name, split in self.data.items()}
        counts["train"] = min(counts["train"], cfg.train_eval_examples)
        # a larger batch would be padding
        eval_batch = devices.round_up(min(cfg.eval_batch_size, max(counts.values())))
        if micro_batch == "auto":
            kept = self.recorder.resumed_record()
            micro_batch, eval_batch, needs = choose_sizes(
                self.cfg,
                setup,
                self.data["val"],
                eval_batch,
                devices,
                make,
                self.new_state,
                kept,
            )
            self.recorder.reporter.micro_batch(micro_batch, cfg.batch_size, needs, eval_batch)
        self.recorder.sizes(micro_batch, eval_batch)
        return *make(micro_batch), eval_batch

    def new_state(self) -> State:
        """The state before the first step. Its arrays are its own, because a step donates them."""
        state, best = initial_state(self.setup)
        state = state._replace(params=best.params, batch_stats=best.batch_stats)
        return self.devices.replicate(state)

    def restore(self) -> tuple[State, Best]:
        """The state of the newest readable checkpoint, or a new one.

        Raises:
            RunFolderError: the checkpoint belongs to other data or another vocabulary.
        """
        state, best = self.new_state(), Best(self.setup.params, self.setup.batch_stats)
        saved = self.checkpoints.restore((state, best[:2]))
        if saved is not None:
            check_metadata(self.recorder.folder.path, saved.progress, self.setup.task.vocab)
            state, (params, batch_stats) = saved.state
            found = saved.progress["best"]
            best = Best(params, batch_stats, found["step"], found["accuracy"])
        self.recorder.resume(saved)
        return state, best

    def loop(self, state: State, best: Best, signals: Signals) -> tuple[State, Best]:
        """Trains to the last step. Each call ends where something is due, at the latest."""
        cfg = self.cfg.trainer
        every = intervals(cfg)
        timer, steps_per_call = CallTimer(cfg.call_seconds), 1
        step = int(state.step)
        while step < cfg.steps and not self.stopped_early(step, best):
            first, waiting = step, time.perf_counter()
            due_at = [(step // n + 1) * n for n in every.values()]
            ends = (cfg.steps, self.batches.available_until(step), self.profile.next_boundary(step))
            until = min(step + steps_per_call, *due_at, *ends)
            waited = time.perf_counter() - waiting  # for data from the host
            with self.profile.trace(step, until):
                start = time.perf_counter()
                state = self.batches.call(self.step_fns, state, self.setup.constants, until)
                jax.block_until_ready(state)
                seconds, step = waited + time.perf_counter() - start, int(state.step)
            # process 0's timing decides, so that all processes run the same number of steps
            steps_per_call = distributed.broadcast(partial(timer.next_call, until - first, seconds))
            if timer.calls == 1:
                self.recorder.start_time()
            if not bool(state.finite):
                raise DivergedError(
                    f"the loss became NaN or infinite at step {step} of {cfg.steps}; "
                    f"lower optim.lr, now {self.cfg.optim.lr}, lengthen optim.warmup or set "
                    f"optim.clip; the last checkpoint is kept"
                )
            if step == 1:
                self.recorder.first_loss(float(state.metric_sums[0] / state.metric_sums[2]))
            self.recorder.reporter.advance(step, until - first, seconds, state.metric_sums)

            due = {name for name, n in every.items() if step % n == 0 or step == cfg.steps}
            if "log" in due:
                state = self.log(step, state)
            if "eval" in due:
                state, best = self.evaluate(step, state, best)
            stop = self.stop_reason(signals)
            done = step == cfg.steps or self.stopped_early(step, best) is not None
            if "checkpoint" in due or stop or done:
                self.recorder.rate(timer.summary(cfg.batch_size))
                self.save(step, state, best)
            if stop and not done:
                raise PreemptedError(
                    f"stopped by {stop} at step {step} of {cfg.steps}, saved in "
                    f"{self.recorder.folder.path}; the same command with resume=auto continues"
                )
        return state, best

    def log(self, step: int, state: State) -> State:
        """Writes the mean loss and accuracy since the last line, and starts new sums."""
        loss, correct, count = (float(x) for x in state.metric_sums)
        rate = schedule(self.cfg.optim, self.cfg.trainer.steps)(step - 1)
        values = {
            "train/loss": loss / count,
            "train/accuracy": correct / count,
            "train/lr": float(rate) * plateau_scale(state.opt),
        }
        self.recorder.metrics(step, values)
        return state._replace(metric_sums=jnp.zeros_like(state.metric_sums))

    def evaluate(self, step: int, state: State, best: Best) -> tuple[State, Best]:
        """Scores validation; keeps the weights if they are the best so far."""
        weights, labels = eval_weights(state), np.asarray(self.data["val"].labels)
        logits = self.predict(weights, self.data["val"], "validation")
        # process 0's scores decide, because all processes act on them
        scores = distributed.broadcast(partial(score, logits, labels))
        if scores["accuracy"] > best.accuracy:
            params, batch_stats = copy_tree(weights)
            best = Best(params, batch_stats, step, scores["accuracy"])
        self.recorder.evaluation(step, scores, (best.step, best.accuracy), labels)
        if self.cfg.optim.schedule == "plateau":
            replicate = self.devices.replicate
            state = state._replace(opt=plateau_update(self.cfg.optim, state.opt, scores, replicate))
        return state, best

    def save(self, step: int, state: State, best: Best) -> None:
        """Saves the state, the best weights and what a resume needs of the record."""
        # on all processes, because all of them write a checkpoint
        distributed.run_on_all(self.recorder.folder.check_lock)
        progress = {
            "best": {"step": best.step, "accuracy": best.accuracy},
            **self.recorder.progress(self.setup.task.vocab),
        }
        start = time.monotonic()
        self.checkpoints.save(step, (state, best[:2]), progress)
        self.deadline.record_save(time.monotonic() - start)
        self.recorder.save(step=step)

    def stopped_early(self, step: int, best: Best) -> dict[str, Any] | None:
        """{step, reason} if `trainer.early_stopping` ends the run at `step`, else None."""
        cfg = self.cfg.trainer
        if step >= cfg.steps:
            return None
        return sanity.stopped_early(step, best.step, intervals(cfg)["eval"], cfg.early_stopping)

    def stop_reason(self, signals: Signals) -> str | None:
        """The signal or the time limit that stops the run, on whichever process it was seen."""
        reason = signals.received
        if reason is None and self.deadline.reached():
            reason = f"trainer.time_limit={self.cfg.trainer.time_limit}"
        return next((found for found in distributed.all_gather(reason) if found), None)

    def finish(self, state: State, best: Best) -> None:
        """Scores the whole test split once, with the weights that the protocol selects."""
        step = int(state.step)
        weights = selected_weights(self.cfg.protocol.select, state, best)
        self.recorder.scoring(len(self.data["test"].labels), self.stopped_early(step, best))
        splits = {**self.data, "train": self.scored("train", self.data["train"])}
        logits = {name: self.predict(weights, split, name) for name, split in splits.items()}
        labels = {name: np.asarray(split.labels) for name, split in splits.items()}
        scores = {name: score(logits[name], labels[name]) for name in splits}
        # again, for a run that was killed after its last evaluation
        self.recorder.check_chance(step, labels["val"])
        rows = self.scored_rows["test"]
        self.recorder.finish(step, scores, logits["test"], labels["test"], rows)

    def predict(self, weights: tuple[Any, Any], split: Examples, name: str) -> np.ndarray:
        """Logits of a whole split, (n, C) or (n, T, C) float32; `name` is shown on the console."""
        apply = partial(self.step_fns.predict, *weights, self.setup.constants)

        def tick(done: int) -> None:
            self.recorder.reporter.predicting(name, done, len(split.labels))

        return predict(apply, split.inputs, split.lengths, self.eval_batch, tick)


def intervals(cfg: DictConfig) -> dict[str, int]:
    """Steps between two log lines, evaluations and checkpoints, from the `trainer` section.

    In a short run on a CPU an evaluation takes as long as dozens of steps.
    """
    evaluate = cfg.eval_every or max(cfg.steps // 20, MIN_EVAL_EVERY)
    return {
        "log": cfg.log_every or max(cfg.steps // 100, 1),
        "eval": evaluate,
        "checkpoint": cfg.checkpoint_every or evaluate,
    }
