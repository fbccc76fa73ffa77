"""Scores of a whole split: logits of every example once, then sums and counts divided at the end."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def predict(
    apply: Callable[[Any, Any], jax.Array],
    inputs: jax.Array | np.ndarray,
    lengths: jax.Array | np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Logits (n, C) or (n, T, C) float32 of every example, in order.

    Args:
        apply: jitted (inputs (B, ...), lengths (B,)) -> logits (B, C) or (B, T, C).
        inputs, lengths: a whole split, on the device or on the host.
    The last batch is filled up with example 0, whose extra logits are dropped, so that one shape is compiled.
    """
    count = len(lengths)
    batches = []
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        chosen = np.where(rows < count, rows, 0)
        batches.append(
            apply(inputs[chosen], lengths[chosen])
        )  # not waited for: the device stays busy
    return np.concatenate([np.asarray(batch, np.float32) for batch in batches])[:count]


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
    """Accuracy (fraction), mean cross-entropy in nats and count of examples of a split, in float64.

    Args:
        logits: (n, C), or (n, T, C) where an example has T labels; then `accuracy` is that of a label, and `exact` the
            fraction of examples with all labels right.
        labels: (n,) or (n, T).
    """
    logits, labels = logits.astype(np.float64), np.asarray(labels, np.int64)
    top = logits.max(axis=-1)
    log_sum = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    losses = log_sum - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    right = logits.argmax(axis=-1) == labels
    scores = {"accuracy": float(np.mean(right)), "loss": float(losses.mean()), "count": len(labels)}
    return scores if labels.ndim == 1 else scores | {"exact": float(np.mean(right.all(axis=1)))}
