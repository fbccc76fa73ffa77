"""The training story, told once, for every task and model.

Prepare the data, place it on the device, then run many steps in one jitted call (`lra.training.step`); between two calls log,
evaluate, save, and answer signals. Neither the length of a call nor an interruption changes a result.
"""

import hashlib
import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import DictConfig, OmegaConf

from lra.config.build import data_arguments
from lra.config.options import CONF
from lra.data.store import Store, prepare
from lra.errors import ConfigError, DivergedError, LraError, PreemptedError, RunFolderError
from lra.runs import machine, records, run_folder, sanity
from lra.runs.machine import peak_bytes
from lra.runs.progress import Reporter, preparing
from lra.runs.tracking import Tracker, make_tracker
from lra.tasks.base import SPLITS
from lra.training import distributed
from lra.training.checkpoint import (
    Checkpoints,
    check_metadata,
    checkpoint_metadata,
    holds_checkpoint,
)
from lra.training.data_parallel import DataParallel, choose_devices
from lra.training.deadline import Deadline, seconds_of
from lra.training.evaluation import predict, score
from lra.training.memory import is_out_of_memory, out_of_memory_advice
from lra.training.micro_batch import (
    check_micro_batch,
    halvings,
    largest_that_fits,
    micro_batch_sizes,
)
from lra.training.optimizer import Group
from lra.training.preemption import Signals
from lra.training.prefetch import DeviceData, HostPrefetch, fits_on_device, on_device, on_host
from lra.training.profiling import FOLDER as PROFILE
from lra.training.profiling import Profile, profiled_steps
from lra.training.schedules import plateau_scale, plateau_update, schedule
from lra.training.setup import Setup, check_batch_size
from lra.training.state import (
    Best,
    Examples,
    State,
    copy_tree,
    eval_weights,
    initial_state,
    selected_weights,
)
from lra.training.step import Program, compile_program

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # below a run's folder


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run a config to its end and return its record; the run's folder holds record, metrics, predictions, checkpoints.

    Raises:
        LraError: bad config or data, a folder in use, a diverged loss, an interruption; the record says which.
    """
    started = time.monotonic()  # waiting for other processes counts
    check(cfg)
    distributed.start(cfg)  # before anything asks JAX for a device
    if cfg.trainer.compilation_cache:
        use_compilation_cache()
    with distributed.together() as ending:
        return train_here(cfg, started, ending)


def train_here(cfg: DictConfig, started: float, ending: distributed.Ending) -> dict[str, Any]:
    """This process's part of `train`, which began at `started` on the monotonic clock."""
    distributed.check_same(cfg)
    layout = choose_devices(cfg)
    check_micro_batch(cfg, layout.count)
    setup = Setup(cfg)  # whatever is wrong with the config shows here, before a folder is made
    path = records.run_path(cfg.output.root, run_config(cfg), to_container(cfg.names))
    with distributed.open_folder(path) as folder:
        if (
            finished := distributed.agree(lambda: claim(folder, run_config(cfg), cfg.resume))
        ) is not None:
            return finished
        run = Run(cfg, folder, setup, layout, started)
        ending.record = run.end_elsewhere
        try:
            with Signals() as signals, signals.resumable():
                return run.train(signals)
        except BaseException as caught:
            error = distributed.explained(caught)
            try:
                run.end(status_of(error), error)
            except LraError as second:  # a full disk, say: the first error is the one to report
                log.warning(str(second))
            if is_out_of_memory(error):
                raise LraError(out_of_memory_advice(cfg, run.record["micro_batch"])) from error
            if error is not caught:
                raise error from caught
            raise


def status_of(error: BaseException) -> str:
    """The status of a run that `error` ended."""
    status = {
        PreemptedError: "preempted",
        KeyboardInterrupt: "preempted",
        DivergedError: "diverged",
    }
    return status.get(type(error), "failed")


