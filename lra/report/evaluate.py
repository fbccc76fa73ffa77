"""Does a run's folder, in a new process, give the scores it recorded?

On the same kind of device, with the same versions, bit for bit; elsewhere up to examples whose two largest logits are all but
equal.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from omegaconf import DictConfig, OmegaConf

from lra.config.build import data_arguments
from lra.config.compose import resolve, upgrade_config
from lra.config.schema import keys_in_eval
from lra.data import store as packed
from lra.errors import ConfigError, DataError, LraError, MismatchError, RunFolderError
from lra.runs import machine, records
from lra.runs.progress import preparing
from lra.tasks.base import Task
from lra.training.checkpoint import Checkpoints, check_metadata
from lra.training.determinism import use_deterministic_ops
from lra.training.evaluation import predict, score
from lra.training.memory import is_out_of_memory
from lra.training.prefetch import on_host
from lra.training.recorder import CHECKPOINTS, describe_data
from lra.training.setup import Setup, use_compilation_cache
from lra.training.state import Best, initial_state, selected_weights
from lra.training.step import make_step_functions

CLOSE = 1e-3  # between the two largest logits of an example; nearer ones may change places on another device


class Comparison(NamedTuple):
    """Logits against those that were stored.

    Attributes:
        identical: bit for bit.
        changed: predictions of another class.
        close: those of them whose two largest stored logits were closer than `CLOSE`.
        total: predictions.
        largest: difference between two logits.
    """

    identical: bool
    changed: int
    close: int
    total: int
    largest: float


def evaluate_run(
    folder: Path, *, split: str = "test", weights: str | None = None, overrides: Sequence[str] = ()
) -> str:
    """Score a split with the weights saved in a run's folder; what was found, as lines to print. Writes nothing there.

    Args:
        weights: best | last; None for those that the protocol scores.
        overrides: KEY=VALUE of `keys_in_eval`.

    Raises:
        MismatchError: a prediction differs from the stored one although its two largest logits were not close.
        RunFolderError: no record, or no checkpoint that can be read.
        DataError: the split holds other examples than the run's did.
        LraError: a batch does not fit into the device's memory.
    """
    record, cfg = recorded_run(folder, overrides)
    rule = weights or cfg.protocol.select
    setup = Setup(cfg)
    state, best, step = saved_weights(folder, setup)
    chosen = selected_weights(rule, state, best)

    data, limit = recorded_split(record, cfg, setup.task, split), scored_examples(cfg, split)
    program = make_step_functions(setup, cfg.trainer.batch_size)
    inputs, lengths, labels = (x[:limit] for x in on_host(data))
    batch = cfg.trainer.eval_batch_size
    try:
        logits = predict(partial(program.predict, *chosen, setup.constants), inputs, lengths, batch)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise LraError(
            f"out of memory at trainer.eval_batch_size={batch}; take a smaller one"
        ) from error

    result = score(logits, labels)
    at = best.step if rule == "best" else int(state.step)
    lines = [
        f"{title(record)}: weights of step {at:,} ({rule}), from the checkpoint of step {step:,}",
        f"{split} accuracy {100 * result['accuracy']:.2f} %, loss {result['loss']:.4f}, {result['count']:,} examples",
    ]
    if rule != cfg.protocol.select or record["status"] != "finished":
        return "\n".join(
            [*lines, "nothing to compare with: the run recorded no score of these weights"]
        )
    stored = records.read_predictions(folder) if split == "test" else None
    if stored is None:
        return "\n".join([*lines, compare_scores(result, record["metrics"][split])])
    found = compare(logits, stored["logits"])
    lines += [describe(found), *(elsewhere(record) if not found.identical else [])]
    if found.changed > found.close:
        raise MismatchError("; ".join(lines))
    return "\n".join(lines)


def recorded_run(folder: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], DictConfig]:
    """The record in a run's folder and its config, with the overrides; JAX is set up as that config wants it.

    Raises:
        RunFolderError: there is no record.
        ConfigError: as `recorded_config`.
    """
    record = records.read_record(folder)
    if record is None:
        raise RunFolderError(
            f"{folder} holds no run; name the folder of one, such as runs/TASK/MODEL/strict-s0-1a2b3c4d"
        )
    cfg = recorded_config(record, overrides)
    if record.get("eval_batch") and not any(
        word.startswith("trainer.eval_batch_size=") for word in overrides
    ):
        cfg.trainer.eval_batch_size = record[
            "eval_batch"
        ]  # what fitted, and what gave these very bits
    if cfg.trainer.deterministic:
        use_deterministic_ops(True)
    if cfg.trainer.compilation_cache:
        use_compilation_cache()
    return record, cfg


def recorded_split(
    record: Mapping[str, Any], cfg: DictConfig, task: Task, split: str
) -> packed.Split:
    """A whole split of the data that a run was made with, prepared where it is not yet.

    Raises:
        DataError: it holds other examples than the run's did.
    """
    store = preparing(task, partial(packed.prepare, task, **data_arguments(cfg)))
    if describe_data(store)["splits"][split] != (record["data"] or {"splits": {}})["splits"].get(
        split
    ):
        raise DataError(
            f"{split} under data.root={cfg.data.root} holds other examples than the run's; set data.root to the run's data"
        )
    return store.splits[split]


def title(record: Mapping[str, Any]) -> str:
    """Which run it is, in some words."""
    return f"{record['model']} on {record['task']}, protocol {record['protocol']}, seed {record['seed']}"


def saved_weights(folder: Path, setup: Setup) -> tuple[Any, Best, int]:
    """The state and the best weights in the newest checkpoint of a run, and that checkpoint's step."""
    if not (folder / CHECKPOINTS).is_dir():
        raise RunFolderError(
            f"{folder} holds no checkpoint: its weights were not kept, or it ended before the first"
        )
    state, best = initial_state(setup)
    checkpoints = Checkpoints(folder / CHECKPOINTS, read_only=True)
    try:
        saved = checkpoints.restore((state, best[:2]))
    finally:
        checkpoints.close()
    if saved is None:
        raise RunFolderError(f"{folder} holds no checkpoint: it ended before the first")
    check_metadata(folder, saved.progress, setup.task.vocab)
    state, weights = saved.state
    return state, Best(*weights, **saved.progress["best"]), saved.step


