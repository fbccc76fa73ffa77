"""Fits a linear classifier on a few features per example, as a baseline for sequence models."""

import numpy as np
from jaxtyping import Float, Integer

RIDGE = 1e-6  # makes the fit unique if features are collinear
MAX_ITERATIONS = 300


def linear_accuracy(
    train: tuple[Float[np.ndarray, "n F"], Integer[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m F"], Integer[np.ndarray, " m"]],
    num_classes: int,
) -> float:
    """Test accuracy (a fraction) of multinomial logistic regression, fitted to train in float64.

    Features are standardized by the mean and standard deviation of train; the weights start at
    zero. The result is deterministic on a given machine.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    features, labels = train
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)

    def design(x: np.ndarray) -> np.ndarray:
        return np.column_stack([(x - mean) / spread, np.ones(len(x))])

    x, targets = design(features), np.eye(num_classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(x.shape[1], num_classes)
        log_probs = log_softmax(x @ weights, axis=1)
        value = -np.mean((log_probs * targets).sum(axis=1)) + RIDGE * (flat @ flat)
        gradient = x.T @ (np.exp(log_probs) - targets) / len(x) + 2 * RIDGE * weights
        return value, gradient.ravel()

    start, options = np.zeros(x.shape[1] * num_classes), {"maxiter": MAX_ITERATIONS}
    fitted = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    guesses = (design(test[0]) @ fitted.reshape(-1, num_classes)).argmax(axis=1)
    return float(np.mean(guesses == test[1]))
