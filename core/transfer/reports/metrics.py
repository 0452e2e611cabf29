"""What a test score is made of: confusion, figures of each class, calibration, residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15
"""Of a reliability diagram (Guo et al. 2017)."""


@dataclass(frozen=True)
class ClassFigures:
    """How one class, or one label, fares.

    Args:
        precision: Of those predicted, the share that is right; None where none was predicted.
        recall: Of those there are, the share that was found; None where there are none.
        f1: Their harmonic mean; None where there is neither.
        support: How many there are.
        predicted: How many were predicted.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


@dataclass(frozen=True)
class Bin:
    """The predictions of like confidence.

    Args:
        low, high: The confidences that it holds, low left out.
        count: How many predictions there are.
        confidence: Their mean confidence.
        right: The share that is right.
    """

    low: float
    high: float
    count: int
    confidence: float
    right: float

    @property
    def standard_error(self) -> float:
        """Of the share that is right, over examples; by Laplace's estimate, which is not zero where all are right."""
        share = (self.right * self.count + 1) / (self.count + 2)
        return float((share * (1 - share) / (self.count + 2)) ** 0.5)


@dataclass(frozen=True)
class Calibration:
    """Whether predictions are right as often as their probabilities say.

    Args:
        bins: Those that hold predictions.
        error: The expected calibration error: the mean distance of confidence and share right, weighed by count.
        confidence: Mean over all.
        right: Share of all.
    """

    bins: tuple[Bin, ...]
    error: float
    confidence: float
    right: float


@dataclass(frozen=True)
class Residuals:
    """How one number is missed.

    Args:
        mean_absolute, root_mean_square: Of the errors.
        bias: Mean of predicted less true.
        explained: Share of the variance that is explained, R²; None where the true values are all alike.
    """

    mean_absolute: float
    root_mean_square: float
    bias: float
    explained: float | None


def confusion(predictions: Tensor, targets: Tensor, count: int) -> Tensor:
    """Return how often each class was taken for each, int64 (C, C): a row for every true class.

    Args:
        predictions: int64 (N,).
        targets: int64 (N,).
        count: C.
    """
    return torch.bincount(targets * count + predictions, minlength=count * count).reshape(count, count)


def of_classes(matrix: Tensor) -> list[ClassFigures]:
    """Return the figures of each class of a confusion matrix (C, C)."""
    right, predicted, there = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    return [_figures(*counts) for counts in zip(right.tolist(), predicted.tolist(), there.tolist(), strict=True)]


def of_labels(said: Tensor, there: Tensor) -> list[ClassFigures]:
    """Return the figures of each label, given which were predicted and which are there, bool (N, C) both."""
    counts = ((said & there).sum(0), said.sum(0), there.sum(0))
    return [_figures(*label) for label in zip(*(count.tolist() for count in counts), strict=True)]


def most_confused(matrix: Tensor, most: int) -> list[tuple[int, int, int]]:
    """Return true class, predicted class and count of the most frequent mistakes."""
    wrong = matrix - torch.diag(matrix.diagonal())
    counts, places = wrong.flatten().sort(descending=True, stable=True)
    pairs = zip(counts[:most].tolist(), places[:most].tolist(), strict=True)
    return [(*divmod(place, len(matrix)), count) for count, place in pairs if count]


def calibrate(confidences: Tensor, right: Tensor, bins: int = BINS) -> Calibration:
    """Compare probabilities to what came true (Naeini et al. 2015), in bins of equal width.

    Args:
        confidences: float (N,) in [0, 1].
        right: bool (N,), what came true.
        bins: How many there are.
    """
    confidences, hits = confidences.double(), right.double()
    bounds = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = (torch.bucketize(confidences, bounds) - 1).clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=values, minlength=bins) for values in (confidences, hits)]
    held = [
        Bin(float(bounds[i]), float(bounds[i + 1]), count, float(sums[0][i]) / count, float(sums[1][i]) / count)
        for i, count in enumerate(counts.tolist())
        if count
    ]
    error = sum(one.count * abs(one.confidence - one.right) for one in held) / len(confidences)
    return Calibration(tuple(held), error, float(confidences.mean()), float(hits.mean()))


def residuals(predictions: Tensor, targets: Tensor) -> list[Residuals]:
    """Return how each number is missed, of float (N, C) both."""
    errors, targets = (predictions - targets).double(), targets.double()
    squares, spread = errors.square().mean(0), targets.var(0, correction=0)
    columns: Sequence[list[float]] = [errors.abs().mean(0).tolist(), squares.tolist(), errors.mean(0).tolist()]
    return [
        Residuals(absolute, square**0.5, bias, 1 - square / variance if variance else None)
        for absolute, square, bias, variance in zip(*columns, spread.tolist(), strict=True)
    ]


def _figures(right: int, predicted: int, there: int) -> ClassFigures:
    precision = right / predicted if predicted else None
    recall = right / there if there else None
    f1 = 2 * right / (predicted + there) if predicted + there else None
    return ClassFigures(precision, recall, f1, there, predicted)
