"""A task: how much of the cases lies below which number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transfer import ConfigError, DataSpec, MeanOf, PrimaryMetric, Task


def _covered(predictions: Tensor, targets: Tensor) -> Tensor:
    return ((predictions.amin(2) <= targets) & (targets <= predictions.amax(2))).float()


class Quantiles(Task):
    """Quantile regression (Koenker and Bassett 1978): for each number some of its quantiles.

    Args:
        quantiles: Which, between 0 and 1, in rising order.
    """

    targets = frozenset({"number"})
    primary_metric = PrimaryMetric("pinball", higher_is_better=False)

    def __init__(self, data: DataSpec, *, quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)) -> None:
        if not quantiles or list(quantiles) != sorted({q for q in quantiles if 0 < q < 1}):
            raise ConfigError(f"quantiles are {list(quantiles)}", fix="write numbers between 0 and 1, in rising order")
        self.names, self.quantiles = data.classes, quantiles
        self.out_features = len(self.names) * len(quantiles)

    def pinball(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the pinball loss of each quantile, (B, C, Q), of predictions (B, C, Q) and targets (B, C)."""
        wanted = torch.tensor(self.quantiles, device=targets.device)
        error = targets.unsqueeze(2) - predictions
        return torch.maximum(wanted * error, (wanted - 1) * error)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return (B, C, Q), in rising order."""
        return self._shaped(outputs).sort(2).values

    def _shaped(self, outputs: Tensor) -> Tensor:
        return outputs.view(len(outputs), len(self.names), len(self.quantiles))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean pinball loss of each example, (B,)."""
        return self.pinball(self._shaped(outputs), targets).mean((1, 2))

    def metrics(self) -> Mapping[str, Any]:
        """Return the pinball loss, and how many of the numbers lie between the first and the last quantile."""
        return {"pinball": MeanOf(self.pinball), "coverage": MeanOf(_covered)}

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Return for each number its quantiles."""
        written = [f"{quantile:g}" for quantile in self.quantiles]
        return [
            {name: dict(zip(written, values, strict=True)) for name, values in zip(self.names, row, strict=True)}
            for row in self.predictions(outputs).tolist()
        ]
