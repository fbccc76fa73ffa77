"""Diagnoses a saved run: accuracy by factor, at other lengths, and on perturbed inputs.

Each diagnostic is printed as soon as it is done and added to diagnostics.json in the run folder:

    {"schema": 1, DIAGNOSTIC: {SPLIT: {"weights", "step", "examples", "source", "commit",
    "versions", "tables" [, "keys"]}}}

`tables` holds {NAME: [{"value", "accuracy", "low", "high", "examples"}, ...]}: accuracies and the
ends of their 95 % Wilson intervals, as fractions. A diagnostic replaces its earlier result on the
same split.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
from typing_extensions import TypedDict

from lra.config.build import data_arguments
from lra.config.messages import nearest
from lra.data.store import Split, prepare
from lra.errors import ConfigError, RunFolderError
from lra.files import disk_errors, read_regular_file, write_atomically
from lra.report.intervals import AccuracyRow, accuracy_by_factors, accuracy_row
from lra.report.perturbations import cut_windows, geometric_sizes, mean_by_example, shuffle_blocks
from lra.report.resize import resized_setup, setup_for_windows, split_settings
from lra.report.saved_run import SavedRun
from lra.runs import machine, records
from lra.runs.progress import preparing

SCHEMA = 1
FILE, LOCK = "diagnostics.json", ".diagnostics.lock"
SMALLEST_WINDOW = 16

LARGEST = 2**26  # bytes of FILE

Sizes = Sequence[int] | None
Tables = dict[str, list[AccuracyRow]]


class Diagnostics(TypedDict):
    """diagnostics.json; the diagnostics are further keys."""

    schema: Literal[1]


def diagnose(
    folder: Path,
    words: Sequence[str] = (),
    *,
    split: str = "test",
    examples: int | None = None,
    weights: str | None = None,
    sizes: Sizes = None,
    allow_targets: Sequence[str] = (),
) -> Iterator[tuple[str, Tables, str]]:
    """Yields the name, tables and report of each diagnostic; checks all before the first one runs.

    Args:
        words: names of diagnostics (default: factors), task.KEY=VALUE[,VALUE...] for `length`, and
            the overrides of `lra eval`.
        examples: number of examples of the split, sampled; None for those that the run scored.
        weights: best or last; None for those that the protocol selects.
        sizes: blocks of `permutation` and windows of `locality`; None for a geometric scale.
        allow_targets: classes outside `lra` and `models` that the record may name.
    Raises:
        ConfigError: an unknown word, a number out of its range, or a diagnostic that does not
            apply to this task or model.
        RunFolderError: there is no record, or a needed checkpoint is missing.
        DataError: the split differs from the data of the run.
    """
    names = list(dict.fromkeys(word for word in words if "=" not in word)) or ["factors"]
    for name in names:
        if name not in DIAGNOSTICS:
            raise ConfigError(
                f"unknown diagnostic {name}{nearest(name, list(DIAGNOSTICS))}; "
                f"choose from {', '.join(DIAGNOSTICS)}"
            )
    keys = [word for word in words if word.startswith("task.")]
    if keys and "length" not in names:
        raise ConfigError(
            f"{keys[0]} changes the task, which only length does; write: length {' '.join(keys)}"
        )
    if examples is not None and examples < 1:
        raise ConfigError(f"--examples {examples}: expected 1 or more")
    overrides = [word for word in words if "=" in word and word not in keys]
    run = SavedRun(
        folder,
        overrides,
        split=split,
        weights=weights,
        examples=examples,
        allow_targets=allow_targets,
    )
    planned = [(name, *DIAGNOSTICS[name](run, keys, sizes)) for name in names]
    for name, title, compute in planned:
        tables, step, source = compute()
        made = {
            "weights": run.rule,
            "step": step,
            "examples": len(run.data),
            "source": source,
            "commit": machine.git_commit(),
            "versions": machine.versions(),
            **({"keys": keys} if name == "length" else {}),
            "tables": {key: [row._asdict() for row in rows] for key, rows in tables.items()},
        }
        save_result(folder, name, split, made)
        header = f"{run.title}: weights of step {step:,} ({run.rule}), {split} split"
        bodies = (markdown_table(heading, rows) for heading, rows in tables.items())
        yield name, tables, "\n".join([f"{name}: {title}", header, *bodies])


# --- Diagnostics ---------------------------------------------------------------------------------

# What a diagnostic returns after it checked that it applies to a run: its title, and a function
# that computes its tables, the step of the weights and their source, "weights" or predictions.npz.
# `keys` are the task.KEY=VALUE[,VALUE...] words.
Plan = tuple[str, Callable[[], tuple[Tables, int, str]]]


def factors(run: SavedRun, keys: Sequence[str], sizes: Sizes) -> Plan:
    """Accuracy by label, length and the factors of the task. Reads predictions.npz if it can."""

    def compute() -> tuple[Tables, int, str]:
        data, count = run.data, len(run.data)
        stored = run.stored_predictions()
        if stored is not None and np.isin(run.rows, stored["rows"]).all():
            logits = stored["logits"][np.searchsorted(stored["rows"], run.rows)]
            step, source = run.recorded_step, records.PREDICTIONS
        else:
            logits = run.logits(data.inputs, data.lengths)
            step, source = run.weights_step, "weights"
        correct = (logits.argmax(axis=-1) == data.labels).reshape(count, -1)
        mean = correct.mean(axis=1)
        tables = {"all": [accuracy_row("all", mean)]}
        tables |= accuracy_by_factors(run.task.factors(data), mean)
        if correct.shape[1] > 1:
            columns = enumerate(correct.T.astype(float), start=1)
            tables["place of the label"] = [accuracy_row(*column) for column in columns]
        return tables, step, source

    return "accuracy by the factors in which examples differ", compute


def permutation(run: SavedRun, keys: Sequence[str], sizes: Sizes) -> Plan:
    """Accuracy when blocks of real positions are permuted."""
    chosen = block_sizes(run, sizes, smallest=1)

    def compute() -> tuple[Tables, int, str]:
        data, rows = run.data, []
        for size in chosen:
            inputs = shuffle_blocks(np.asarray(data.inputs), np.asarray(data.lengths), size)
            rows.append(accuracy_row(size, correct_labels(run.logits(inputs, data.lengths), data)))
        return {"block size": rows}, run.weights_step, "weights"

    return "accuracy when blocks of real positions are in random order", compute


def locality(run: SavedRun, keys: Sequence[str], sizes: Sizes) -> Plan:
    """Accuracy of the mean logits of windows that the model reads as separate sequences."""
    task, chosen = run.task, block_sizes(run, sizes, smallest=SMALLEST_WINDOW)
    if task.dual:
        raise ConfigError(
            f"locality: an example of {task.name} is a pair, whose two sequences have no common "
            "windows; take permutation"
        )
    if task.num_targets > 1:
        raise ConfigError(
            f"locality: {task.name} has {task.num_targets} labels at its last positions, which "
            "only the last window contains; take permutation"
        )

    def compute() -> tuple[Tables, int, str]:
        data, rows = run.data, []
        for size in chosen:
            setup, padded = setup_for_windows(run, size)
            inputs, lengths, examples = cut_windows(
                np.asarray(data.inputs), np.asarray(data.lengths), size, padded
            )
            logits = mean_by_example(run.logits(inputs, lengths, setup), examples, len(data))
            rows.append(accuracy_row(size, correct_labels(logits, data)))
        return {"window size": rows}, run.weights_step, "weights"

    return "accuracy of the mean logits of windows, each read as a separate sequence", compute


def length(run: SavedRun, keys: Sequence[str], sizes: Sizes) -> Plan:
    """Accuracy on the task of the run and on the task with other settings."""
    settings = split_settings(keys)
    setups = [resized_setup(run, words) for words in settings]

    def compute() -> tuple[Tables, int, str]:
        rows = [length_row("as trained", run.data, run.logits(run.data.inputs, run.data.lengths))]
        for words, setup in zip(settings, setups, strict=True):
            work = partial(prepare, setup.task, **data_arguments(run.cfg))
            data = run.evaluated(preparing(setup.task, work).splits[run.split])
            varied = [word for word in words if word not in keys] or words
            logits = run.logits(data.inputs, data.lengths, setup)
            rows.append(length_row(" ".join(varied), data, logits))
        return {"task": rows}, run.weights_step, "weights"

    return "accuracy at the training length and at others", compute


DIAGNOSTICS: Mapping[str, Callable[[SavedRun, Sequence[str], Sizes], Plan]] = {
    "factors": factors,
    "length": length,
    "permutation": permutation,
    "locality": locality,
}


def block_sizes(run: SavedRun, sizes: Sizes, smallest: int) -> list[int]:
    """The requested sizes, or a geometric scale from `smallest` to the length of the task."""
    longest = run.task.seq_len
    if not sizes:
        return geometric_sizes(smallest, longest)
    for size in sizes:
        if not 1 <= size <= longest:
            raise ConfigError(
                f"--sizes {size}: expected numbers in [1, {longest}], the length of {run.task.name}"
            )
    return sorted(set(sizes))


def correct_labels(logits: np.ndarray, data: Split) -> np.ndarray:
    """Fraction of correct labels of each example, (n,) float64."""
    return (logits.argmax(axis=-1) == data.labels).reshape(len(data), -1).mean(axis=1)


def length_row(name: str, data: Split, logits: np.ndarray) -> AccuracyRow:
    low, high = int(data.lengths.min()), int(data.lengths.max())
    positions = str(low) if low == high else f"{low} to {high}"
    return accuracy_row(f"{name} ({positions} positions)", correct_labels(logits, data))


# --- Output --------------------------------------------------------------------------------------


def markdown_table(name: str, rows: Sequence[AccuracyRow]) -> str:
    heading = "" if name == "all" else name
    lines = [f"| {heading} | accuracy, % | 95 % interval | examples |", "|---|---:|---:|---:|"]
    for value, accuracy, low, high, examples in rows:
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(f"| {value} | {100 * accuracy:.1f} | {interval} | {examples:,} |")
    return "\n".join(["", *lines])


def save_result(folder: Path, name: str, split: str, result: Mapping[str, Any]) -> None:
    """Adds a result to diagnostics.json, under a lock because processes may write at once."""
    path = folder / FILE
    with disk_errors(path), filelock.FileLock(folder / LOCK):
        try:
            found = records.parse_json(Diagnostics, read_regular_file(path, LARGEST))
        except FileNotFoundError:
            found = {"schema": SCHEMA}
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise RunFolderError(f"{path} {problem}; move it away and diagnose again") from None
        if not isinstance(earlier := found.get(name, {}), dict):
            raise RunFolderError(f"{path} holds no results under {name}; move it away")
        found[name] = earlier | {split: records.to_json(result)}
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode())
