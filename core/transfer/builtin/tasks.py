"""Tasks for targets of any modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from transfer.config.option_schema import Block
from transfer.errors import ConfigError
from transfer.interfaces import DataSpec, PrimaryMetric, TargetKind, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

MAX_CLASSES_SHOWN = 5
FOCAL_GAMMA = 2.0
"""Exponent of the focal loss in its paper, and of a config that sets none."""

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Focal(Block):
    """The focal loss, in which well classified examples count less (Lin et al. 2017, ICCV).

    Args:
        name: Name of the loss, focal.
        gamma: Exponent of the factor ``(1 - p) ** gamma`` of an example, where p is the probability of its target. 0 is
            the cross-entropy.
    """

    name: Literal["focal"]
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = FOCAL_GAMMA


CrossEntropyLoss = Literal["cross_entropy", "focal"] | Focal


class Classification(Task):
    """Classification with one class per example: softmax cross-entropy; accuracy selects the best epoch.

    Args:
        label_smoothing: Fraction of the target that is distributed over all classes (Szegedy et al. 2016).
        class_weights: Weight of each class in the loss: a number by class name, or "balanced" for weights inverse to
            the class's frequency in the training split, with a mean of 1 over its examples.
        loss: cross_entropy, or focal, in which well classified examples count less: ``{name: focal, gamma: 2}``.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"class"})
    primary_metric = PrimaryMetric("accuracy", higher_is_better=True)

    def __init__(
        self,
        data: DataSpec,
        *,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_weights: Literal["balanced"] | dict[str, Weight] | None = None,
        loss: CrossEntropyLoss = "cross_entropy",
    ) -> None:
        self.classes = data.classes
        self.label_smoothing = label_smoothing
        self.gamma = _gamma(loss)
        self.has_convex_loss = not self.gamma
        self.balanced = class_weights == "balanced"
        self.weights: Tensor | None = None
        if isinstance(class_weights, dict):
            self.classes, self.weights = _weights_by_name("class_weights", class_weights, data)
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
        if self.gamma:
            # The factor depends on the probability of the target, which smoothing must not change.
            surprise = F.cross_entropy(outputs, targets, reduction="none") if self.label_smoothing else losses
            losses = losses * _focal_factor(surprise, self.gamma)
        # Without non_blocking, the copy of the weights would wait for the device at every step.
        return losses if self.weights is None else losses * self.weights.to(outputs.device, non_blocking=True)[targets]

    def metrics(self) -> Mapping[str, Metric]:
        """Return accuracy over examples, and the unweighted mean of the classes' F1."""
        from transfer.builtin.metrics import Accuracy, MacroF1

        classes = self.out_features
        return {
            "accuracy": Accuracy(classes, average="micro", validate_args=False),
            "f1_macro": MacroF1(classes, average="macro", validate_args=False),
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
        pos_weight: Weight of the examples with a label in the loss of that label: a number by label, or "balanced" for
            the number of training examples without the label divided by the number of those with it.
        loss: cross_entropy, or focal, in which well classified labels count less: ``{name: focal, gamma: 2}``.
    """

    targets: ClassVar[frozenset[TargetKind]] = frozenset({"labels"})
    primary_metric = PrimaryMetric("f1_macro", higher_is_better=True)

    def __init__(
        self,
        data: DataSpec,
        *,
        threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        pos_weight: Literal["balanced"] | dict[str, Weight] | None = None,
        loss: CrossEntropyLoss = "cross_entropy",
    ) -> None:
        self.classes = data.classes
        self.threshold = threshold
        self.gamma = _gamma(loss)
        self.has_convex_loss = not self.gamma
        self.balanced = pos_weight == "balanced"
        self.weights: Tensor | None = None
        if isinstance(pos_weight, dict):
            self.classes, self.weights = _weights_by_name("pos_weight", pos_weight, data)
        self.out_features = len(self.classes)

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """Compute balanced weights from the labels of the training split."""
        if self.balanced:
            positive = np.count_nonzero(targets, axis=0)
            # A label that all examples have, or none, gets no weight: there is nothing to balance.
            weights = np.where(positive % len(targets), (len(targets) - positive) / np.maximum(positive, 1), 1.0)
            self.weights = torch.tensor(weights, dtype=torch.float32)

    def state(self) -> dict[str, Any]:
        """Return the balanced weights."""
        return {"pos_weight": self.weights.tolist()} if self.balanced and self.weights is not None else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the balanced weights, so that an evaluation has the loss of the training."""
        if self.balanced and "pos_weight" in state:
            self.weights = _numbers(state, "pos_weight", self.out_features)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross-entropy in nats, float (B,), of logits (B, C) and targets (B, C)."""
        targets = targets.to(outputs.dtype)
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        if self.gamma:
            losses = losses * _focal_factor(losses, self.gamma)
        if self.weights is not None:
            # As torch's pos_weight: 1 for absent labels. Without non_blocking, the copy would wait for the device.
            losses = losses * (1 + (self.weights.to(outputs.device, non_blocking=True) - 1) * targets)
        return losses.mean(dim=1)

    def metrics(self) -> Mapping[str, Metric]:
        """Return mean F1 over the labels with examples or predictions, and mean accuracy over all labels."""
        from torchmetrics.classification import MultilabelAccuracy

        from transfer.builtin.metrics import MultilabelMacroF1

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
        from torchmetrics import MeanAbsoluteError, MeanSquaredError

        return {"mean_absolute_error": MeanAbsoluteError(), "mean_squared_error": MeanSquaredError()}

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return the predicted numbers by name."""
        return [dict(zip(self.names, row, strict=True)) for row in outputs.float().tolist()]


def _gamma(loss: CrossEntropyLoss) -> float:
    """Return the exponent of the focal loss; 0 for the cross-entropy."""
    if isinstance(loss, Focal):
        return loss.gamma
    return FOCAL_GAMMA if loss == "focal" else 0.0


def _focal_factor(surprise: Tensor, gamma: float) -> Tensor:
    """Return ``(1 - p) ** gamma`` of targets with the negative log-probabilities ``surprise`` (of any shape)."""
    # Above zero, because the derivative of the power is infinite at zero if gamma is less than 1.
    return (-torch.expm1(-surprise)).clamp(min=1e-7) ** gamma


def _weights_by_name(option: str, weights: Mapping[str, float], data: DataSpec) -> tuple[tuple[str, ...], Tensor]:
    """Return the classes and their weights, float32 (C,), in the order of the classes.

    Raises:
        ConfigError: A class has no weight, or a weight has no class.
    """
    # Classes that are not known yet are compared with the names of the data when it is read.
    classes = tuple(weights) if data.placeholders else data.classes
    if set(weights) != set(classes):
        raise ConfigError(
            f"{option} names other classes: expected {sorted(classes)}, got {sorted(weights)}",
            available=classes,
            fix="give a weight for every class",
        )
    return classes, torch.tensor([weights[name] for name in classes])


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
