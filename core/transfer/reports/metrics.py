"""Metrics of the report's test section: confusion matrix, calibration, residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CALIBRATION_BINS = 15
"""Number of bins of the reliability diagram and of the expected calibration error (Guo et al. 2017)."""


@dataclass(frozen=True)
class Bin:
    """The predictions in one interval of confidence.

    Args:
        low, high: Bounds of the interval (low, high].
        count: Number of predictions in the interval.
        confidence: Mean confidence of the predictions.
        accuracy: Fraction of the predictions that are correct.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over examples, by Laplace's estimate: it is not zero if all are correct."""
        accuracy = (self.accuracy * self.count + 1) / (self.count + 2)
        return float((accuracy * (1 - accuracy) / (self.count + 2)) ** 0.5)


@dataclass(frozen=True)
class Calibration:
    """Calibration of probabilities.

    Args:
        bins: The bins that contain predictions.
        error: Expected calibration error: mean distance of confidence and accuracy, weighted by the bins' counts.
        confidence: Mean confidence of all predictions.
        accuracy: Fraction of all predictions that are correct.
    """

    bins: tuple[Bin, ...]
    error: float
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Residuals:
    """Errors of one predicted number.

    Args:
        mean_absolute_error: Mean absolute error.
        root_mean_squared_error: Root mean squared error.
        bias: Mean of the predicted value minus the true value.
        r2: Coefficient of determination R²; None if all true values are equal.
    """

    mean_absolute_error: float
    root_mean_squared_error: float
    bias: float
    r2: float | None


def confusion_matrix(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix, int64 (C, C): a row for every true class, a column for every predicted class.

    Args:
        predictions: Predicted classes, int64 (N,).
        targets: True classes, int64 (N,).
        num_classes: Number of classes C.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    # The targets and predictions come from a task, which has validated them.
    matrix: Tensor = multiclass_confusion_matrix(predictions, targets, num_classes, validate_args=False)
    return matrix


def most_confused(matrix: Tensor, limit: int) -> list[tuple[int, int, int]]:
    """Return true class, predicted class and count of the most frequent mistakes in a confusion matrix (C, C)."""
    # Correct predictions are on the diagonal.
    mistakes = matrix - torch.diag(matrix.diagonal())
    counts, indices = mistakes.flatten().sort(descending=True, stable=True)
    pairs = zip(counts[:limit].tolist(), indices[:limit].tolist(), strict=True)
    return [(*divmod(index, len(matrix)), count) for count, index in pairs if count]


def calibration(confidences: Tensor, correct: Tensor, num_bins: int = CALIBRATION_BINS) -> Calibration:
    """Return the calibration of probabilities in bins of equal width (Naeini et al. 2015).

    The error equals torchmetrics' ``binary_calibration_error``, which does not return the bins that are drawn here.

    Args:
        confidences: Probabilities of the predictions, float (N,) in [0, 1].
        correct: Whether each prediction is correct, bool (N,).
        num_bins: Number of bins.
    """
    confidences, hits = confidences.double(), correct.double()
    bounds = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    # Bins exclude their lower bound, so a confidence of exactly 0 would have none: clamp puts it into the first.
    index = (torch.bucketize(confidences, bounds) - 1).clamp(0, num_bins - 1)
    counts = torch.bincount(index, minlength=num_bins)
    sums = [torch.bincount(index, weights=values, minlength=num_bins) for values in (confidences, hits)]
    bins = [
        Bin(float(bounds[i]), float(bounds[i + 1]), count, float(sums[0][i]) / count, float(sums[1][i]) / count)
        for i, count in enumerate(counts.tolist())
        if count
    ]
    error = sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / len(confidences)
    return Calibration(tuple(bins), error, float(confidences.mean()), float(hits.mean()))


def residuals(predictions: Tensor, targets: Tensor) -> list[Residuals]:
    """Return the errors of each predicted number.

    Args:
        predictions: Predicted values, float (N, C).
        targets: True values, float (N, C).
    """
    from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error, r2_score

    columns = zip(predictions.double().unbind(1), targets.double().unbind(1), strict=True)
    return [
        Residuals(
            float(mean_absolute_error(predicted, true)),
            float(mean_squared_error(predicted, true, squared=False)),
            float((predicted - true).mean()),
            float(r2_score(predicted, true)) if true.min() < true.max() else None,
        )
        for predicted, true in columns
    ]
