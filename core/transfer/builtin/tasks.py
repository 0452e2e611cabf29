"""Tasks for targets of any modality."""

from __future__ import annotations

import functools
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
    MulticlassStatScores,
    MultilabelAccuracy,
    MultilabelStatScores,
)

from transfer.errors import ConfigError
from transfer.interfaces import DataSpec, PrimaryMetric, TargetKind, Task

MAX_CLASSES_SHOWN = 5


class MeanOf(MeanMetric):
    """A metric that is the mean of a function, for custom tasks.

    Args:
        function: Function of (predictions, targets) that returns a float tensor of any shape; the metric is the mean
            over all its elements in all batches.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def update(self, predictions: Tensor, targets: Tensor) -> None:  # type: ignore[override]  # as the engine calls it
        """Add a batch."""
        # Not MeanMetric's own update: it looks for NaN, for which it waits for the device. The engine reports a mean
        # that is not finite.
        values = self._function(predictions, targets).to(self.dtype)
        self.mean_value += values.sum()
        self.weight += values.numel()


MAX_PENDING_BATCHES = 64
"""Number of batches that a metric of classes counts together."""


class _Counts(MulticlassStatScores):
    """A metric of classes that counts many batches at once, so that an update takes no time in a training step.

    The state is that of torchmetrics, without the true negatives, which neither accuracy nor F1 uses. The counts are
    integers, so that they do not depend on the grouping of the batches.
    """

    tp: Tensor
    fp: Tensor
    fn: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        """Count the updates. torchmetrics' wrapper takes longer than the update; it is for gradients of metrics."""

        @functools.wraps(update)
        def counted(*arguments: Tensor) -> None:
            vars(self)["_computed"] = None
            vars(self)["_update_count"] += 1
            update(*arguments)

        return counted

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of classes, int64 (B,)."""
        self._pending.append((predictions, targets))
        if len(self._pending) == MAX_PENDING_BATCHES:
            self._count_pending()

    def compute(self) -> Tensor:
        """Return the metric over all batches."""
        self._count_pending()
        return super().compute()

    def reset(self) -> None:
        """Remove all batches."""
        self._pending.clear()
        super().reset()

    @property
    def metric_state(self) -> dict[str, list[Tensor] | Tensor]:
        """State over all batches, for checkpoints."""
        self._count_pending()
        return super().metric_state

    def _count_pending(self) -> None:
        if self._pending:
            predictions, targets = map(torch.cat, zip(*self._pending, strict=True))
            self._pending.clear()
            self._count(predictions, targets)

    def _count(self, predictions: Tensor, targets: Tensor) -> None:
        raise NotImplementedError


class _Accuracy(_Counts, MulticlassAccuracy):
    """Accuracy over examples."""

    def _count(self, predictions: Tensor, targets: Tensor) -> None:
        hits = (predictions == targets).sum()
        misses = len(targets) - hits
        self.tp.add_(hits)
        self.fp.add_(misses)
        self.fn.add_(misses)


class _MacroF1(_Counts, MulticlassF1Score):
    """Macro F1 without ``torch.bincount``, whose output size depends on the data: a GPU would wait."""

    def _count(self, predictions: Tensor, targets: Tensor) -> None:
        hits = (predictions == targets).long()
        wrong = 1 - hits
        self.tp.index_add_(0, targets, hits)
        self.fp.index_add_(0, predictions, wrong)
        self.fn.index_add_(0, targets, wrong)


class MultilabelMacroF1(MultilabelStatScores):
    """Mean F1 of the labels, without those that have neither examples nor predictions: their F1 is not defined.

    torchmetrics' macro F1 counts such labels as 0, so that a label that is absent from a split lowers the mean.

    Args:
        num_labels: Number of labels.
        threshold: Minimum probability of a predicted label.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, num_labels: int, threshold: float) -> None:
        super().__init__(num_labels, threshold=threshold, average="none", validate_args=False)

    def compute(self) -> Tensor:
        """Return the mean; 0 if no label has examples or predictions."""
        true_positives, false_positives, _, false_negatives, _ = super().compute().unbind(-1)
        counts = 2 * true_positives + false_positives + false_negatives
        f1 = 2 * true_positives / counts.clamp(min=1)
        return f1.sum() / (counts > 0).sum().clamp(min=1)


