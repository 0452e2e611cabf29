"""Metrics of the built-in tasks, which import this module when they need it: torchmetrics takes seconds to import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassStatScores,
    MultilabelStatScores,
)

MAX_PENDING_BATCHES = 64
"""Number of batches that a metric of classes counts together."""


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


class Accuracy(_Counts, MulticlassAccuracy):
    """Accuracy over examples."""

    def _count(self, predictions: Tensor, targets: Tensor) -> None:
        hits = (predictions == targets).sum()
        misses = len(targets) - hits
        self.tp.add_(hits)
        self.fp.add_(misses)
        self.fn.add_(misses)


class MacroF1(_Counts, MulticlassF1Score):
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
