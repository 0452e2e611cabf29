"""Metrics of the built-in tasks, which import this module when they need it: torchmetrics takes seconds to import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassStatScores,
    MultilabelStatScores,
)


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


class _QuickUpdate(Metric):
    """A metric whose update takes little time beside a small training step.

    The state is that of torchmetrics, without the true negatives, which neither accuracy nor F1 uses. It is changed in
    place, because Module.__setattr__ is slow.
    """

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        """Count the updates. torchmetrics' wrapper takes longer than the update; it is for gradients of metrics."""

        @functools.wraps(update)
        def counted(*arguments: Tensor) -> None:
            vars(self)["_computed"] = None
            vars(self)["_update_count"] += 1
            update(*arguments)

        return counted


class Accuracy(_QuickUpdate, MulticlassAccuracy):
    """Accuracy over examples."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of classes, int64 (B,)."""
        hits = (predictions == targets).sum()
        misses = len(targets) - hits
        tp, fp, fn = _counts(self)
        tp.add_(hits)
        fp.add_(misses)
        fn.add_(misses)


class MacroF1(_QuickUpdate, MulticlassF1Score):
    """Macro F1 without ``torch.bincount``, whose output size depends on the data: a GPU would wait at every step."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of classes, int64 (B,)."""
        hits = (predictions == targets).long()
        wrong = 1 - hits
        tp, fp, fn = _counts(self)
        tp.index_add_(0, targets, hits)
        fp.index_add_(0, predictions, wrong)
        fn.index_add_(0, targets, wrong)


def _counts(metric: MulticlassStatScores) -> tuple[Tensor, Tensor, Tensor]:
    """Return the true positives, false positives and false negatives of a metric, to be changed."""
    return cast("tuple[Tensor, Tensor, Tensor]", (metric.tp, metric.fp, metric.fn))


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
