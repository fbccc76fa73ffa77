"""Predictions and scores of a whole split: each example counts once."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lra.tasks.base import permutation


def sample_rows(labels: np.ndarray, limit: int | None, how: str = "stratified") -> np.ndarray:
    """Rows (ascending) of `limit` examples; all for None or if there are fewer.

    The rows depend on the labels and the arguments alone.

    Args:
        labels: (n,), or (n, T), which have no strata.
        how: "stratified": random, with each label as often as its share of the split, rounded;
            "first": the first rows, as in records without `data.sample`.
    """
    count = len(labels)
    if limit is None or limit >= count:
        return np.arange(count)
    if how == "first":
        return np.arange(limit)
    order = permutation(count, 0)
    if labels.ndim == 1:
        order = order[np.argsort(labels[order], kind="stable")]
    # evenly spaced places in the order by label
    return np.sort(order[(np.arange(limit) * count + count // 2) // limit])


def predict(
    apply: Callable[[Any, Any], jax.Array],
    inputs: jax.Array | np.ndarray,
    lengths: jax.Array | np.ndarray,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Returns the float32 logits (n, C) or (n, T, C) of all examples, in order.

    The last batch is padded with example 0 and its extra logits are dropped, so that only one shape
    is compiled.

    Args:
        apply: jitted (inputs (B, ...), lengths (B,)) -> logits (B, C) or (B, T, C).
        inputs: inputs (n, ...) of the split, on the device or on the host.
        lengths: lengths (n,) of the inputs.
        batch_size: number of examples B of a call.
        on_progress: called with the number of examples whose logits are known.
    """
    count = len(lengths)
    batches: list[Any] = []
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        rows = np.where(rows < count, rows, 0)
        batches.append(apply(inputs[rows], lengths[rows]))  # asynchronous: keeps the device busy
        if start:
            batches[-2] = np.asarray(batches[-2], np.float32)
            on_progress(start)
    return np.concatenate([np.asarray(batch, np.float32) for batch in batches])[:count]


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
    """Returns accuracy (fraction), mean cross-entropy loss (nats) and number of examples.

    Computed in float64.

    Args:
        logits: (n, C), or (n, T, C) if an example has T labels. Then `accuracy` and `loss` are
            means over all labels, and `exact` is the fraction of examples with all labels correct.
        labels: (n,) or (n, T).
    """
    logits, labels = logits.astype(np.float64), np.asarray(labels, np.int64)
    top = logits.max(axis=-1)
    log_sum = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    losses = log_sum - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    correct = logits.argmax(axis=-1) == labels
    scores = {
        "accuracy": float(np.mean(correct)),
        "loss": float(losses.mean()),
        "count": len(labels),
    }
    return scores if labels.ndim == 1 else scores | {"exact": float(np.mean(correct.all(axis=1)))}