def use_compilation_cache() -> None:
    """Keep compiled programs under the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another place."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "lra" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # by default what compiles in under a second is not kept: a start has dozens of such programs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def claim(folder: run_folder.RunFolder, config: dict, resume: str) -> dict | None:
    """May this run use the folder? Returns the record of a run that is already finished and need not be repeated.

    A run that ended before its first checkpoint, for a missing file or a full disk, left nothing to lose.

    Raises:
        RunFolderError: it holds a run, and `resume` does not say to continue it.
    """
    record = folder.read_record()
    if record is None:
        return None
    if records.config_hash(record["config"]) != records.config_hash(config):
        raise RunFolderError(
            f"{folder.path} holds another run; choose another output.root or remove that folder"
        )
    worth_keeping = record["status"] in ("finished", "diverged") or holds_checkpoint(
        folder.path / CHECKPOINTS
    )
    if worth_keeping and resume != "auto":
        raise RunFolderError(
            f"{folder.path} holds this run already, {record['status']} at step {record['step']}; "
            f"resume=auto continues it (a finished one is shown again), another output.root or seed starts a new one"
        )
    return record if record["status"] == "finished" else None


def check(cfg: DictConfig) -> None:
    """Refuse values that would fail late or be taken for something else."""
    if cfg.resume not in ("never", "auto"):
        raise ConfigError(f"resume={cfg.resume} is unknown; choose never or auto")
    if cfg.protocol.select not in ("best", "last"):
        raise ConfigError(f"protocol.select={cfg.protocol.select} is unknown; choose best or last")
    for key, default in (("precision", "float32"), ("remat", "none")):
        if key not in cfg.backbone and cfg.trainer[key] not in (default, "tf32"):
            raise ConfigError(
                f"trainer.{key}={cfg.trainer[key]} changes nothing: this backbone has no argument {key}"
            )
    seconds_of("trainer.time_limit", cfg.trainer.time_limit)
    profiled_steps(cfg.trainer.profile, cfg.trainer.steps)
    named = CONF / "protocol" / f"{cfg.protocol.name}.yaml"
    if named.exists() and OmegaConf.load(named) != cfg.protocol:
        raise ConfigError(
            f"protocol.name={cfg.protocol.name} with other values is another protocol; give it a name of its own"
        )


class Run:
    """One run from data to record. `train` is the story; the other methods are its steps."""

    def __init__(
        self,
        cfg: DictConfig,
        folder: run_folder.RunFolder,
        setup: Setup,
        layout: DataParallel,
        started: float | None = None,
    ):
        self.cfg, self.folder, self.setup, self.started = (
            cfg,
            folder,
            setup,
            started or time.monotonic(),
        )
        self.layout = layout
        self.before = distributed.agree(folder.read_record) or {}
        self.eval_batch = layout.whole(cfg.trainer.eval_batch_size)
        self.trackers = Tracker()
        self.checkpoints = Checkpoints(folder.path / CHECKPOINTS)
        self.reporter = Reporter(
            cfg.trainer.steps, cfg.trainer.batch_size, live=cfg.trainer.progress
        )
        self.reporter.console.quiet = not distributed.is_first()
        self.record = first_record(cfg, self.before, setup.groups)
        self.record["device"] |= {"count": layout.count, "processes": jax.process_count()}
        self.deadline = Deadline(
            seconds_of("trainer.time_limit", cfg.trainer.time_limit), self.started
        )
        steps = profiled_steps(cfg.trainer.profile, cfg.trainer.steps)
        self.profile = Profile(steps, folder.path / PROFILE, self.reporter.console.print)

    def train(self, signals: Signals) -> dict[str, Any]:
        cfg, setup = self.cfg, self.setup
        store = preparing(setup.task, partial(prepare, setup.task, **data_arguments(cfg)))
        check_batch_size(
            cfg, len(store.splits["train"])
        )  # again, for a task that did not know its size before
        self.record |= {"data": describe_data(store), "reference": store.manifest["reference"]}
        distributed.check_same_data(self.record["data"]["key"])
        setup.params, setup.batch_stats, setup.constants = self.layout.replicate(
            (setup.params, setup.batch_stats, setup.constants)
        )
        placed = place(store, self.layout, cfg.data.placement)
        data = {name: self.scored(name, split) for name, split in placed.items()}
        self.feed, self.program = self.fit(data)

        state, best = self.restore()
        self.record["segments"] = self.segments(int(state.step))
        self.folder.truncate_metrics(int(state.step))
        self.save_record(step=int(state.step))
        if distributed.is_first():
            self.trackers = make_tracker(
                cfg.tracker,
                self.folder.path,
                config=self.record["config"],
                names=to_container(cfg.names),
                seed=cfg.seed,
            )
        self.reporter.header(self.record, self.rates(), self.folder.path)
        self.feed.start(int(state.step))
        try:
            with signals.noted(), self.reporter:
                state, best = self.loop(state, best, data, signals)
        finally:
            self.profile.close()
            self.feed.close()
        return self.finish(state, best, data)

    def scored(self, name: str, split: Examples) -> Examples:
        """Of validation and test the examples that are scored: all, or the first `trainer.eval_examples`."""
        limit = self.cfg.trainer.eval_examples
        if name == "train" or limit is None or limit >= len(split.labels):
            return split
        self.record["data"]["partial"] = True
        return Examples(*(x[:limit] for x in split))

    def fit(self, data: dict[str, Examples]) -> tuple[DeviceData | HostPrefetch, Program]:
        """What trains: the batches and the jitted functions, at the micro-batch that is asked for or that fits.

        A resumed run keeps what it found when it started, where the devices can share it.
        """
        batch_size, wanted, layout = (
            self.cfg.trainer.batch_size,
            self.cfg.trainer.micro_batch,
            self.layout,
        )
        train, val = data["train"], data["val"]

        def make(size: int) -> tuple[DeviceData | HostPrefetch, Program]:
            program = compile_program(self.setup, batch_size, size, layout)
            if isinstance(train.labels, jax.Array):
                return DeviceData(train), program
            return HostPrefetch(
                train, self.setup.order_key, batch_size, size, layout, self.cfg.trainer.steps
            ), program

        if wanted != "auto":
            self.record |= {"micro_batch": wanted or batch_size, "eval_batch": self.eval_batch}
            return make(wanted or batch_size)

        best = copy_tree(
            (self.setup.params, self.setup.batch_stats)
        )  # a run holds the best weights beside its state
        made: list[Any] = [None, None]  # of the size tried last
        alone = (
            jax.process_count() == 1
        )  # else one that runs out of memory would leave the others waiting in a sum

        def training(size: int) -> tuple[Any, tuple]:
            made[:] = make(size)
            return made[0].trial(made[1], self.new_state(), self.setup.constants, int(alone))

        def evaluation(size: int) -> tuple[Any, tuple]:
            rows = np.arange(size) % len(val.labels)
            return made[1].apply, (*best, self.setup.constants, val.inputs[rows], val.lengths[rows])

        largest = partial(
            largest_that_fits,
            agree=lambda fits: all(distributed.gather(fits)),
            sharing=layout.local_count,
        )

        def choices(what: str, key: str, whole: int) -> tuple[str, list[int]]:
            before = self.before.get(key) if holds_checkpoint(self.checkpoints.folder) else None
            if before in micro_batch_sizes(whole, layout.count):
                return f"the {what} that this run began with,", [before]
            return f"a {what}", halvings(whole, layout.count)

        size, needs = largest(*choices("micro-batch", "micro_batch", batch_size), training)
        state = self.new_state()  # it is there while an evaluation runs
        found, _ = largest(
            *choices("batch of an evaluation", "eval_batch", self.eval_batch),
            evaluation,
            call=alone,
        )
        del state
        self.eval_batch = found
        self.reporter.micro_batch(size, batch_size, needs, self.eval_batch)
        self.record |= {"micro_batch": size, "eval_batch": self.eval_batch}
        return made[0], made[1]

    def segments(self, step: int) -> list[dict[str, Any]]:
        """Which devices made which steps: earlier starts that are still part of this run, and the one at `step`."""
        earlier = [part for part in self.before.get("segments") or [] if part["step"] < step]
        now = {"step": step, **self.record["device"], "micro_batch": self.record["micro_batch"]}
        return [*earlier, now]

    def new_state(self) -> State:
        """The state before the first step, none of whose arrays is anybody else's: a program gives their memory away."""
        state, best = initial_state(self.setup)
        return self.layout.replicate(
            state._replace(params=best.params, batch_stats=best.batch_stats)
        )

    def restore(self) -> tuple[State, Best]:
        """The state to start from: the newest checkpoint's, or a new one.

        Raises:
            RunFolderError: the checkpoint was trained on other data or with another vocabulary.
        """
        setup = self.setup
        state, best = self.new_state(), Best(setup.params, setup.batch_stats)
        if (saved := self.checkpoints.restore((state, best[:2]))) is None:
            self.record |= {"selection": None, "first_loss": None, "at_chance": None}
            return state, best
        if (self.before.get("data") or self.record["data"])["splits"] != self.record["data"][
            "splits"
        ]:
            raise RunFolderError(
                f"{self.folder.path} was trained on other data; choose another output.root"
            )
        (state, weights), progress = saved.state, saved.progress
        check_metadata(self.folder.path, progress, setup.task.vocab)
        self.record["resumed_from"].append(saved.step)
        self.record["damaged_checkpoints"] += saved.damaged
        self.record["selection"] = progress["selection"]
        self.record["first_loss"] = progress.get("first_loss")  # none in what older versions wrote
        return state, Best(weights[0], weights[1], **progress["best"])

    def save(self, step: int, state: State, best: Best) -> None:
        progress = {
            "best": {"step": best.step, "accuracy": best.accuracy},
            "selection": self.record["selection"],
        }
        progress |= {"first_loss": self.record["first_loss"]}
        progress |= checkpoint_metadata(self.record["config"], self.setup.task.vocab)
        start = time.monotonic()
        self.checkpoints.save(step, (state, best[:2]), progress)
        self.deadline.saved(time.monotonic() - start)
        self.save_record(step=step)

    def loop(
        self, state: State, best: Best, data: dict[str, Examples], signals: Signals
    ) -> tuple[State, Best]:
        """Train to the last step: run to the next boundary, then log, evaluate and save where they are due."""
        cfg = self.cfg.trainer
        every = intervals(cfg)
        per_call, rate = 1, Rate(cfg.call_seconds)
        step = int(state.step)
        while step < cfg.steps and not self.stopped_early(step, best):
            due_at = [next_multiple(step, n) for n in every.values()]
            asked = time.perf_counter()
            until = min(
                step + per_call, *due_at, cfg.steps, self.feed.end(step), self.profile.end(step)
            )
            waited = time.perf_counter() - asked  # for data that come from the host
            with self.profile.tracing(step, until):
                start = time.perf_counter()
                state = jax.block_until_ready(
                    self.feed.run(self.program, state, self.setup.constants, until)
                )
                seconds, done = waited + time.perf_counter() - start, until - step
            # the clocks of several processes differ, what they run may not
            per_call, step = (
                distributed.agree(partial(rate.steps_per_call, done, seconds)),
                int(state.step),
            )
            if not bool(state.finite):
                message = (
                    f"the loss became NaN or infinite at step {step} of {cfg.steps}; lower optim.lr, "
                    f"now {self.cfg.optim.lr}, lengthen optim.warmup or set optim.clip; the checkpoint before it is kept"
                )
                raise distributed.common(DivergedError(message))
            first_call = step == done == 1
            if first_call:
                self.check_first_loss(float(state.metric_sums[0] / state.metric_sums[2]))
            self.reporter.advance(step, done, seconds, state.metric_sums)
            due = {name for name, n in every.items() if step % n == 0 or step == cfg.steps}
            if "log" in due:
                state = self.log(step, state)
            if "eval" in due:
                state, best = self.evaluate(step, state, best, data["val"])
            told = signals.received or (
                self.deadline.reached() and f"trainer.time_limit={cfg.time_limit}"
            )
            stop = next(
                (word for word in distributed.gather(told) if word), None
            )  # whichever process is told first
            over = step == cfg.steps or self.stopped_early(step, best)
            if "checkpoint" in due or stop or over:
                if rate.steps:
                    self.record["time"] |= rate.summary(cfg.batch_size)
                self.save(step, state, best)
            if stop and not over:
                message = (
                    f"stopped by {stop} at step {step} of {cfg.steps}, saved in {self.folder.path}; "
                    f"the same command with resume=auto continues"
                )
                raise distributed.common(PreemptedError(message))
        return state, best

    def log(self, step: int, state: State) -> State:
        """Write the averages since the last line and start new ones."""
        loss, correct, count = (float(x) for x in state.metric_sums)
        values = {
            "train/loss": loss / count,
            "train/accuracy": correct / count,
            "train/lr": self.learning_rate(step, state),
        }
        self.write(step, values)
        return state._replace(metric_sums=jnp.zeros_like(state.metric_sums))

    def evaluate(self, step: int, state: State, best: Best, val: Examples) -> tuple[State, Best]:
        """Score validation; keep the weights if they are the best so far."""
        params, stats = eval_weights(state)
        logits = self.predict(params, stats, val)
        # of process 0 on all, which act on it
        result = distributed.agree(partial(score, logits, np.asarray(val.labels)))
        self.write(step, {"val/loss": result["loss"], "val/accuracy": result["accuracy"]})
        improved = result["accuracy"] > best.accuracy
        if improved:
            best = Best(copy_tree(params), copy_tree(stats), step, result["accuracy"])
        self.reporter.evaluation(step, result, improved)
        rule = self.cfg.protocol.select
        chosen = (best.step, best.accuracy) if rule == "best" else (step, result["accuracy"])
        self.record["selection"] = {
            "rule": rule,
            "step": chosen[0],
            "val_accuracy": chosen[1],
            "last_step": step,
            "last_val_accuracy": result["accuracy"],
        }
        self.check_chance(step, val)
        if self.cfg.optim.schedule == "plateau":
            state = state._replace(
                opt=plateau_update(self.cfg.optim, state.opt, result, self.layout.replicate)
            )
        return state, best

    def check_first_loss(self, loss: float) -> None:
        """Record the mean loss of the first batch, and warn where it is not that of a model that knows nothing."""
        self.record["first_loss"] = loss
        problem = sanity.first_loss_problem(
            loss, self.setup.task.num_classes, self.cfg.trainer.first_loss_tolerance
        )
        if problem:
            self.warn(problem)

    def check_chance(self, step: int, val: Examples) -> None:
        """Record whether validation is at chance once it should not be, and warn the first time."""
        cfg, accuracy = self.cfg.trainer, self.record["selection"]["last_val_accuracy"]
        if cfg.chance_after is None or step < cfg.chance_after * cfg.steps:
            return
        labels = np.asarray(val.labels)
        level = sanity.chance(labels, self.setup.task.num_classes)
        before, now = self.record["at_chance"], sanity.is_at_chance(accuracy, level, labels.size)
        self.record["at_chance"] = now
        if now and before is None:
            self.warn(sanity.chance_warning(accuracy, level, step, cfg.steps))

    def stopped_early(self, step: int, best: Best) -> dict[str, Any] | None:
        """Whether `trainer.early_stopping` ends the run at `step`, and why; the same in every process."""
        cfg = self.cfg.trainer
        if step >= cfg.steps:
            return None
        return sanity.stopped_early(step, best.step, intervals(cfg)["eval"], cfg.early_stopping)

    def warn(self, message: str) -> None:
        if distributed.is_first():
            log.warning(message)

    def finish(self, state: State, best: Best, data: dict[str, Examples]) -> dict[str, Any]:
        """Score the whole test split once with the weights that the protocol chooses; write predictions and record."""
        weights = selected_weights(self.cfg.protocol.select, state, best)
        self.record["stopped_early"] = self.stopped_early(int(state.step), best)
        self.reporter.scoring(len(data["test"].labels), self.record["stopped_early"])
        sample = Examples(*(x[: self.cfg.trainer.train_eval_examples] for x in data["train"]))
        logits = {
            name: self.predict(*weights, split) for name, split in {**data, "train": sample}.items()
        }
        labels = {
            name: np.asarray(split.labels)[: len(logits[name])] for name, split in data.items()
        }
        self.folder.write_predictions(
            logits["test"], labels["test"], np.arange(len(labels["test"]))
        )
        self.record["metrics"] = {name: score(logits[name], labels[name]) for name in SPLITS}
        self.record["step"] = int(state.step)
        self.check_chance(
            int(state.step), data["val"]
        )  # again, for a run that was killed after its last evaluation
        level = sanity.chance(labels["test"], self.setup.task.num_classes)
        accuracy = self.record["metrics"]["test"]["accuracy"]
        self.record["learned"] = not sanity.is_at_chance(accuracy, level, labels["test"].size)
        self.end("finished", None)
        self.reporter.finished(self.record, self.trackers.sync_hint)
        return self.record

    def predict(self, params, stats, split: Examples) -> np.ndarray:
        apply = partial(self.program.apply, params, stats, self.setup.constants)
        return predict(apply, split.inputs, split.lengths, self.eval_batch)

    def learning_rate(self, step: int, state: State) -> float:
        return float(schedule(self.cfg.optim, self.cfg.trainer.steps)(step - 1)) * plateau_scale(
            state.opt
        )

    def rates(self) -> list[tuple]:
        """Name, learning rate, decay, tensors and parameters of each group, as printed at the start."""
        lr, groups = self.cfg.optim.lr, self.setup.groups
        return [
            (g.name, lr * g.lr_factor, g.weight_decay, len(g.paths), g.num_params) for g in groups
        ]

    def write(self, step: int, values: dict[str, float]) -> None:
        self.folder.append_metrics({"step": step, **values})
        self.trackers.log(step, values)

    def save_record(self, **changes) -> None:
        self.record |= changes
        earlier = (self.before.get("time") or {}).get("wall_s", 0.0)
        self.record["time"]["wall_s"] = round(earlier + time.monotonic() - self.started, 2)
        self.folder.write_record(self.record)

    def end(self, status: str, error: BaseException | None) -> None:
        """Write the last word of this run: its status, and the error that ended it."""
        if not distributed.is_alone(error):  # orbax may wait for the other processes
            self.checkpoints.close()  # its threads
        self.record["memory"] = {"peak_bytes": peak_bytes()}
        self.save_record(
            status=status, error=None if error is None else f"{type(error).__name__}: {error}"
        )
        self.trackers.summary({"status": status, **flat_metrics(self.record)})
        self.trackers.finish(status)

    def end_elsewhere(self, error: BaseException) -> None:
        """Write down, from another thread, that an error of another process ends this run."""
        if self.record["status"] == "running":
            self.save_record(status=status_of(error), error=f"{type(error).__name__}: {error}")


