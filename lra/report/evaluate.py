"""Scores the saved weights of a run again and compares the result with the recorded scores.

On the same kind of device with the same versions, logits are equal bit for bit. On others, classes
may differ only where the two largest logits are nearly equal.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lra.errors import MismatchError
from lra.report.saved_run import SavedRun
from lra.runs import machine
from lra.training.evaluation import score
from lra.training.prefetch import on_host

TIE_MARGIN = 1e-3  # other devices may swap the two largest logits if they are closer than this


class Comparison(NamedTuple):
    """Logits compared with the stored ones.

    Attributes:
        identical: equal bit for bit.
        changed: number of predictions with another class.
        ties: number of changed predictions whose two largest stored logits are within `TIE_MARGIN`.
        total: number of predictions.
        max_difference: largest absolute difference of two logits.
    """

    identical: bool
    changed: int
    ties: int
    total: int
    max_difference: float

    def __str__(self) -> str:
        if self.identical:
            return "predictions.npz: identical, bit for bit"
        return (
            f"predictions.npz: logits differ by up to {self.max_difference:.1e}; {self.changed:,} "
            f"of {self.total:,} classes differ, {self.ties:,} of them where the two largest logits "
            f"were closer than {TIE_MARGIN:g}"
        )


def evaluate_run(
    folder: Path, *, split: str = "test", weights: str | None = None, overrides: Sequence[str] = ()
) -> str:
    """Scores a split with the saved weights of a run and returns a report. Writes no file.

    Args:
        weights: best or last; None for those that the protocol selects.
        overrides: KEY=VALUE of the keys in `lra.config.schema.keys_in_eval`.

    Raises:
        MismatchError: a prediction differs from the stored one and is no tie.
        RunFolderError: there is no record, or no checkpoint that can be read.
        DataError: the split differs from the data of the run.
        LraError: a batch does not fit into device memory.
    """
    run = SavedRun(folder, overrides, split=split, weights=weights)
    *_, checkpoint_step = run.checkpoint
    inputs, lengths, labels = on_host(run.data)
    logits = run.logits(inputs, lengths)
    result = score(logits, labels)
    lines = [
        f"{run.title}: weights of step {run.weights_step:,} ({run.rule}), "
        f"from the checkpoint of step {checkpoint_step:,}",
        f"{split} accuracy {100 * result['accuracy']:.2f} %, loss {result['loss']:.4f}, "
        f"{result['count']:,} examples",
    ]
    if not run.scores_recorded:
        return "\n".join([*lines, "no comparison: the run recorded no score of these weights"])
    stored = run.stored_predictions()
    if stored is None:
        return "\n".join([*lines, compare_scores(result, run.record["metrics"][split])])
    comparison = compare_logits(logits, stored["logits"])
    lines.append(str(comparison))
    if not comparison.identical and (differences := environment_differences(run.record)):
        lines.append(f"the run was made in another environment: {'; '.join(differences)}")
    if comparison.changed > comparison.ties:
        raise MismatchError("; ".join(lines))
    return "\n".join(lines)


def compare_logits(logits: np.ndarray, stored: np.ndarray) -> Comparison:
    """Compares logits (n, C) or (n, T, C) float32 with the stored ones.

    Raises:
        MismatchError: the shapes differ.
    """
    if logits.shape != stored.shape:
        raise MismatchError(
            f"the stored logits have shape {stored.shape}, those of the saved weights "
            f"{logits.shape}"
        )
    second, first = np.moveaxis(np.sort(stored, axis=-1)[..., -2:], -1, 0)
    changed = logits.argmax(axis=-1) != stored.argmax(axis=-1)
    return Comparison(
        identical=logits.tobytes() == stored.tobytes(),
        changed=int(changed.sum()),
        ties=int((changed & (first - second < TIE_MARGIN)).sum()),
        total=changed.size,
        max_difference=float(np.abs(logits - stored).max(initial=0.0)),
    )


def compare_scores(result: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    if all(result[key] == recorded[key] for key in result):
        return "record.json: identical"
    return f"record.json: accuracy {100 * recorded['accuracy']:.2f} %, loss {recorded['loss']:.4f}"


def environment_differences(record: Mapping[str, Any]) -> list[str]:
    """Devices and versions of a record that differ from those in use, as "name old, here new"."""
    device = record["device"]
    recorded = {
        "device": device["kind"],
        "devices": device.get("count", 1),
        "processes": device.get("processes", 1),
        **record["versions"],
    }
    here = {
        "device": jax.devices()[0].device_kind,
        "devices": 1,
        "processes": 1,
        **machine.versions(),
    }
    return [
        f"{name} {value}, here {here.get(name)}"
        for name, value in recorded.items()
        if value != here.get(name)
    ]