def recorded_config(record: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """The config of a run with the overrides, and with today's defaults for keys that it did not know.

    Raises:
        ConfigError: an override of a key that is not in `keys_in_eval`.
    """
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or key not in keys_in_eval():
            raise ConfigError(
                f"{word}: a saved run keeps its own config; KEY=VALUE may set {', '.join(keys_in_eval())}"
            )
    config = OmegaConf.create(upgrade_config(record["config"]))
    cfg = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(cfg, DictConfig)
    return resolve(
        cfg, {key: record.get(key) for key in ("task", "model", "experiment")}, overrides
    )


def scored_examples(cfg: DictConfig, split: str) -> int | None:
    """How many examples of a split a run scores at its end; None for all."""
    return cfg.trainer.train_eval_examples if split == "train" else cfg.trainer.eval_examples


def compare(logits: np.ndarray, stored: np.ndarray) -> Comparison:
    """Logits (n, C) or (n, T, C) float32 against the stored ones.

    Raises:
        MismatchError: their shapes differ.
    """
    if logits.shape != stored.shape:
        raise MismatchError(
            f"the stored logits have shape {stored.shape}, those of the saved weights {logits.shape}"
        )
    second, first = np.moveaxis(np.sort(stored, axis=-1)[..., -2:], -1, 0)
    changed = logits.argmax(axis=-1) != stored.argmax(axis=-1)
    close = changed & (first - second < CLOSE)
    largest = float(np.abs(logits - stored).max(initial=0.0))
    return Comparison(
        logits.tobytes() == stored.tobytes(),
        int(changed.sum()),
        int(close.sum()),
        changed.size,
        largest,
    )


def describe(found: Comparison) -> str:
    if found.identical:
        return "predictions.npz: identical, bit for bit"
    return (
        f"predictions.npz: logits differ by up to {found.largest:.1e}; {found.changed:,} of {found.total:,} classes differ, "
        f"{found.close:,} of them where the two largest logits were closer than {CLOSE:g}"
    )


def compare_scores(result: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    if all(result[key] == recorded[key] for key in result):
        return "record.json: identical"
    return f"record.json: accuracy {100 * recorded['accuracy']:.2f} %, loss {recorded['loss']:.4f}"


def elsewhere(record: Mapping[str, Any]) -> list[str]:
    """What is not here as it was where the run was made."""
    kind, count, processes = (
        record["device"].get(key, 1) for key in ("kind", "count", "processes")
    )
    then = {"device": kind, "devices": count, "processes": processes, **record["versions"]}
    now = {
        "device": jax.devices()[0].device_kind,
        "devices": 1,
        "processes": 1,
        **machine.versions(),
    }
    differing = [
        f"{key} {then[key]}, here {now.get(key)}" for key in then if then[key] != now.get(key)
    ]
    return [f"the run was made elsewhere: {'; '.join(differing)}"] if differing else []