class Classification(Task):
    """Classification with one class per example: softmax cross-entropy; accuracy selects the best epoch.

    Args:
        label_smoothing: Fraction of the target that is distributed over all classes (Szegedy et al. 2016).
        class_weights: Weight of each class in the loss: a number by class name, or "balanced" for weights inverse to
            the class's frequency in the training split, with a mean of 1 over its examples.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"class"})
    primary_metric = PrimaryMetric("accuracy", higher_is_better=True)
    has_convex_loss = True

    def __init__(
        self,
        data: DataSpec,
        *,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None,
    ) -> None:
        self.classes = data.classes
        self.label_smoothing = label_smoothing
        self.balanced = class_weights == "balanced"
        self.weights: Tensor | None = None
        if isinstance(class_weights, dict):
            if data.placeholders:
                self.classes = tuple(class_weights)  # compared with the names of the data when it is read
            if set(class_weights) != set(self.classes):
                raise ConfigError(
                    f"class_weights names other classes: expected {sorted(self.classes)}, got {sorted(class_weights)}",
                    available=self.classes,
                    fix="give a weight for every class",
                )
            self.weights = torch.tensor([class_weights[name] for name in self.classes])
        self.out_features = len(self.classes)

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """Compute balanced weights from the classes of the training split."""
        if self.balanced:
            counts = np.bincount(targets, minlength=self.out_features)
            # A class without training examples has no weight: it does not occur in the loss.
            weights = np.where(counts > 0, len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)
            self.weights = torch.tensor(weights, dtype=torch.float32)

    def state(self) -> dict[str, Any]:
        """Return the balanced weights."""
        return {"class_weights": self.weights.tolist()} if self.balanced and self.weights is not None else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the balanced weights, so that an evaluation has the loss of the training."""
        if self.balanced and "class_weights" in state:
            self.weights = _numbers(state, "class_weights", self.out_features)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy in nats, float (B,) of logits (B, C) and int64 targets (B,), weighted by class."""
        losses = F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing, reduction="none")
        # Without non_blocking, the copy of the weights would wait for the device at every step.
        return losses if self.weights is None else losses * self.weights.to(outputs.device, non_blocking=True)[targets]

    def metrics(self) -> Mapping[str, Metric]:
        """Return accuracy over examples, and the unweighted mean of the classes' F1."""
        classes = self.out_features
        return {
            "accuracy": _Accuracy(classes, average="micro", validate_args=False),
            "f1_macro": _MacroF1(classes, average="macro", validate_args=False),
        }

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the most probable classes, int64 (B,)."""
        return outputs.argmax(dim=1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the probability of each class, float32 (B, C)."""
        return outputs.float().softmax(dim=1)

    def explained_output(self, scores: Tensor) -> int:
        """Return the index of the most probable class."""
        return int(scores.argmax())

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return the most probable class of each row, and the probabilities of the top classes."""
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
    """Multi-label classification: sigmoid cross-entropy, averaged over labels; macro F1 selects the best epoch.

    Args:
        threshold: Minimum probability of a predicted label.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"labels"})
    primary_metric = PrimaryMetric("f1_macro", higher_is_better=True)
    has_convex_loss = True

    def __init__(self, data: DataSpec, *, threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5) -> None:
        self.classes = data.classes
        self.out_features = len(data.classes)
        self.threshold = threshold

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross-entropy in nats, float (B,), of logits (B, C) and targets (B, C)."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(dim=1)

    def metrics(self) -> Mapping[str, Metric]:
        """Return mean F1 over the labels with examples or predictions, and mean accuracy over all labels."""
        count, threshold = self.out_features, self.threshold
        return {
            "f1_macro": MultilabelMacroF1(count, threshold),
            "accuracy": MultilabelAccuracy(count, threshold=threshold, average="macro", validate_args=False),
        }

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the probabilities, float (B, C)."""
        return outputs.sigmoid()

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the probability of each label, float32 (B, C)."""
        return outputs.float().sigmoid()

    def explained_output(self, scores: Tensor) -> int:
        """Return the index of the most probable label."""
        return int(scores.argmax())

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return the labels with at least the threshold's probability, and the probability of every label."""
        rows = []
        for row in self.scores(outputs).tolist():
            probabilities = dict(zip(self.classes, row, strict=True))
            labels = [name for name, p in probabilities.items() if p >= self.threshold]
            rows.append({"labels": labels, "probabilities": probabilities})
        return rows


