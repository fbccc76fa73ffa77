"""Compares models by their stored test predictions: paired tests, ranks over tasks.

One pair of runs: the exact test of McNemar 1947 on the examples that one run alone has right.
Several pairs, one for each seed: the test for clustered pairs of Durkalski et al. 2003 (Statistics
in Medicine 22:2417); the clusters are the examples, because the seeds share them. Both tests
concern new examples and these trained models. The variation over seeds is in the probability of
improvement (Agarwal et al. 2021, arXiv 2108.13264, rliable): the fraction of pairs of one run of A
and one of B, over all seeds, in which A is more accurate; a tie counts half. P values of several
pairs of models are corrected after Holm 1979.

Ranks over tasks follow Demsar 2006 (JMLR 7:1): for three or more models the Friedman test and the
critical difference of Nemenyi, for two models the signed-rank test of Wilcoxon.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from tabulate import tabulate

from lra.errors import ConfigError, LraError
from lra.report.selection import (
    Record,
    accuracy_of,
    is_scored,
    restricted,
    select_runs,
    split_hash,
)
from lra.runs.records import read_predictions
from lra.runs.run_folder import load_records

LEVEL = 0.05

Runs = Mapping[str, Mapping[str, Sequence[Record]]]  # of each model, of each task


class Ranks(NamedTuple):
    """Mean ranks over tasks, 1 for the best, and which models do not differ."""

    means: dict[str, float]  # ascending
    p: float  # Friedman
    critical_difference: float  # Nemenyi
    groups: list[list[str]]  # the largest sets of models within the critical difference


def compare(
    paths: Sequence[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    protocol: str | None = None,
    plot: str | Path | None = None,
) -> str:
    """Compares the models below one folder, or those of two folders, and returns a report.

    The runs of a model on a task are those in the table: the seeds of its best configuration.

    Args:
        tasks, models, protocol: restrict the records; None for all.
        plot: file for a critical-difference diagram.
    Raises:
        ConfigError: there are not two models, or a folder of two holds several.
        LraError: a run has no predictions, or the runs of a task have other test data.
    """
    runs = find_models(paths, tasks, models, protocol)
    by_task: dict[str, list[str]] = defaultdict(list)
    for name, found in runs.items():
        for task in found:
            by_task[task].append(name)
    parts = [
        task_report(task, {name: runs[name][task] for name in names})
        for task, names in sorted(by_task.items())
        if len(names) > 1
    ]
    if not parts:
        raise ConfigError(f"{' and '.join(runs)} have no task in common")
    parts.append(
        "p: of an equal accuracy on new examples, for these trained models (McNemar; over seeds: "
        "Durkalski et al. 2003). P(A > B): that a run of A is more accurate than one of B."
    )
    complete = [task for task, names in sorted(by_task.items()) if len(names) == len(runs)]
    scores = {
        name: [median_accuracy(found[task]) for task in complete] for name, found in runs.items()
    }
    if len(complete) > 1:
        parts.append(rank_report(scores, len(complete)))
    if plot is not None:
        if len(complete) < 2 or len(runs) < 3:
            raise ConfigError(
                f"--plot {plot} draws mean ranks, which need 3 models with 2 common tasks; found "
                f"{len(runs)} and {len(complete)}"
            )
        from lra.report.plots import plot_ranks

        parts.append(str(plot_ranks(mean_ranks(scores), plot)))
    return "\n\n".join(parts) + "\n"


def find_models(
    paths: Sequence[str | Path],
    tasks: Sequence[str] | None,
    models: Sequence[str] | None,
    protocol: str | None,
) -> dict[str, dict[str, list[Record]]]:
    """The runs of each model and task; with two paths, of the one model of each path."""
    sets = []
    for path in paths:
        records = restricted(load_records([path]), tasks, models, protocol)
        found: dict[str, dict[str, list[Record]]] = defaultdict(dict)
        scored = [record for record in records if is_scored(record, "test")]
        for (name, task), selected in select_runs(scored).items():
            found[name][task] = selected.runs
        if not found:
            raise ConfigError(f"{path}: no finished run there; give a folder that holds runs")
        sets.append(found)
    if len(sets) == 1:
        if len(sets[0]) < 2:
            raise ConfigError(
                f"{paths[0]} holds only {' and '.join(sets[0])}; compare needs two models or "
                "two folders"
            )
        return sets[0]
    for path, found in zip(paths, sets, strict=True):
        if len(found) > 1:
            raise ConfigError(
                f"{path} holds {', '.join(found)}; with two folders each must hold one model, such "
                f"as {Path(path) / 'TASK' / 'MODEL'}; --task, --model and --protocol also select"
            )
    names = [next(iter(found)) for found in sets]
    labels = names if names[0] != names[1] else [str(path) for path in paths]
    if labels[0] == labels[1]:
        raise ConfigError(f"{paths[0]} is compared with itself; give two folders")
    return {label: next(iter(found.values())) for label, found in zip(labels, sets, strict=True)}


# --- One task ------------------------------------------------------------------------------------


def task_report(task: str, runs: Mapping[str, Sequence[Record]]) -> str:
    """Table of every pair of models on a task; a pair alone also has a row for each seed."""
    correct = read_correct(task, runs)
    examples = len(next(iter(next(iter(correct.values())).values())))
    body: list[list[str]] = []
    p_values: list[float] = []  # over seeds, of the last row of each pair of models
    for a, b in itertools.combinations(runs, 2):
        seeds = seed_pairs(correct[a], correct[b])
        pairs = [(correct[a][s], correct[b][t]) for s, t in seeds]
        if len(runs) == 2 and len(pairs) > 1:
            for (s, t), pair in zip(seeds, pairs, strict=True):
                name = f"seed {s}" if s == t else f"seeds {s}, {t}"
                body.append([a, b, name, *paired_cells([pair]), format_p(mcnemar([pair])), ""])
        better = probability_of_improvement(*(list(map(accuracy, runs[x])) for x in (a, b)))
        p_values.append(mcnemar(pairs))
        name = f"{len(pairs)} seeds" if len(pairs) > 1 else "1 seed"
        body.append([a, b, name, *paired_cells(pairs), format_p(p_values[-1]), f"{better:.2f}"])
    if len(p_values) > 1:
        for row, p in zip(body, holm(p_values), strict=True):
            row[-2] = format_p(p)
    p_heading = "p" if len(p_values) == 1 else "p (Holm)"
    headings = ["A", "B", "", "A %", "B %", "A - B", "only A", "only B", p_heading, "P(A > B)"]
    table = tabulate(body, headings, disable_numparse=True, colalign=["left"] * 3 + ["right"] * 7)
    return f"{task}, {examples:,} test examples\n\n{table}"


def read_correct(
    task: str, runs: Mapping[str, Sequence[Record]]
) -> dict[str, dict[Any, Bool[np.ndarray, "n T"]]]:
    """Which labels each run has right, by model and seed; raises LraError if they do not pair."""
    correct: dict[str, dict[Any, np.ndarray]] = defaultdict(dict)
    first: tuple[Record, dict[str, np.ndarray]] | None = None
    for name, records in runs.items():
        for record in records:
            found = read_predictions(record["path"])
            if found is None:
                raise LraError(f"{record['path']} has no predictions.npz; run it again")
            first = first or (record, found)
            same = all(np.array_equal(found[key], first[1][key]) for key in ("labels", "rows"))
            if not same or split_hash(record, "test") != split_hash(first[0], "test"):
                raise LraError(
                    f"{first[0]['path']} and {record['path']} have different test data of {task}; "
                    "a paired test needs the same examples (--model and --protocol select runs)"
                )
            right = found["logits"].argmax(axis=-1) == found["labels"]
            correct[name][record["seed"]] = right.reshape(len(right), -1)
    return correct


def seed_pairs(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The common seeds; if there are none, both in the order of their seeds."""
    if common := sorted(a.keys() & b.keys()):
        return [(seed, seed) for seed in common]
    return list(zip(sorted(a), sorted(b), strict=False))


