"""Fits a linear classifier on a few features per example, as a baseline for sequence models."""

import numpy as np
from jaxtyping import Float, Integer, Real

RIDGE = 1e-6  # makes the fit unique if features are collinear
MAX_ITERATIONS = 300
FEW_ROWS = 500  # below, least squares: it takes no iterations, and SciPy is not imported


def linear_accuracy(
    train: tuple[Float[np.ndarray, "n F"], Integer[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m F"], Integer[np.ndarray, " m"]],
    num_classes: int,
) -> float:
    """Test accuracy (a fraction) of multinomial logistic regression, fitted to train in float64.

    Features are standardized by the mean and standard deviation of train; the weights start at
    zero. Fewer than `FEW_ROWS` rows of train are fitted by least squares. The result is
    deterministic on a given machine.
    """
    features, labels = train
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)

    def design(x: np.ndarray) -> np.ndarray:
        return np.column_stack([(x - mean) / spread, np.ones(len(x))])

    x, targets = design(features), np.eye(num_classes)[labels]

    fit = _least_squares if len(x) < FEW_ROWS else _logistic_regression
    guesses = (design(test[0]) @ fit(x, targets)).argmax(axis=1)
    return float(np.mean(guesses == test[1]))


def _least_squares(
    x: Float[np.ndarray, "n F"], targets: Float[np.ndarray, "n C"]
) -> Float[np.ndarray, "F C"]:
    return np.linalg.lstsq(x, targets)[0]


def _logistic_regression(
    x: Float[np.ndarray, "n F"], targets: Float[np.ndarray, "n C"]
) -> Float[np.ndarray, "F C"]:
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    shape = x.shape[1], targets.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        log_probs = log_softmax(x @ weights, axis=1)
        value = -np.mean((log_probs * targets).sum(axis=1)) + RIDGE * (flat @ flat)
        gradient = x.T @ (np.exp(log_probs) - targets) / len(x) + 2 * RIDGE * weights
        return value, gradient.ravel()

    start, options = np.zeros(np.prod(shape)), {"maxiter": MAX_ITERATIONS}
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x.reshape(shape)


def grouped_linear_accuracy(
    train: tuple[Integer[np.ndarray, " n"], Real[np.ndarray, "n F"], Integer[np.ndarray, " n"]],
    test: tuple[Integer[np.ndarray, " m"], Real[np.ndarray, "m F"], Integer[np.ndarray, " m"]],
    num_classes: int,
) -> float:
    """`linear_accuracy` with one classifier for each group of examples.

    Both parts are (groups, features, labels). Examples of a group that train lacks count as wrong.
    """
    right = 0.0
    for group in np.unique(test[0]):
        (x, labels), (test_x, test_labels) = (
            (features[groups == group].astype(np.float64), targets[groups == group])
            for groups, features, targets in (train, test)
        )
        if len(x):
            accuracy = linear_accuracy((x, labels), (test_x, test_labels), num_classes)
            right += accuracy * len(test_x)
    return right / len(test[0])
