"""Loss and metrics of a split, in eval mode."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.config.train_settings import Precision
from transfer.errors import TrainingError
from transfer.feature_cache.loader import StageInputs
from transfer.interfaces import Split, Task
from transfer.models.forward import forward_batches
from transfer.models.model import Model
from transfer.storage.predictions import Predictions
from transfer.system.signals import Signals
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup
from transfer.training.events import EvaluationStarted, EvaluationStep, Observer
from transfer.training.parallel import MetricMessages
from transfer.training.selection import MetricSample, Selection
from transfer.training.state import named_metrics

if TYPE_CHECKING:
    from torchmetrics import Metric

PREDICTIONS = ""
"""Key of the predictions among the inputs of the metrics; no metric has this name."""


class PredictionCollector:
    """Predictions, targets, losses and scores of a split, collected batch by batch on the CPU."""

    def __init__(self) -> None:
        self._indices: list[npt.NDArray[np.int64]] = []
        self._batches: list[tuple[Tensor, ...]] = []

    def append(self, indices: npt.NDArray[np.int64], *tensors: Tensor) -> None:
        """Append a batch: the indices of its examples, and predictions, targets, losses and scores, (B, ...) each."""
        self._indices.append(indices)
        # From CUDA, copied to pinned memory without waiting for the device.
        self._batches.append(tuple(tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors))

    def in_order_of(self, split: Split) -> Predictions:
        """Return all batches in the order of their split; buckets by length permute the examples."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies may not have ended
        order = torch.from_numpy(np.concatenate(self._indices)).argsort()
        columns = (torch.cat(tensors)[order] for tensors in zip(*self._batches, strict=True))
        predictions, targets, losses, scores = columns
        # Probabilities of labels and predicted numbers are their own scores, which are stored once.
        are_scores = scores.dtype == predictions.dtype and torch.equal(scores, predictions)
        names = tuple(split.name(index) for index in range(len(split))) if len(split.names) else ()
        return Predictions(predictions, targets, losses, scores.amax(1), None if are_scores else scores, names)


def evaluate(
    model: Model,
    task: Task,
    source: StageInputs,
    precision: Precision,
    observe: Observer,
    split: str,
    max_batches: int | None = None,
    *,
    collector: PredictionCollector | None = None,
    sample: MetricSample | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    signals: Signals | None = None,
) -> dict[str, float]:
    """Return the mean loss and the metrics of a split, computed in eval mode and without gradients.

    In distributed training every rank computes a shard of each batch, and all ranks return the same values.

    Args:
        model: Model on its device.
        task: Task: loss and metrics.
        source: Batches of the split.
        precision: Precision of the forward pass.
        observe: Function that is called with the events of the evaluation.
        split: Name of the split, for events and errors.
        max_batches: Maximum number of batches. None evaluates all.
        collector: Collector to which the predictions are appended. None discards them.
        sample: Sample to which the inputs of its metric are appended. None estimates no standard error.
        processes: Processes that evaluate together.
        signals: Signal handlers of the run. None does not check for signals between batches.

    Raises:
        TrainingError: The loss or a metric is not finite, or memory ran out.
    """
    device = next(model.parameters()).device
    metrics = device_metrics(task, device)
    messages = MetricMessages(processes, signals) if processes.is_distributed else None
    # The sum of millions of float32 losses would lose digits; MPS has no float64.
    loss_sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    examples = 0

    def record(indices: npt.NDArray[np.int64], losses: Tensor, targets: Tensor, scores: Tensor, *rest: Tensor) -> None:
        nonlocal loss_sum, examples
        loss_sum += losses.sum()
        examples += len(indices)
        inputs = dict(zip(names, rest, strict=True))
        predictions = inputs[PREDICTIONS]
        for name, metric in metrics.items():
            metric.update(inputs.get(name, predictions), targets)
        if sample is not None:
            sample.append(inputs.get(sample.name, predictions), targets)
        if collector is not None:
            collector.append(indices, predictions, targets, losses, scores)

    names: tuple[str, ...] = ()
    steps = min(len(source.loader), max_batches or sys.maxsize)
    observe(EvaluationStarted(split, steps))
    batches = source.loader.epoch(limit=max_batches, shard=None if messages is None else processes.shard)
    forward = forward_batches(model, batches, device=device, precision=precision, first_stage=source.first_stage)
    for step, (batch, outputs) in enumerate(forward, 1):
        with torch.inference_mode():
            outputs = outputs.float()
            losses, inputs = task.loss(outputs, batch.targets), inputs_of_metrics(task, outputs)
            names = tuple(inputs)
            # Only rank 0 collects, but a message needs the same tensors on every rank.
            needs_scores = collector is not None or messages is not None
            scores = task.scores(outputs) if needs_scores else losses
            tensors = [losses, batch.targets, scores, *inputs.values()]
            if messages is None:
                record(batch.indices, *tensors)
            else:
                assert batch.global_indices is not None
                messages.append(batch.global_indices, tensors)
                if messages.is_due or step == steps:
                    for indices, _, gathered in messages.exchange():
                        record(indices, *gathered)
        observe(EvaluationStep(step))
        if signals is not None:
            signals.raise_if_any_rank_interrupted()
    values = {"loss": loss_sum.item() / examples, **{name: float(metric.compute()) for name, metric in metrics.items()}}
    not_finite = [name for name, value in values.items() if not math.isfinite(value)]
    if not_finite:
        raise TrainingError(
            f"{' and '.join(not_finite)} of the {split} split is not finite",
            fix="check the data for values that are not finite, or lower the learning rate; a metric of task.metrics "
            "may be undefined for constant predictions",
        )
    return values


def inputs_of_metrics(task: Task, outputs: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the metrics, (B, ...) each: the predictions, and those of single metrics by name."""
    return {PREDICTIONS: task.predictions(outputs), **task.metric_inputs(outputs)}


def device_metrics(task: Task, device: torch.device) -> dict[str, Metric]:
    """Return the metrics of a task on a device, without torchmetrics' own synchronization between processes.

    Every rank updates its metrics with the gathered batch, so that a synchronization would count examples twice.
    """
    metrics = {name: metric.to(device) for name, metric in task.metrics().items()}
    for _, metric in named_metrics(metrics):
        metric.distributed_available_fn = _never
    return metrics


def metric_so_far(task: Task, metrics: Mapping[str, Metric]) -> tuple[str, float]:
    """Return name and value of a metric during an epoch: the primary one, unless computing it takes long."""
    from transfer.config.collected_metrics import CollectedMetric

    name = task.primary_metric.name
    if isinstance(metrics[name], CollectedMetric):  # sorts all examples so far, for example
        name = next((other for other, metric in metrics.items() if not isinstance(metric, CollectedMetric)), name)
    return name, float(metrics[name].compute())


def metric_sample(task: Task, selection: Selection, device: torch.device) -> MetricSample | None:
    """Return an empty sample of the metric that selects the best epoch; None for the loss, which decides by itself."""
    if selection.metric == "loss":
        return None
    return MetricSample(selection.metric, device_metrics(task, device)[selection.metric])


def _never() -> bool:
    return False
