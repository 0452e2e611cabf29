"""Selection of the epoch whose weights are kept, by metrics of the validation split."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transfer.config.torch_metrics import metric_direction
from transfer.errors import ConfigError
from transfer.interfaces import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

LAST = "last"
GROUPS = 40
"""Number of groups of examples that are left out in turn to estimate a standard error."""
MAX_EXAMPLES = 20_000
"""Number of examples for the estimate; more are sampled evenly, because each is used in almost all groups."""
FEW_EXAMPLES = 100
"""Number of validation examples below which a run warns: an accuracy has a standard error of up to 0.05."""

Record = Mapping[str, Any]
"""A line of ``metrics.jsonl``."""


@dataclass(frozen=True)
class Selection:
    """The rule that selects the best epoch.

    Epochs whose metric differs from the highest one by at most one standard error cannot be told apart on this
    validation split. Among them the loss decides, which varies less than an accuracy over a few examples.

    Args:
        metric: Name of the metric, or ``loss``.
        higher_is_better: Whether a higher value is better.
        keeps_last: Whether the last epoch is selected, and the metric is only observed for early stopping.
    """

    metric: str
    higher_is_better: bool
    keeps_last: bool = False

    @classmethod
    def of(cls, task: Task, select: str | None) -> Selection:
        """Return the rule of ``train.select``.

        Args:
            task: Task with its metrics.
            select: ``loss``, ``last`` or the name of a metric; None selects the task's primary metric.

        Raises:
            ConfigError: The metric is unknown, or does not declare its direction.
        """
        primary = task.primary_metric
        if select in (None, LAST, primary.name):
            return cls(primary.name, primary.higher_is_better, select == LAST)
        if select == "loss":
            return cls("loss", higher_is_better=False)
        metrics = task.metrics()
        if select not in metrics:
            names = ("loss", *metrics, LAST)
            raise ConfigError(f"train.select is wrong: unknown metric {select!r}", available=names, fix="choose one")
        return cls(str(select), metric_direction(metrics, str(select)))

    def is_better(self, records: Sequence[Record], best_epoch: int) -> bool:
        """Return whether the last of some epochs is better than the best one before it.

        Only weights of these two exist. The one that is kept is always within one standard error of the highest metric
        so far, so that a metric that falls slowly cannot move the selection away from it.

        Args:
            records: Records of the epochs, the last one included.
            best_epoch: Number of the best epoch before the last.
        """
        new, best = records[-1], next(record for record in records if record["epoch"] == best_epoch)
        highest = max(records, key=self.value)
        if not self._is_close(best, highest):
            return True  # only the last epoch can have raised the highest value
        lower_loss: bool = new["validation"]["loss"] < best["validation"]["loss"]
        return self._is_close(new, highest) and lower_loss

    def value(self, record: Record) -> float:
        """Return the metric of an epoch with the sign that makes a higher value better."""
        value: float = record["validation"][self.metric]
        return value if self.higher_is_better else -value

    def _is_close(self, record: Record, highest: Record) -> bool:
        # Records of older versions have no standard error: only equal values are close.
        error: float = max(one.get("standard_error", 0.0) for one in (record, highest))
        return self.value(highest) - self.value(record) <= error


class MetricSample:
    """Inputs of a metric over a split, collected on the device, for the standard error of the metric.

    Args:
        name: Name of the metric.
        metric: Metric on the device of the inputs; its state is overwritten.
    """

    def __init__(self, name: str, metric: Metric) -> None:
        self.name = name
        self._metric = metric
        self._batches: list[tuple[Tensor, Tensor]] = []

    def append(self, inputs: Tensor, targets: Tensor) -> None:
        """Append a batch, (B, ...) each."""
        self._batches.append((inputs, targets))

    def facts(self) -> dict[str, Any]:
        """Return ``standard_error`` and, if all examples have the same input, ``constant_prediction``, as JSON values.

        The latter is the index of a class, or true for other inputs.
        """
        facts: dict[str, Any] = {"standard_error": self.standard_error()}
        inputs = torch.cat([inputs for inputs, _ in self._batches])
        if len(inputs) > 1 and bool((inputs == inputs[0]).all()):
            is_class = inputs.ndim == 1 and not inputs.is_floating_point()
            facts["constant_prediction"] = int(inputs[0]) if is_class else True
        return facts

    def standard_error(self) -> float:
        """Return the standard error of the metric that is due to the choice of examples; 0 if it cannot be estimated.

        It is the jackknife estimate over groups of examples (Efron and Tibshirani 1993, chapter 11), which needs only
        the value of the metric without each group and thus works for any metric.
        """
        inputs, targets = (torch.cat(column) for column in zip(*self._batches, strict=True))
        step = -(-len(targets) // MAX_EXAMPLES)
        fraction, inputs, targets = len(targets) / len(targets[::step]), inputs[::step], targets[::step]
        groups = min(GROUPS, len(targets))
        group = torch.arange(len(targets)) % groups
        values = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a metric may warn that a class is missing without a group
                for left_out in range(groups if groups > 1 else 0):
                    rest = torch.nonzero(group != left_out).squeeze(1).to(targets.device)
                    self._metric.reset()
                    self._metric.update(inputs[rest], targets[rest])
                    values.append(float(self._metric.compute()))
        except (ValueError, RuntimeError):  # the metric is not defined without some group
            return 0.0
        finally:
            self._metric.reset()
        if not values or not all(map(math.isfinite, values)):
            return 0.0
        mean = sum(values) / groups
        variance = (groups - 1) / groups * sum((value - mean) ** 2 for value in values)
        return math.sqrt(variance / fraction)
