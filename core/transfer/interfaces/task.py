"""The contract of a task: loss, metrics and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt
from torch import Tensor

from transfer.interfaces.data import TargetKind
from transfer.interfaces.renamed import adopt_renamed_methods

# --------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class PrimaryMetric:
    """The metric that picks the best epoch.

    Args:
        name: As :meth:`Task.metrics` has it.
        higher_is_better: Its direction.
    """

    name: str
    higher_is_better: bool


class Task(ABC):
    """What is learned: the number of outputs, the loss, the metrics and how to read a prediction. No device, no loop.

    A subclass's constructor is called as ``(data: DataSpec, *, <options>)``.
    """

    targets: ClassVar[frozenset[TargetKind]]
    """The kinds of target that this task takes."""

    primary_metric: PrimaryMetric
    """What picks the best epoch."""

    out_features: int
    """The number of outputs of the model; the constructor sets it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        adopt_renamed_methods(cls, {"main_output": "explained_output"})

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (B,), of float outputs (B, out_features); the engine takes the mean."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Any]:
        """Return fresh torchmetrics by name, each to be updated with (:meth:`predictions`, targets)."""

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return what the metrics want of the outputs; by default the outputs themselves."""
        return outputs

    @abstractmethod
    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Say what each row of outputs (B, out_features) means, for a person: JSON alone, one dict per example."""

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs (B, out_features) in what a person reads: probabilities; by default as they are."""
        return outputs

    def explained_output(self, scores: Tensor) -> int:
        """Return which of an example's scores (out_features,) an explanation is of; by default the first."""
        return 0

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """See the targets of the training split once before training (class weights); by default nothing."""
        return