class Regression(Task):
    """Regression of one or more numbers per example; mean absolute error selects the best epoch.

    Args:
        loss: Squared error, absolute error, or Huber's (1964), which is squared near zero and absolute beyond it.
        standardize: Whether the loss is computed on targets with a mean of 0 and a standard deviation of 1 over the
            training split. Predictions and metrics keep the units of the targets.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"number"})
    primary_metric = PrimaryMetric("mean_absolute_error", higher_is_better=False)

    def __init__(
        self,
        data: DataSpec,
        *,
        loss: Literal["squared", "absolute", "huber"] = "squared",
        standardize: bool = True,
    ) -> None:
        self.names = data.classes
        self.out_features = len(data.classes)
        self.kind = loss
        self.has_convex_loss = loss != "absolute"  # which has no derivative at zero
        self.standardize = standardize
        # Mean and standard deviation of each number in the training split, (C,); None leaves outputs as they are.
        self.scaling: tuple[Tensor, Tensor] | None = None

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """Compute mean and standard deviation of each number in the training split."""
        if self.standardize:
            mean, deviation = targets.mean(0, dtype=np.float64), targets.std(0, dtype=np.float64)
            # A number that is the same in all examples is not scaled: rounding may give it a tiny deviation.
            deviation[targets.min(0) == targets.max(0)] = 1.0
            self.scaling = torch.tensor(mean, dtype=torch.float32), torch.tensor(deviation, dtype=torch.float32)

    def state(self) -> dict[str, Any]:
        """Return mean and standard deviation of each number in the training split."""
        return (
            {} if self.scaling is None else dict(zip(("mean", "deviation"), map(_as_list, self.scaling), strict=True))
        )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore mean and standard deviation; older versions trained on the numbers as they are."""
        if state:
            mean, deviation = (_numbers(state, name, self.out_features) for name in ("mean", "deviation"))
            if not bool((deviation > 0).all()):
                raise ValueError(f"the standard deviations are wrong: expected positive numbers, got {deviation}")
            self.scaling = mean, deviation

    def output_scaling(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation: the head predicts standardized numbers."""
        return self.scaling

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the standardized error, averaged over the numbers, float (B,), of outputs and targets (B, C)."""
        # The mean cancels out in the difference, in which large numbers lose no digits.
        errors = outputs - targets.to(outputs.dtype)
        if self.scaling is not None:
            errors = errors / self.scaling[1].to(outputs.device, non_blocking=True)  # without waiting for the device
        functions: dict[str, Callable[..., Tensor]]
        functions = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.huber_loss}
        return functions[self.kind](errors, torch.zeros_like(errors), reduction="none").mean(dim=1)

    def metrics(self) -> Mapping[str, Metric]:
        """Return mean absolute and mean squared error, in the units of the targets and their square."""
        return {"mean_absolute_error": MeanAbsoluteError(), "mean_squared_error": MeanSquaredError()}

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return the predicted numbers by name."""
        return [dict(zip(self.names, row, strict=True)) for row in outputs.float().tolist()]


def _numbers(state: Mapping[str, Any], name: str, count: int) -> Tensor:
    """Return saved numbers as float32 (count,).

    Raises:
        ValueError: They are missing, not finite, or have another length.
    """
    values = state.get(name)
    if isinstance(values, list) and len(values) == count and all(type(value) in (int, float) for value in values):
        numbers = torch.tensor(values, dtype=torch.float32)
        if bool(numbers.isfinite().all()):
            return numbers
    raise ValueError(f"{name} of the task is wrong: expected {count} finite numbers, got {values!r:.60}")


def _as_list(numbers: Tensor) -> list[float]:
    values: list[float] = numbers.tolist()
    return values
