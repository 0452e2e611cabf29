"""A task for quantile regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transfer import ConfigError, DataSpec, MeanOf, PrimaryMetric, Task


def _covered(predictions: Tensor, targets: Tensor) -> Tensor:
    return ((predictions.amin(2) <= targets) & (targets <= predictions.amax(2))).float()


class Quantiles(Task):
    """Quantile regression (Koenker and Bassett 1978): several quantiles of each number.

    Args:
        quantiles: Quantiles to predict, between 0 and 1, in ascending order.
    """

    targets = frozenset({"number"})
    primary_metric = PrimaryMetric("pinball", higher_is_better=False)

    def __init__(self, data: DataSpec, *, quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)) -> None:
        if not quantiles or list(quantiles) != sorted({q for q in quantiles if 0 < q < 1}):
            raise ConfigError(
                f"quantiles are invalid: expected numbers between 0 and 1 in ascending order, got {list(quantiles)}",
                fix="for example quantiles: [0.1, 0.5, 0.9]",
            )
        self.names, self.quantiles = data.classes, quantiles
        self.out_features = len(self.names) * len(quantiles)

    def pinball(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the pinball loss (B, C, Q) of predictions (B, C, Q) and targets (B, C)."""
        wanted = torch.tensor(self.quantiles, device=targets.device)
        error = targets.unsqueeze(2) - predictions
        return torch.maximum(wanted * error, (wanted - 1) * error)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the predicted quantiles (B, C, Q), sorted so that they do not cross."""
        return self._shaped(outputs).sort(2).values

    def _shaped(self, outputs: Tensor) -> Tensor:
        return outputs.view(len(outputs), len(self.names), len(self.quantiles))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean pinball loss (B,) of each example."""
        return self.pinball(self._shaped(outputs), targets).mean((1, 2))

    def metrics(self) -> Mapping[str, Any]:
        """Return the pinball loss and the fraction of targets between the lowest and the highest quantile."""
        return {"pinball": MeanOf(self.pinball), "coverage": MeanOf(_covered)}

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return for each example the quantiles of each number."""
        written = [f"{quantile:g}" for quantile in self.quantiles]
        return [
            {name: dict(zip(written, values, strict=True)) for name, values in zip(self.names, row, strict=True)}
            for row in self.predictions(outputs).tolist()
        ]
