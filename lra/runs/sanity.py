"""Did a run begin as it should, has it stopped getting better, did it learn? Numbers in, a verdict out."""

import math
from typing import Any

import numpy as np

STANDARD_ERRORS = 3.0  # above chance; one run in 700 at chance gets there


def first_loss_problem(loss: float, num_classes: int, tolerance: float | None) -> str | None:
    """What is wrong with the loss of the first step, in nats; None where nothing is or where `tolerance` is None.

    An untrained model should know nothing: equal logits have a loss of log(C) against every label, smoothed or not.

    Args:
        tolerance: factor by which the loss may be off, up or down. Logits of standard deviation s cost about s^2 / 2 above
            log(C); the models here begin within a factor of 1.1 on the tasks of the arena, of 1.9 on those without pooling.
    """
    expected = math.log(num_classes)
    if tolerance is None or expected / tolerance <= loss <= expected * tolerance:
        return None
    cause = (
        "it begins sure of wrong answers: look at the scale of its initial weights and of its head"
        if loss > expected
        else "it knows labels before it has learned any: look at what its inputs hold"
    )
    return (
        f"the loss of the first step is {loss:.3f}, that of a model that knows nothing log({num_classes}) = {expected:.3f}; "
        f"{cause} (trainer.first_loss_tolerance={tolerance:g})"
    )


def evaluations_without_gain(step: int, best_step: int, every: int) -> int:
    """How many evaluations, one each `every` steps, there were after `best_step` up to `step`."""
    return step // every - best_step // every


def stopped_early(
    step: int, best_step: int, every: int, patience: int | None
) -> dict[str, Any] | None:
    """{step, reason} where `patience` evaluations in a row brought no better accuracy.

    A function of what a checkpoint holds, so that a resumed run stops where one that never stopped did.
    """
    if patience is None or evaluations_without_gain(step, best_step, every) < patience:
        return None
    return {
        "step": step,
        "reason": f"trainer.early_stopping={patience}: no better validation accuracy than that of step {best_step}",
    }


def chance(labels: np.ndarray, num_classes: int) -> float:
    """Accuracy without looking at the input: that of the most frequent label of each place, or of guessing."""
    places = np.reshape(labels, (len(labels), -1)).T  # one, or as many as the task asks labels for
    return max(
        1 / num_classes, float(np.mean([np.bincount(place).max() / place.size for place in places]))
    )


def is_at_chance(accuracy: float, level: float, count: int) -> bool:
    """Whether an accuracy over `count` labels is within `STANDARD_ERRORS` binomial standard errors of chance, or below."""
    return accuracy <= level + STANDARD_ERRORS * math.sqrt(level * (1 - level) / count)


def chance_warning(accuracy: float, level: float, step: int, steps: int) -> str:
    return (
        f"at step {step} of {steps} validation accuracy {100 * accuracy:.1f} % is within noise of chance, "
        f"{100 * level:.1f} %: nothing is learned yet; try optim.lr at a third and at three times its value, a longer "
        f"optim.warmup, or more trainer.steps, and see whether the training loss falls (trainer.chance_after says when to look)"
    )