def paired_cells(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Accuracies, their difference, and the numbers of labels that only A or only B has right."""
    a, b = (np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
    means = 100 * a.mean(), 100 * b.mean()
    accuracies = [f"{value:.2f}" for value in (*means, means[0] - means[1])]
    return [*accuracies, f"{(a & ~b).sum():,}", f"{(b & ~a).sum():,}"]


def mcnemar(pairs: Sequence[tuple[Bool[np.ndarray, "n T"], Bool[np.ndarray, "n T"]]]) -> float:
    """Two-sided p of equal accuracy: exact for one pair with a label per example, else clustered.

    A cluster is an example; its members are the pairs and labels.
    """
    from scipy.stats import binomtest, chi2

    a, b = (np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
    only_a, only_b = (a & ~b).sum(axis=1), (b & ~a).sum(axis=1)
    difference = only_a - only_b
    if not difference.any():
        return 1.0
    if a.shape[1] == 1:
        discordant = int(only_a.sum() + only_b.sum())
        return float(binomtest(int(only_a.sum()), discordant).pvalue)
    return float(chi2.sf(difference.sum() ** 2 / (difference**2).sum(), 1))


def probability_of_improvement(a: Sequence[float], b: Sequence[float]) -> float:
    """P(X > Y) + P(X = Y) / 2 for a run of each, as rliable defines it for one task."""
    return statistics.mean((x > y) + (x == y) / 2 for x in a for y in b)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def accuracy(record: Record) -> float:
    found = accuracy_of(record, "test")
    assert found is not None  # of scored runs
    return found


def median_accuracy(records: Sequence[Record]) -> float:
    return statistics.median(map(accuracy, records))


# --- Several tasks -------------------------------------------------------------------------------


def ranks_over_tasks(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean rank of each model from a score for each task, 1 for the best; ascending."""
    from scipy.stats import rankdata

    means = rankdata(-np.asarray(list(scores.values())), axis=0).mean(axis=1)
    return dict(sorted(zip(scores, means.tolist(), strict=True), key=lambda item: item[1]))


def mean_ranks(scores: Mapping[str, Sequence[float]]) -> Ranks:
    """Ranks of three or more models from a score for each task."""
    from scipy.stats import friedmanchisquare, studentized_range

    table = np.asarray(list(scores.values()))  # (k models, N tasks)
    k, num_tasks = table.shape
    quantile = studentized_range.ppf(1 - LEVEL, k, np.inf) / 2**0.5
    difference = float(quantile * (k * (k + 1) / (6 * num_tasks)) ** 0.5)
    ordered = ranks_over_tasks(scores)
    groups: list[list[str]] = []
    for name, rank in ordered.items():
        near = [x for x, mean in ordered.items() if rank <= mean < rank + difference]
        near = near[near.index(name) :]
        if len(near) > 1 and not any(set(near) <= set(group) for group in groups):
            groups.append(near)
    p = float(friedmanchisquare(*table).pvalue)
    return Ranks(ordered, p, difference, groups)


def rank_report(scores: Mapping[str, Sequence[float]], num_tasks: int) -> str:
    """Ranks over tasks as text; two models are tested with Wilcoxon's signed-rank test."""
    if len(scores) == 2:
        from scipy.stats import wilcoxon

        a, b = scores.values()
        p = float(wilcoxon(a, b).pvalue) if list(a) != list(b) else 1.0
        names = " and ".join(scores)
        return f"Over {num_tasks} tasks, {names}: Wilcoxon signed-rank p = {format_p(p)}"
    ranks = mean_ranks(scores)
    lines = [
        f"Mean ranks over {num_tasks} tasks, 1 is best: Friedman p = {format_p(ranks.p)}, critical "
        f"difference {ranks.critical_difference:.2f} (Nemenyi, {100 * LEVEL:g} %)"
    ]
    width = max(map(len, scores))
    for name, mean in ranks.means.items():
        bars = " ".join("|" if name in group else " " for group in ranks.groups)
        lines.append(f"  {mean:5.2f}  {name:<{width}}  {bars}".rstrip())
    lines.append("Models with a bar in the same column do not differ.")
    return "\n".join(lines)


def format_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
