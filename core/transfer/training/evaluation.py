"""Loss and metrics of a split, in eval mode."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor
from torchmetrics import Metric

from transfer.config.train_settings import Precision
from transfer.errors import TrainingError
from transfer.feature_cache.loader import StageInputs
from transfer.interfaces import Task
from transfer.models.forward import forward_batches
from transfer.models.model import Model
from transfer.system.signals import Signals
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup
from transfer.training.events import (
    EvaluationStarted,
    EvaluationStep,
    Observer,
)
from transfer.training.state import nested


def evaluate(
    model: Model,
    task: Task,
    source: StageInputs,
    precision: Precision,
    observe: Observer,
    split: str,
    max_batches: int | None = None,
    kept: list[tuple[Tensor, ...]] | None = None,
    *,
    processes: ProcessGroup = SINGLE_PROCESS,
    signals: Signals | None = None,
) -> dict[str, float]:
    """Return the mean loss and the metrics of a split, in eval mode and without gradients.

    The indices of each batch and the fields of :class:`transfer.storage.run_directory.Predictions` are appended to
    ``kept``, on the CPU. Several processes compute a share of every batch each, and return the same.
    """
    device = next(model.parameters()).device
    metrics = device_metrics(task, device)
    share = processes.shard if processes.is_distributed else None
    examples, loss_sum = 0, torch.zeros((), dtype=torch.float64, device=device)
    observe(EvaluationStarted(split, min(len(source.loader), max_batches or sys.maxsize)))
    loader_batches = source.loader.epoch(most=max_batches, share=share)
    outputs_of = forward_batches(
        model, loader_batches, device=device, precision=precision, first_stage=source.first_stage
    )
    for step, (batch, outputs) in enumerate(outputs_of, 1):
        with torch.inference_mode():
            outputs = outputs.float()
            losses, predictions = task.loss(outputs, batch.targets), task.predictions(outputs)
            targets, indices = batch.targets, batch.indices
            confidences = (
                task.scores(outputs).amax(1) if kept is not None or batch.global_indices is not None else losses
            )
            if batch.global_indices is not None:
                indices = batch.global_indices
                losses, predictions, targets, confidences = processes.gather(
                    len(indices), losses, predictions, targets, confidences
                )
            loss_sum += losses.sum()
            for metric in metrics.values():
                metric.update(predictions, targets)
            if kept is not None:
                found = (predictions.cpu(), targets.cpu(), losses.cpu(), confidences.cpu())
                kept.append((torch.from_numpy(indices), *found))
        examples += len(indices)
        observe(EvaluationStep(step))
        if signals is not None:
            signals.raise_if_any_rank_interrupted()
    scores = {"loss": loss_sum.item() / examples, **{name: float(metric.compute()) for name, metric in metrics.items()}}
    broken = [name for name, value in scores.items() if not math.isfinite(value)]
    if broken:
        raise TrainingError(
            f"{' and '.join(broken)} of the {split} split is not finite",
            fix="look for values that are not finite in the data, or lower the learning rate",
        )
    return scores


def device_metrics(task: Task, device: torch.device) -> dict[str, Metric]:
    """Return a task's metrics, which see every example in every process and so have nothing to ask of the others."""
    metrics = {name: metric.to(device) for name, metric in task.metrics().items()}
    for _, metric in nested(metrics):
        metric.distributed_available_fn = _never
    return metrics


def _never() -> bool:
    return False
