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


@dataclass(frozen=True)
class PrimaryMetric:
    """The metric that selects the best epoch.

    Args:
        name: Name of the metric in :meth:`Task.metrics`.
        higher_is_better: Whether a higher value is better.
    """

    name: str
    higher_is_better: bool


class Task(ABC):
    """A learning task: number of outputs, loss, metrics, and interpretation of outputs.

    A task contains no device, checkpoint or training loop. The constructor of a subclass is called as
    ``(data: DataSpec, *, <options>)``.
    """

    targets: ClassVar[frozenset[TargetKind]]
    """The kinds of target that this task accepts."""

    primary_metric: PrimaryMetric
    """The metric that selects the best epoch."""

    out_features: int
    """The number of outputs of the model, set by the constructor."""

    has_convex_loss: bool = False
    """Whether :meth:`loss` is convex and smooth in the outputs, so that a linear head can be solved by L-BFGS."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Plugins written for version 0.1 define the old name.
        adopt_renamed_methods(cls, {"main_output": "explained_output"})

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (B,), from float outputs (B, out_features); the engine takes the mean."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Any]:
        """Return new torchmetrics by name; each is updated with (:meth:`predictions`, targets).

        :meth:`metric_inputs` replaces the predictions for some of them.
        """

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the input of the metrics from the outputs; by default the outputs themselves."""
        return outputs

    def metric_inputs(self, outputs: Tensor) -> Mapping[str, Tensor]:
        """Return the inputs (B, ...) of the metrics that do not take :meth:`predictions`, by name; by default none.

        A ranking metric, for example, takes probabilities while an accuracy takes classes.
        """
        return {}

    @abstractmethod
    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return the meaning of each row of outputs (B, out_features), one dict of JSON values per example."""

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs (B, out_features) in interpretable units, such as probabilities; by default unchanged."""
        return outputs

    def explained_output(self, scores: Tensor) -> int:
        """Return the index of the score (out_features,) that an explanation is about; by default 0."""
        return 0

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """Process the targets of the training split once before training (class weights); by default do nothing."""
        return

    def state(self) -> dict[str, Any]:
        """Return the JSON values that :meth:`prepare` computed, which are saved with the model; by default none."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the values of :meth:`state` in a saved model; by default do nothing.

        Args:
            state: The saved values; empty if the model was saved by a version without them.

        Raises:
            ValueError: The values do not fit the task.
        """
        return

    def output_scaling(self) -> tuple[Tensor, Tensor] | None:
        """Return offset and scale, float32 (out_features,) each, of the model's outputs; None, the default, for none.

        The model returns ``offset + scale * x`` for the outputs x of the head, in training, predictions and exports. It
        is called after :meth:`prepare` or :meth:`load_state`. Regression returns the mean and the standard deviation of
        the training targets: the head then learns numbers around 0, while outputs have the units of the targets.
        """
        return None