def intervals(cfg: DictConfig) -> dict[str, int]:
    """Steps between two logged lines, evaluations and checkpoints."""
    evaluate = cfg.eval_every or max(cfg.steps // 20, 1)
    return {
        "log": cfg.log_every or max(cfg.steps // 100, 1),
        "eval": evaluate,
        "checkpoint": cfg.checkpoint_every or evaluate,
    }


def next_multiple(step: int, n: int) -> int:
    return (step // n + 1) * n


class Rate:
    """How fast steps run: how many make a call of the wanted length, and the mean over the run without compilation."""

    def __init__(self, call_seconds: float):
        self.call_seconds, self.seconds, self.steps, self.first = call_seconds, 0.0, 0, True

    def steps_per_call(self, done: int, seconds: float) -> int:
        """Steps of the next call, after one of `done` steps in `seconds`; the first call compiles and is not counted."""
        if self.first:
            self.first = False
            return 1
        self.seconds, self.steps = self.seconds + seconds, self.steps + done
        return max(1, round(self.call_seconds * done / seconds))

    def summary(self, batch_size: int) -> dict[str, float]:
        rate = self.steps / self.seconds
        return {
            "train_s": round(self.seconds, 2),
            "steps_per_s": round(rate, 3),
            "examples_per_s": round(rate * batch_size, 1),
        }


def first_record(cfg: DictConfig, before: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """The record at the start: what is known before the data is read."""
    device = jax.devices()[0]
    sizes = {group.name: group.num_params for group in groups}
    return {
        "status": "running",
        "error": None,
        **{key: cfg.names[key] for key in ("task", "model", "protocol", "experiment")},
        "seed": cfg.seed,
        "config": run_config(cfg),
        "command": cfg.names.command,
        # what a start that ends before it is known again must not erase: the next one goes by it
        **{
            key: before.get(key)
            for key in ("data", "reference", "selection", "micro_batch", "eval_batch")
        },
        "step": before.get("step", 0),
        "metrics": None,
        "params": {"total": sum(sizes.values()), "groups": sizes},
        "segments": list(before.get("segments") or []),
        "resumed_from": list(before.get("resumed_from") or []),
        "damaged_checkpoints": list(before.get("damaged_checkpoints") or []),
        "tuning_runs": cfg.tuning_runs,
        "commit": machine.git_commit(),
        "versions": machine.versions(),
        "device": {"platform": device.platform, "kind": device.device_kind},
        "first_loss": before.get("first_loss"),
        "at_chance": before.get("at_chance"),
        "stopped_early": None,
        "learned": None,
        "time": dict(before.get("time") or {}),
        "memory": None,
    }


def run_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as it is recorded; `names` say how it was composed and are recorded beside it."""
    config = to_container(cfg)
    del config["names"]
    return config


def to_container(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg))


def place(store: Store, layout: DataParallel, placement: str) -> dict[str, Examples]:
    """All splits on the devices or, as `data.placement` says or where they do not fit, on the host; each is there once.

    Raises:
        LraError: they do not fit, and have to.
    """
    unique = {id(split): split for split in store.splits.values()}
    size = sum(split.inputs.nbytes for split in unique.values())
    stay = placement == "host" or (
        placement == "auto" and not all(distributed.gather(fits_on_device(size, layout)))
    )
    put = on_host if stay or layout.mesh else on_device
    try:
        placed = {key: put(split) for key, split in unique.items()}
        placed = placed if stay else layout.replicate(placed)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise LraError(
            f"the data, {size / 1e9:.1f} GB, do not fit on {jax.devices()[0].device_kind}; set data.placement=host"
        ) from error
    return {name: placed[id(split)] for name, split in store.splits.items()}


def describe_data(store: Store) -> dict[str, Any]:
    parts = store.manifest["splits"].items()
    splits = {name: {"count": part["count"], "sha256": part["sha256"]} for name, part in parts}
    # by content, so that the same files copied elsewhere are the same data
    key = hashlib.sha256("".join(splits[name]["sha256"] for name in SPLITS).encode()).hexdigest()
    return {
        "source": store.manifest["source"],
        "key": key,
        "partial": store.manifest["partial"],
        "splits": splits,
    }


def flat_metrics(record: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{split}/{key}": value
        for split, part in (record["metrics"] or {}).items()
        for key, value in part.items()
    }
