"""What does a trained run rely on? Accuracy by what examples differ in, at other lengths, without order, without distance.

Each diagnostic prints its tables as soon as it is done and adds them to diagnostics.json in the run's folder:

    {"schema": 1, DIAGNOSTIC: {SPLIT: {"weights", "step", "examples", "source", "commit", "versions", "tables"
    [, "keys"]}}}

`tables` holds {NAME: [{"value", "accuracy", "low", "high", "examples"}, ...]}, accuracies and their 95 % Wilson intervals as
fractions. A diagnostic made again on a split replaces what it found there before.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from omegaconf import DictConfig, OmegaConf

from lra.config.build import build_task, data_arguments, model_builder
from lra.config.messages import nearest, translated_errors
from lra.config.schema import check_config
from lra.data.store import Split, prepare
from lra.errors import ConfigError, LraError, RunFolderError
from lra.files import disk_errors, write_atomically
from lra.report.evaluate import recorded_run, recorded_split, saved_weights, scored_examples, title
from lra.report.perturbations import (
    AccuracyRow,
    by_factors,
    cut_windows,
    mean_by_owner,
    row,
    scales,
    shuffle_blocks,
)
from lra.runs import machine, records
from lra.runs.progress import preparing
from lra.training.evaluation import predict
from lra.training.memory import is_out_of_memory
from lra.training.setup import Setup, build
from lra.training.state import selected_weights
from lra.training.step import compile_program

SCHEMA = 1
FILE, LOCK = "diagnostics.json", ".diagnostics.lock"
WINDOW = 16  # the smallest of the locality probe
SAME = (
    "vocab",
    "num_tokens",
    "num_classes",
    "num_features",
    "dual",
)  # of the task of another length

Tables = dict[str, list[AccuracyRow]]


def diagnose(
    folder: Path,
    words: Sequence[str] = (),
    *,
    split: str = "test",
    examples: int | None = None,
    weights: str | None = None,
    sizes: Sequence[int] | None = None,
) -> Iterator[tuple[str, Tables, str]]:
    """Make diagnostics of a run, one after the other; of each its name, its tables, and what there is to print.

    Args:
        words: names of diagnostics (factors where there is none), task.KEY=VALUE[,VALUE...] for `length`, and what
            `lra eval` may override.
        examples: the first so many of the split; None for those that the run scored.
        weights: best | last; None for those that the protocol scores.
        sizes: of the blocks of `permutation` and the windows of `locality`; None for a scale up to the task's length.
    Raises:
        ConfigError: an unknown word, a number out of its range, or a diagnostic that this task or model does not admit.
        RunFolderError: no run, or no checkpoint where weights are needed.
        DataError: the split holds other examples than the run's did.
    """
    names = list(dict.fromkeys(word for word in words if "=" not in word)) or ["factors"]
    if unknown := next((name for name in names if name not in DIAGNOSTICS), None):
        known = list(DIAGNOSTICS)
        raise ConfigError(
            f"unknown diagnostic {unknown}{nearest(unknown, known)}; choose of {', '.join(known)}"
        )
    keys = [word for word in words if word.startswith("task.")]
    if keys and "length" not in names:
        raise ConfigError(
            f"{keys[0]} is another task, which length alone looks at; write: length {' '.join(keys)}"
        )
    if examples is not None and examples < 1:
        raise ConfigError(f"--examples {examples}: expected 1 or more")
    record, cfg = recorded_run(folder, [word for word in words if "=" in word and word not in keys])
    run = Diagnosed(folder, record, cfg, split, weights, examples, sizes)
    planned = [
        (name, DIAGNOSTICS[name](run, keys)) for name in names
    ]  # whatever is refused is refused before any work
    for name, work in planned:
        with exhausted(cfg):
            tables = work()
        found = {
            "tables": {
                heading: [line._asdict() for line in lines] for heading, lines in tables.items()
            }
        }
        save(
            folder,
            name,
            split,
            run.provenance() | ({"keys": keys} if name == "length" else {}) | found,
        )
        about = f"{name}: {(DIAGNOSTICS[name].__doc__ or '').rstrip('.')}\n{run.header()}"
        yield name, tables, "\n".join([about, *(markdown(*table) for table in tables.items())])


class Diagnosed:
    """A run's folder and what is asked about it; data and weights are read when they are first needed."""

    def __init__(
        self,
        folder: Path,
        record: dict[str, Any],
        cfg: DictConfig,
        split: str,
        weights: str | None,
        examples: int | None,
        sizes: Sequence[int] | None,
    ):
        self.folder, self.record, self.cfg, self.split, self.sizes = (
            folder,
            record,
            cfg,
            split,
            sizes,
        )
        self.rule = weights or cfg.protocol.select
        self.limit = examples or scored_examples(cfg, split)
        self.task = build_task(cfg)
        self.applied = cache(
            lambda setup: compile_program(setup, 1).apply
        )  # of one setup compiled once; 1: nothing is trained
        self.source = ""  # of the logits that were used last: the weights, or the predictions that the run has stored

    @cached_property
    def data(self) -> Split:
        """The examples that are looked at, in memory or mapped into it."""
        return first(recorded_split(self.record, self.cfg, self.task, self.split), self.limit)

    @cached_property
    def setup(self) -> Setup:
        return Setup(self.cfg)

    @cached_property
    def saved(self) -> tuple[tuple[Any, Any], int]:
        """(params, stats) of the weights that are asked for, and the step that they are from."""
        state, best, _ = saved_weights(self.folder, self.setup)
        return selected_weights(self.rule, state, best), best.step if self.rule == "best" else int(
            state.step
        )

    @property
    def weights(self) -> tuple[Any, Any]:
        return self.saved[0]

    def logits(
        self, inputs: np.ndarray, lengths: np.ndarray, setup: Setup | None = None
    ) -> np.ndarray:
        """Of examples, by the weights in the run's own model or in that of `setup`; as many positions at once as in the run."""
        self.source, setup = "weights", setup or self.setup
        positions, batch = inputs.shape[lengths.ndim], self.cfg.trainer.eval_batch_size
        batch = max(1, min(batch * self.task.seq_len // positions, max(batch, len(lengths))))
        return predict(
            partial(self.applied(setup), *self.weights, setup.constants), inputs, lengths, batch
        )

    def predictions(self) -> np.ndarray:
        """Logits of the examples: those that the run has stored where these are asked for, else computed."""
        count = len(self.data)
        if (
            self.split == "test"
            and self.rule == self.cfg.protocol.select
            and self.record["status"] == "finished"
        ):
            stored = records.read_predictions(self.folder)
            if stored is not None and np.array_equal(stored["rows"][:count], np.arange(count)):
                self.source = records.PREDICTIONS
                return stored["logits"][:count]
        return self.logits(self.data.inputs, self.data.lengths)

    def scales(self, smallest: int) -> list[int]:
        """Sizes of blocks or windows: those asked for, else a scale from `smallest` to the task's length."""
        longest = self.task.seq_len
        for size in self.sizes or ():
            if not 1 <= size <= longest:
                raise ConfigError(
                    f"--sizes {size}: expected numbers in [1, {longest}], the length of {self.task.name}"
                )
        return sorted(set(self.sizes)) if self.sizes else scales(min(smallest, longest), longest)

    @property
    def step(self) -> int:
        """Of the weights that gave the logits used last."""
        return (
            self.record["selection"]["step"]
            if self.source == records.PREDICTIONS
            else self.saved[1]
        )

    def provenance(self) -> dict[str, Any]:
        made = {"commit": machine.git_commit(), "versions": machine.versions()}
        return {
            "weights": self.rule,
            "step": self.step,
            "examples": len(self.data),
            "source": self.source,
            **made,
        }

    def header(self) -> str:
        return (
            f"{title(self.record)}: weights of step {self.step:,} ({self.rule}), {self.split} split"
        )


# ---- the diagnostics: each checks whether it can be made, and returns what makes it


def factors(run: Diagnosed, keys: Sequence[str]) -> Callable[[], Tables]:
    """accuracy by what the task says its examples differ in."""

    def work() -> Tables:
        logits = run.predictions()
        each = (logits.argmax(axis=-1) == run.data.labels).reshape(len(logits), -1)
        tables = by_factors(run.task.factors(run.data), each.mean(axis=1))
        if each.shape[1] > 1:
            places = enumerate(each.T.astype(float), start=1)
            tables["place of the label"] = [row(place, right) for place, right in places]
        return {"all": [row("all", each.mean(axis=1))], **tables}

    return work


def permutation(run: Diagnosed, keys: Sequence[str]) -> Callable[[], Tables]:
    """accuracy when blocks of the real positions are in random order."""
    sizes = run.scales(1)

    def work() -> Tables:
        data = run.data
        rows = []
        for size in sizes:
            inputs = shuffle_blocks(np.asarray(data.inputs), np.asarray(data.lengths), size)
            rows.append(row(size, share(run.logits(inputs, data.lengths), data.labels)))
        return {"block size": rows}

    return work


def locality(run: Diagnosed, keys: Sequence[str]) -> Callable[[], Tables]:
    """accuracy of the mean logits of windows, each read as a sequence of its own."""
    task, sizes = run.task, run.scales(WINDOW)
    if task.dual:
        raise ConfigError(
            f"locality: an example of {task.name} is a pair, whose two sequences have no windows in common; take permutation"
        )
    if task.num_targets > 1:
        raise ConfigError(
            f"locality: {task.name} asks for {task.num_targets} labels at its last positions, which one window alone has; "
            "take permutation"
        )

    def work() -> Tables:
        data, rows = run.data, []
        for size in sizes:
            setup, padded = shortest(run, size)
            windows = cut_windows(np.asarray(data.inputs), np.asarray(data.lengths), size, padded)
            logits = run.logits(windows.inputs, windows.lengths, setup)
            rows.append(
                row(size, share(mean_by_owner(logits, windows.owners, len(data)), data.labels))
            )
        return {"window size": rows}

    return work


def length(run: Diagnosed, keys: Sequence[str]) -> Callable[[], Tables]:
    """accuracy of the weights at the length that they were trained at and at others."""
    others = [(words, longer(run, words)) for words in settings(keys)]
    for words, setup in others:
        check_weights(run, words, setup)

    def work() -> Tables:
        data = run.data
        rows = [
            row(
                described("as trained", data),
                share(run.logits(data.inputs, data.lengths), data.labels),
            )
        ]
        for words, setup in others:
            store = preparing(setup.task, partial(prepare, setup.task, **data_arguments(run.cfg)))
            data = first(store.splits[run.split], run.limit)
            logits = run.logits(data.inputs, data.lengths, setup)
            told = " ".join(word for word in words if word not in keys) or " ".join(
                words
            )  # the keys that vary
            rows.append(row(described(told, data), share(logits, data.labels)))
        return {"task": rows}

    return work


DIAGNOSTICS: Mapping[str, Callable[[Diagnosed, Sequence[str]], Callable[[], Tables]]] = {
    "factors": factors,
    "length": length,
    "permutation": permutation,
    "locality": locality,
}


# ---- other lengths


def settings(keys: Sequence[str]) -> list[list[str]]:
    """task.KEY=A,B words -> the words of each setting: the first values of all keys, the second ones, ...

    A key with one value has it in every setting.

    Raises:
        ConfigError: no key, or keys of which one has two values and another three.
    """
    if not keys:
        raise ConfigError(
            "length: say which task.KEY=VALUE makes the task longer, such as task.length=128,256"
        )
    parted = [word.partition("=") for word in keys]
    values = [value.split(",") if value[:1] not in "[{" else [value] for _, _, value in parted]
    count = max(map(len, values))
    for word, found in zip(keys, values, strict=True):
        if len(found) not in (1, count):
            raise ConfigError(
                f"{word} has {len(found)} values and another key {count}; give each as many, or one"
            )
    return [
        [
            f"{key}={found[i % len(found)]}"
            for (key, _, _), found in zip(parted, values, strict=True)
        ]
        for i in range(count)
    ]


def longer(run: Diagnosed, words: Sequence[str]) -> Setup:
    """The run's model for its task with other settings.

    Raises:
        ConfigError: the task does not know a key, or has other tokens or classes with it.
    """
    for word in words:
        key = word.partition("=")[0].removeprefix("task.")
        if key.partition(".")[0] not in run.cfg.task or key.startswith(("_", "name", "hparams")):
            known = [name for name in run.cfg.task if not name.startswith(("_", "name", "hparams"))]
            raise ConfigError(
                f"task={run.task.name} has no {key} to set{nearest(key, known)}; it has: {', '.join(known)}"
            )
    with translated_errors(words):
        cfg = OmegaConf.merge(run.cfg, OmegaConf.from_dotlist(list(words)))
        assert isinstance(cfg, DictConfig)
        check_config(cfg)
    task = build_task(cfg)
    for name in SAME:
        if getattr(task, name) != (trained := getattr(run.task, name)):
            found = getattr(task, name)
            shown = (
                (len(found), len(trained))
                if name == "vocab" and found and trained
                else (found, trained)
            )
            raise ConfigError(
                f"{' '.join(words)}: {name.replace('_', ' ')} is {shown[0]} there and {shown[1]} in the run; "
                "only lengths may change"
            )
    cfg.trainer.batch_size = (
        1  # nothing is trained, so there may be fewer training examples than a batch
    )
    return Setup(cfg)


def check_weights(run: Diagnosed, words: Sequence[str], setup: Setup) -> None:
    """Raises: ConfigError, where the weights do not fit the model of another length; it names the first that does not."""
    trained, other = shapes(run.setup), shapes(setup)
    if trained != other:
        name = next(name for name in [*trained, *other] if trained.get(name) != other.get(name))
        raise ConfigError(
            f"{' '.join(words)}: this model's parameters depend on the length: {name} is "
            f"{trained.get(name, 'absent')} at {run.task.seq_len} positions and {other.get(name, 'absent')} at "
            f"{setup.task.seq_len}; it can only be asked at the length that it was trained at"
        )


def shapes(setup: Setup) -> dict[str, tuple[int, ...]]:
    """Of all trained arrays, by name."""
    leaves = jax.tree_util.tree_leaves_with_path((setup.params, setup.batch_stats))
    return {
        jax.tree_util.keystr(path[1:-1], simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
    }


def shortest(run: Diagnosed, size: int) -> tuple[Setup, int]:
    """The run's model for the shortest inputs of `size` or more positions that it can be made for, and that length.

    Where its parameters depend on the length that is the run's own. What is fixed, such as filters, stays that of the run:
    the window is short, the model is what was trained.
    """
    while size < run.task.seq_len:
        task = copy.copy(run.task)
        task.seq_len = size
        made = copy.copy(run.setup)
        try:
            made.graph, made.params, made.batch_stats, _ = build(
                model_builder(run.cfg, task), jax.random.key(0)
            )
        except ConfigError:  # too short for it
            size *= 2
            continue
        if shapes(made) != shapes(run.setup):
            break
        return made, size
    return run.setup, run.task.seq_len


# ---- parts


def first(split: Split, limit: int | None) -> Split:
    """The first examples of a split, still mapped."""
    return Split(
        split.inputs[:limit].view(np.ndarray),
        np.asarray(split.lengths)[:limit],
        split.labels[:limit],
    )


def share(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share of right labels of each example, (n,) float64."""
    return (logits.argmax(axis=-1) == labels).reshape(len(labels), -1).mean(axis=1)


def described(words: str, split: Split) -> str:
    """A setting with the real positions that its examples have."""
    low, high = int(split.lengths.min()), int(split.lengths.max())
    return f"{words} ({low if low == high else f'{low} to {high}'} positions)"


@contextmanager
def exhausted(cfg: DictConfig) -> Iterator[None]:
    """Out of memory inside the block ends in advice."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = cfg.trainer.eval_batch_size
        raise LraError(f"out of memory; lower trainer.eval_batch_size, now {found}") from error


def markdown(name: str, rows: Sequence[AccuracyRow]) -> str:
    """A small table."""
    lines = [
        "",
        f"| {'' if name == 'all' else name} | accuracy, % | 95 % interval | examples |",
        "|---|---:|---:|---:|",
    ]
    for value, accuracy, low, high, examples in rows:
        lines.append(
            f"| {value} | {100 * accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f} | {examples:,} |"
        )
    return "\n".join(lines)


def read_diagnostics(folder: Path) -> dict[str, Any]:
    """What was found about a run so far; empty where nothing was.

    Raises:
        RunFolderError: diagnostics.json is not what this version writes.
    """
    path = folder / FILE
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {"schema": SCHEMA}
    except ValueError as error:
        raise RunFolderError(
            f"{path} is not JSON ({error}); move it away and diagnose again"
        ) from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{path} is not of schema {SCHEMA}, which this version reads; move it away"
        )
    return found


def save(folder: Path, name: str, split: str, result: Mapping[str, Any]) -> None:
    """Add a result to diagnostics.json; processes that do so at once wait for each other."""
    with disk_errors(folder / FILE), filelock.FileLock(folder / LOCK):
        found = read_diagnostics(folder)
        found[name] = found.get(name, {}) | {split: records.to_json(result)}
        write_atomically(
            folder / FILE, json.dumps(found, indent=1, allow_nan=False).encode() + b"\n"
        )
