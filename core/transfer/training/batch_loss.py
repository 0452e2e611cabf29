"""Losses and metrics of the training batches, recorded without making the device wait."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.errors import TrainingError
from transfer.training.evaluation import PREDICTIONS
from transfer.training.parallel import MetricMessages

if TYPE_CHECKING:
    from torchmetrics import Metric

MAX_REPORTED_INDICES = 16


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a training batch, on its way from the device to the CPU.

    Args:
        total: Sum of the losses of the batch, a scalar on the CPU.
        copied: CUDA event that is recorded after the copy to ``total``. None if the copy is synchronous.
        indices: int64 (B,), indices of the examples in the training split.
        step: Number of the batch in its epoch, from 1.
        rates: Learning rates with which the optimizer uses the batch, by stage.
    """

    total: Tensor
    copied: torch.cuda.Event | None
    indices: npt.NDArray[np.int64]
    step: int
    rates: Mapping[str, float]

    @classmethod
    def copy_from(
        cls, total: Tensor, indices: npt.NDArray[np.int64], step: int, rates: Mapping[str, float]
    ) -> BatchLoss:
        """Start the copy of a loss to the CPU."""
        if total.device.type != "cuda":
            return cls(total.cpu(), None, indices, step, rates)
        # Reading the scalar with .item() would wait for everything that is queued on the stream, including later
        # steps. This copy goes to pinned memory, and the event marks its end.
        copy, copied = total.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(total.device))
        return cls(copy, copied, indices, step, rates)

    def finite_item(self, epoch: int) -> float:
        """Return the sum of the losses; on CUDA, wait for the end of the copy.

        Args:
            epoch: Number of the epoch, from 1, for the error.

        Raises:
            TrainingError: The loss is not finite.
        """
        value = self.item()
        if not math.isfinite(value):
            more = "..." if len(self.indices) > MAX_REPORTED_INDICES else ""
            raise TrainingError(
                f"the loss of epoch {epoch}, step {self.step} is {value}: learning rates {dict(self.rates)}, "
                f"examples {self.indices[:MAX_REPORTED_INDICES].tolist()}{more} of the training split",
                fix="lower the learning rate, or check these examples"
                + ("; the checkpoint `best` contains the best epoch so far" if epoch > 1 else ""),
            )
        return value

    def item(self) -> float:
        """Return the sum of the losses; on CUDA, wait for the end of the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.total.item()


class BatchRecorder:
    """Recorder of the trained batches: it updates the metrics of the epoch and collects losses.

    Args:
        metrics: Metrics over the trained examples of the epoch.
        messages: Messages by which the ranks gather their shards of the batches.
    """

    def __init__(self, metrics: Mapping[str, Metric], messages: MetricMessages) -> None:
        self._metrics = metrics
        self._messages = messages
        self._losses: list[BatchLoss] = []

    @property
    def waiting(self) -> int:
        """Number of examples whose losses wait for the next message."""
        return self._messages.examples

    def add(
        self,
        indices: npt.NDArray[np.int64],
        step: int,
        rates: Mapping[str, float],
        losses: Tensor,
        targets: Tensor,
        inputs: Mapping[str, Tensor],
    ) -> None:
        """Add a batch.

        Args:
            indices: int64 (B,), indices of the examples of all ranks.
            step: Number of the batch in its epoch, from 1.
            rates: Learning rates with which the optimizer uses the batch, by stage.
            losses: Losses of the shard of this rank.
            targets: Targets of the shard of this rank.
            inputs: Inputs of the metrics of the shard of this rank, by the name of the metric.
        """
        if self._messages.processes.is_distributed:
            self._messages.append(indices, [losses, targets, *inputs.values()], (step, rates, tuple(inputs)))
        else:
            self._record(indices, step, rates, losses, targets, inputs)

    def losses(self, *, flush: bool = False) -> list[BatchLoss]:
        """Return the losses of the batches since the last call; with several ranks, of those whose message is due.

        Args:
            flush: Whether to send a message even if it is not due.
        """
        if flush or self._messages.is_due:
            for indices, (step, rates, names), (batch_losses, targets, *inputs) in self._messages.exchange():
                self._record(indices, step, rates, batch_losses, targets, dict(zip(names, inputs, strict=True)))
        losses, self._losses = self._losses, []
        return losses

    def _record(
        self,
        indices: npt.NDArray[np.int64],
        step: int,
        rates: Mapping[str, float],
        losses: Tensor,
        targets: Tensor,
        inputs: Mapping[str, Tensor],
    ) -> None:
        for name, metric in self._metrics.items():
            metric.update(inputs.get(name, inputs[PREDICTIONS]), targets)
        self._losses.append(BatchLoss.copy_from(losses.sum(), indices, step, rates))
