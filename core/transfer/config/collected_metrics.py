"""Metrics of torchmetrics that are updated with many batches at once. Imports torchmetrics, which takes seconds."""

from __future__ import annotations

import re
import warnings
from functools import cache

import torch
from torch import Tensor
from torchmetrics import Metric

MAX_PENDING_BATCHES = 64
MAX_PENDING_BYTES = 64 * 2**20
"""Limits of the batches that are collected before they are added to a metric."""

# torchmetrics leaves these directions open.
_DIRECTIONS = {
    **dict.fromkeys(("NegativePredictiveValue", "Specificity", "PearsonCorrCoef", "KendallRankCorrCoef"), True),
    "TweedieDevianceScore": False,
}


class CollectedMetric(Metric):
    """A metric that is updated with many batches at once, from scores (B, C) and targets.

    Most updates of torchmetrics wait for the device, because the size of an intermediate result depends on the data.
    Batches are therefore collected on the device, and added to the metric when there are many.

    Args:
        metric: Metric of torchmetrics.
        classes: Number of classes, if the metric returns one value for each class: those of classes without positive or
            without negative examples are left out of the mean. None if the metric returns one number.
    """

    full_state_update = False

    scores: list[Tensor]
    targets: list[Tensor]
    positives: Tensor
    examples: Tensor

    def __init__(self, metric: Metric, classes: int | None = None) -> None:
        super().__init__()
        self.metric = metric
        self._averages = classes is not None
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")
        if classes is not None:
            self.add_state("positives", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state("examples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.scores.append(scores)
        self.targets.append(targets)
        if self._averages:
            # One-hot by comparison: its size does not depend on the data.
            classes = torch.arange(len(self.positives), device=targets.device)
            positives = targets[:, None] == classes if targets.ndim == 1 else targets > 0
            self.positives += positives.sum(0)
            self.examples += len(targets)
        if len(self.scores) >= MAX_PENDING_BATCHES or sum(map(_bytes, self.scores)) >= MAX_PENDING_BYTES:
            self._add_pending(self.metric)
            self.scores.clear()
            self.targets.clear()

    def compute(self) -> Tensor:
        """Return the metric over all batches as one number."""
        # Computed by a copy: float sums depend on the grouping of the batches, and this may be called at any time.
        metric = self.metric.clone()
        self._add_pending(metric)
        with warnings.catch_warnings(action="ignore"):  # about absent classes, which are left out here
            value: Tensor = metric.compute()
        if self._averages:
            defined = (self.positives > 0) & (self.positives < self.examples)
            return torch.where(defined, value, 0).sum() / defined.sum().clamp(min=1)
        return value

    def reset(self) -> None:
        """Remove all batches."""
        super().reset()
        self.metric.reset()

    def _add_pending(self, metric: Metric) -> None:
        if self.scores:
            metric.update(*self._inputs(torch.cat(self.scores), torch.cat(self.targets)))

    def _inputs(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and targets as the metric takes them."""
        return scores, targets.long()  # labels are float32


class CollectedRegressionMetric(CollectedMetric):
    """A metric of numbers (B, C): the mean over the C numbers, if the metric returns one value for each."""

    def _inputs(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # torchmetrics takes (B,) for one number.
        return (scores[:, 0], targets[:, 0]) if scores.shape[1:] == (1,) else (scores, targets)

    def compute(self) -> Tensor:
        """Return the metric over all batches, averaged over the numbers."""
        return super().compute().mean()


@cache
def collected_metric(cls: type[Metric]) -> type[CollectedMetric]:
    """Return the class that collects batches for a metric, with the direction and the bounds of the metric.

    torchmetrics reads these attributes from the class and forbids to set them on an object.
    """
    base = CollectedRegressionMetric if cls.__module__.startswith("torchmetrics.regression") else CollectedMetric
    short = re.sub(r"^Multi(class|label)", "", cls.__name__)
    bounds = {name: getattr(cls, name, None) for name in ("plot_lower_bound", "plot_upper_bound")}
    direction = _DIRECTIONS.get(short, cls.higher_is_better)
    return type(f"Collected{cls.__name__}", (base,), {"higher_is_better": direction, **bounds})


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
