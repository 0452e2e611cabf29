"""The tasks that need no modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelF1Score,
)

from transfer.errors import ConfigError
from transfer.interfaces import DataSpec, PrimaryMetric, TargetKind, Task

MAX_CLASSES_SHOWN = 5


class MeanOf(MeanMetric):
    """A metric that is the mean of a function, for tasks of one's own.

    Args:
        function: Returns a float tensor of (predictions, targets), of any shape: the mean of all its numbers is taken.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def update(self, predictions: Tensor, targets: Tensor) -> None:  # type: ignore[override]  # as the engine calls it
        """See a batch."""
        super().update(self._function(predictions, targets))


class Classification(Task):
    """One class per example: softmax cross-entropy; accuracy picks the best epoch.

    Args:
        label_smoothing: Share of the target that is spread over all classes (Szegedy et al. 2016).
        class_weights: What an example of a class counts in the loss: a number for each class by name, or "balanced"
            for weights inverse to the class's frequency in the training split, with a mean of 1 over its examples.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"class"})
    primary_metric = PrimaryMetric("accuracy", higher_is_better=True)

    def __init__(
        self,
        data: DataSpec,
        *,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None,
    ) -> None:
        self.classes = data.classes
        self.out_features = len(data.classes)
        self.label_smoothing = label_smoothing
        self.balanced = class_weights == "balanced"
        self.weights: Tensor | None = None
        if isinstance(class_weights, dict):
            if self.classes and set(class_weights) != set(self.classes):
                raise ConfigError(
                    f"class_weights names {sorted(class_weights)}, and the classes are {sorted(self.classes)}",
                    available=self.classes,
                    fix="give a weight for every class",
                )
            self.weights = torch.tensor([class_weights[name] for name in self.classes or class_weights])

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """Count the classes of the training split, for balanced weights."""
        if self.balanced:
            counts = np.bincount(targets, minlength=self.out_features)
            # A class that the training split lacks gets no weight: it cannot occur in the loss.
            weights = np.where(counts > 0, len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)
            self.weights = torch.tensor(weights, dtype=torch.float32)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (B,) cross-entropy in nats, times the class's weight, of logits (B, C) and int64 targets (B,)."""
        losses = F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing, reduction="none")
        return losses if self.weights is None else losses * self.weights.to(outputs.device)[targets]

    def metrics(self) -> Mapping[str, Metric]:
        """Accuracy over examples, and the unweighted mean of the classes' F1."""
        classes = self.out_features
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "f1_macro": MulticlassF1Score(classes, average="macro", validate_args=False),
        }

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return int64 (B,) most probable classes."""
        return outputs.argmax(dim=1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the probability of each class, float32 (B, C)."""
        return outputs.float().softmax(dim=1)

    def explained_output(self, scores: Tensor) -> int:
        """Return the most probable class."""
        return int(scores.argmax())

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Name the most probable class of each row, with its probability and that of the nearest others."""
        rows = []
        for row in self.scores(outputs).tolist():
            ranked = sorted(zip(row, self.classes, strict=True), reverse=True)
            rows.append(
                {
                    "label": ranked[0][1],
                    "probability": ranked[0][0],
                    "probabilities": {name: p for p, name in ranked[:MAX_CLASSES_SHOWN]},
                }
            )
        return rows


class MultiLabel(Task):
    """Any number of labels per example: sigmoid cross-entropy, mean over labels; macro F1 picks the best epoch.

    Args:
        threshold: Probability from which a label counts as predicted.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"labels"})
    primary_metric = PrimaryMetric("f1_macro", higher_is_better=True)

    def __init__(self, data: DataSpec, *, threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5) -> None:
        self.classes = data.classes
        self.out_features = len(data.classes)
        self.threshold = threshold

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (B,) mean binary cross-entropy in nats of logits (B, C) and float targets (B, C) of zeros and ones."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(dim=1)

    def metrics(self) -> Mapping[str, Metric]:
        """Mean F1 and mean accuracy over the labels."""
        count, threshold = self.out_features, self.threshold
        return {
            "f1_macro": MultilabelF1Score(count, threshold=threshold, average="macro", validate_args=False),
            "accuracy": MultilabelAccuracy(count, threshold=threshold, average="macro", validate_args=False),
        }

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return float (B, C) probabilities."""
        return outputs.sigmoid()

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the probability of each label, float32 (B, C)."""
        return outputs.float().sigmoid()

    def explained_output(self, scores: Tensor) -> int:
        """Return the most probable label."""
        return int(scores.argmax())

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """List the labels at or over the threshold, and every label's probability."""
        rows = []
        for row in self.scores(outputs).tolist():
            probabilities = dict(zip(self.classes, row, strict=True))
            labels = [name for name, p in probabilities.items() if p >= self.threshold]
            rows.append({"labels": labels, "probabilities": probabilities})
        return rows


class Regression(Task):
    """One or more numbers per example; mean absolute error picks the best epoch.

    Args:
        loss: Squared error, absolute error, or Huber's (1964) between the two.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"number"})
    primary_metric = PrimaryMetric("mean_absolute_error", higher_is_better=False)

    def __init__(
        self,
        data: DataSpec,
        *,
        loss: Literal["squared", "absolute", "huber"] = "squared",
    ) -> None:
        self.names = data.classes
        self.out_features = len(data.classes)
        self.kind = loss

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (B,) error, mean over the numbers, of outputs and float targets (B, C)."""
        functions: dict[str, Callable[..., Tensor]]
        functions = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.huber_loss}
        return functions[self.kind](outputs, targets.to(outputs.dtype), reduction="none").mean(dim=1)

    def metrics(self) -> Mapping[str, Metric]:
        """Mean absolute and mean squared error, in the targets' own units and their square."""
        return {"mean_absolute_error": MeanAbsoluteError(), "mean_squared_error": MeanSquaredError()}

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Name the numbers."""
        return [dict(zip(self.names, row, strict=True)) for row in outputs.float().tolist()]
