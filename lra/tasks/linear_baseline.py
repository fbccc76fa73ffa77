"""How well does a linear model on a few numbers an example do? The line that a sequence model has to beat."""

import numpy as np
from jaxtyping import Float, Integer

RIDGE = 1e-6  # keeps the fit unique where features repeat each other
MAX_ITERATIONS = 300


def linear_accuracy(
    train: tuple[Float[np.ndarray, "n F"], Integer[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m F"], Integer[np.ndarray, " m"]],
    num_classes: int,
) -> float:
    """Test accuracy (fraction) of multinomial logistic regression fitted to train, in float64 from zero weights.

    Features are standardised by train's mean and spread. The same data give the same number on the same machine.
    """
    from scipy.optimize import minimize

    features, labels = train
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)

    def design(x: np.ndarray) -> np.ndarray:
        return np.column_stack([(x - mean) / spread, np.ones(len(x))])

    x, targets = design(features), np.eye(num_classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(x.shape[1], num_classes)
        logits = x @ weights
        logits -= logits.max(axis=1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        value = -np.mean((log_probs * targets).sum(axis=1)) + RIDGE * (flat @ flat)
        gradient = x.T @ (np.exp(log_probs) - targets) / len(x) + 2 * RIDGE * weights
        return value, gradient.ravel()

    start = np.zeros(x.shape[1] * num_classes)
    fitted = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_ITERATIONS}
    ).x
    guesses = (design(test[0]) @ fitted.reshape(-1, num_classes)).argmax(axis=1)
    return float(np.mean(guesses == test[1]))
