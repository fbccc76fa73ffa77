"""Scores the saved weights of a run again and compares the result with the recorded scores.

On the same kind of device with the same versions, logits are equal bit for bit. On others, classes
may differ only where the two largest logits are nearly equal.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lra.errors import MismatchError
from lra.report.saved_run import SavedRun, check_scores
from lra.runs import machine
from lra.training.evaluation import score
from lra.training.prefetch import on_host

TIE_MARGIN = 1e-3  # other devices may swap the two largest logits if they are closer than this
LOGIT_TOLERANCE = 0.05  # of the largest logit


def evaluate_run(
    folder: Path,
    *,
    split: str = "test",
    weights: str | None = None,
    overrides: Sequence[str] = (),
    allow_targets: Sequence[str] = (),
) -> str:
    """Scores a split with the saved weights of a run and returns a report. Writes no file.

    Args:
        weights: best or last; None for those that the protocol selects.
        overrides: KEY=VALUE of the keys in `lra.config.schema.keys_in_eval`.
        allow_targets: classes outside `lra` and `models` that the record may name.

    Raises:
        MismatchError: a prediction differs from the stored one and is no tie, or the recorded
            scores are not those of the predictions.
        RunFolderError: there is no record, or no checkpoint or predictions that can be read.
        DataError: the split differs from the data of the run.
        LraError: a batch does not fit into device memory.
    """
    return rescore(
        SavedRun(folder, overrides, split=split, weights=weights, allow_targets=allow_targets)
    )


def rescore(run: SavedRun) -> str:
    """`evaluate_run` of a run that is read already."""
    stored = run.stored_predictions()
    *_, checkpoint_step = run.checkpoint  # before the data, which may have to be prepared
    inputs, lengths, labels = on_host(run.data)
    logits = run.logits(inputs, lengths)
    result = score(logits, labels)
    lines = [
        f"{run.title}: weights of step {run.weights_step:,} ({run.rule}), "
        f"from the checkpoint of step {checkpoint_step:,}",
        f"{run.split} accuracy {100 * result['accuracy']:.2f} %, loss {result['loss']:.4f}, "
        f"{result['count']:,} examples",
    ]
    recorded = run.recorded_scores
    if not run.scores_recorded or recorded.get("accuracy") is None:
        lines.append("no comparison: the run recorded no score of these weights")
    elif stored is None:
        if all(value == recorded.get(key) for key, value in result.items()):
            lines.append("record.json: identical")
        else:
            ties = float((margins(logits) < TIE_MARGIN).mean())
            check_scores(recorded, result, "the saved weights", ties=ties, loss_tolerance=0.01)
            lines.append(f"record.json: accuracy {100 * recorded['accuracy']:.2f} %")
    elif not np.array_equal(stored["rows"], run.rows):
        raise MismatchError("the rows in predictions.npz are not those that the run scored")
    elif not np.array_equal(stored["labels"], labels):
        raise MismatchError("the labels in predictions.npz are not those of the data")
    elif logits.tobytes() == stored["logits"].tobytes():
        lines.append("predictions.npz: identical, bit for bit")
    else:
        text, same = compare_logits(logits, stored["logits"])
        lines.append(text)
        if differences := environment_differences(run.record):
            lines.append(f"the run was made in another environment: {'; '.join(differences)}")
        if not same:
            raise MismatchError("; ".join(lines))
    return "\n".join(lines)


def compare_logits(logits: np.ndarray, stored: np.ndarray) -> tuple[str, bool]:
    """How logits (n, C) or (n, T, C) differ, and whether rounding can explain it.

    It cannot if a class differs that is no tie in both (the stored logits alone may have been made
    to look like ties), or if a logit differs by more than `LOGIT_TOLERANCE` of the largest one:
    scaled logits have the same classes and another loss.
    """
    if logits.shape != stored.shape:
        raise MismatchError(
            f"the stored logits have shape {stored.shape}, those of the saved weights "
            f"{logits.shape}"
        )
    changed = logits.argmax(axis=-1) != stored.argmax(axis=-1)
    ties = changed & (margins(stored) < TIE_MARGIN) & (margins(logits) < TIE_MARGIN)
    largest, difference = np.abs(logits).max(), np.abs(logits - stored).max()
    allowed = max(TIE_MARGIN, LOGIT_TOLERANCE * float(largest))
    text = (
        f"predictions.npz: logits of up to {largest:.1e} differ by up to {difference:.1e}; "
        f"{changed.sum():,} of {changed.size:,} classes differ, {ties.sum():,} of them where both "
        f"have two largest logits closer than {TIE_MARGIN:g}"
    )
    return text, bool(difference <= allowed and np.array_equal(ties, changed))


def margins(logits: np.ndarray) -> np.ndarray:
    """Differences between the two largest logits of each label."""
    second, first = np.moveaxis(np.sort(logits, axis=-1)[..., -2:], -1, 0)
    return first - second


def environment_differences(record: Mapping[str, Any]) -> list[str]:
    """Devices and versions of a record that differ from those in use, as "name old, here new"."""
    device, here = record.get("device") or {}, machine.versions()
    rows = [
        ("device", device.get("kind"), jax.devices()[0].device_kind),
        ("devices", device.get("count", 1), 1),
        ("processes", device.get("processes", 1), 1),
        *((name, value, here.get(name)) for name, value in (record.get("versions") or {}).items()),
    ]
    return [f"{name} {old}, here {new}" for name, old, new in rows if old != new]
