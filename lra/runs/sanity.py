"""Sanity checks of a run: initial loss, early stopping, accuracy at chance."""

import math
from typing import Any

import numpy as np


def first_loss_problem(loss: float, num_classes: int, tolerance: float | None) -> str | None:
    """What is wrong with the loss of the first step, in nats; None if it is plausible.

    An untrained model with equal logits has loss log(C) for every label, smoothed or not.

    Args:
        tolerance: accepted factor between the loss and log(C), up or down; None accepts every loss.
            Logits of standard deviation s add about s^2 / 2 to log(C). The models here start within
            a factor of 1.1 on the LRA tasks and 1.9 on tasks without pooling.
    """
    expected = math.log(num_classes)
    if tolerance is None or expected / tolerance <= loss <= expected * tolerance:
        return None
    cause = "check whether the inputs contain the labels"
    if loss > expected:
        cause = "check the initialization scale of the weights and the head"
    return (
        f"initial loss {loss:.3f} is far from log({num_classes}) = {expected:.3f}; {cause} "
        f"(trainer.first_loss_tolerance={tolerance:g})"
    )


def stopped_early(
    step: int, best_step: int, every: int, patience: int | None
) -> dict[str, Any] | None:
    """{step, reason} after `patience` evaluations in a row without a better accuracy; else None.

    An evaluation follows each `every` steps. All values are in a checkpoint, so that a resumed run
    stops at the same step.
    """
    if patience is None or step // every - best_step // every < patience:
        return None
    better = f"no better validation accuracy than that of step {best_step}"
    return {"step": step, "reason": f"trainer.early_stopping={patience}: {better}"}


def chance(labels: np.ndarray, num_classes: int) -> float:
    """Best accuracy of a constant prediction, at least 1 / num_classes.

    Args:
        labels: (n,), or (n, T) for T labels per example, each with its own constant.
    """
    positions = np.reshape(labels, (len(labels), -1)).T  # (T, n)
    frequencies = [np.bincount(position).max() / position.size for position in positions]
    return max(1 / num_classes, float(np.mean(frequencies)))


def is_at_chance(accuracy: float, level: float, count: int) -> bool:
    """Whether the accuracy over `count` labels is at most 3 standard errors above chance.

    One in 700 runs at chance exceeds this limit.
    """
    return accuracy <= level + 3.0 * math.sqrt(level * (1 - level) / count)


def chance_warning(accuracy: float, level: float, step: int, steps: int) -> str:
    return (
        f"at step {step} of {steps} validation accuracy {100 * accuracy:.1f} % is within noise of "
        f"chance, {100 * level:.1f} %; try optim.lr at a third and at three times its value, "
        f"a longer optim.warmup or more trainer.steps, and check that the training loss falls "
        f"(trainer.chance_after sets the step of this check)"
    )
