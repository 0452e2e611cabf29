"""Metrics of each class or label on the test split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.data.targets import class_name
from transfer.interfaces import DataSpec, Task
from transfer.storage.predictions import Predictions


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class or one label.

    Args:
        precision: Fraction of the predictions of this class that are correct; None if it was never predicted.
        recall: Fraction of the examples of this class that were predicted as it; None if it has no examples.
        f1: Harmonic mean of precision and recall; None if the class has neither predictions nor examples.
        support: Number of examples of the class.
        predicted: Number of predictions of the class.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


def class_metrics(data: DataSpec, task: Task, scored: Predictions) -> dict[str, ClassMetrics]:
    """Return the metrics of each class or label by name, in order of the outputs; none for other targets.

    Args:
        data: Target and classes of the data.
        task: Task with the lowest probability of a predicted label.
        scored: Stored predictions and targets.
    """
    if predicts_classes(data, scored):
        predictions, targets = scored.predictions.long(), scored.targets.long()
        # A task may have more outputs than the data has classes.
        count = max(len(data.classes), int(predictions.max()) + 1)
        names = [class_name(data.classes, index) for index in range(count)]
        return dict(zip(names, metrics_per_class(predictions, targets, count), strict=True))
    if data.target == "labels" and scored.predictions.shape == scored.targets.shape:
        metrics = metrics_per_label(scored.predictions >= threshold(task), scored.targets > 0.5)
        return dict(zip(data.classes, metrics, strict=True))
    return {}


def predicts_classes(data: DataSpec, scored: Predictions) -> bool:
    """Return whether each example has one class, and the predictions are classes too."""
    predictions = scored.predictions
    if data.target != "class" or predictions.is_floating_point() or predictions.ndim != 1:
        return False
    # A negative number is no class: a task may abstain.
    return int(predictions.min()) >= 0


def threshold(task: Task) -> float:
    """Return the lowest probability at which a label is predicted."""
    return float(getattr(task, "threshold", 0.5))


def metrics_per_class(predictions: Tensor, targets: Tensor, num_classes: int) -> list[ClassMetrics]:
    """Return the metrics of each class.

    Args:
        predictions: Predicted classes, int64 (N,).
        targets: True classes, int64 (N,).
        num_classes: Number of classes C.
    """
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

    columns = [
        metric(predictions, targets, num_classes, average="none", validate_args=False)
        for metric in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    ]
    supports, predicted = (torch.bincount(classes, minlength=num_classes) for classes in (targets, predictions))
    return _class_metrics(columns, supports, predicted)


def metrics_per_label(predictions: Tensor, targets: Tensor) -> list[ClassMetrics]:
    """Return the metrics of each label.

    Args:
        predictions: Whether each label was predicted, bool (N, C).
        targets: Whether each label is true, bool (N, C).
    """
    from torchmetrics.functional.classification import multilabel_f1_score, multilabel_precision, multilabel_recall

    columns = [
        metric(predictions.int(), targets.int(), predictions.shape[1], average="none", validate_args=False)
        for metric in (multilabel_precision, multilabel_recall, multilabel_f1_score)
    ]
    return _class_metrics(columns, targets.sum(0), predictions.sum(0))


def _class_metrics(columns: Iterable[Tensor], supports: Tensor, predicted: Tensor) -> list[ClassMetrics]:
    """Return the rows of the metrics' columns. torchmetrics gives 0 for a quotient by zero; it is None here."""
    rows = zip(*(column.reshape(-1).tolist() for column in (*columns, supports, predicted)), strict=True)
    return [
        ClassMetrics(
            precision if predictions else None,
            recall if support else None,
            f1 if predictions or support else None,
            support,
            predictions,
        )
        for precision, recall, f1, support, predictions in rows
    ]
