"""The heads that need no modality."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from transfer.interfaces import FeatureSpec, Head

Dropout = Annotated[float, Field(ge=0, lt=1)]


class Linear(Head):
    """One linear layer over a feature vector, (B, D) -> (B, out_features).

    Args:
        dropout: Share of the features that is dropped in training.
    """

    def __init__(self, features: FeatureSpec, out_features: int, *, dropout: Dropout = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return float outputs (B, out_features) of float features (B, D)."""
        return self.output(self.dropout(features))  # type: ignore[no-any-return]


class MLP(Head):
    """Hidden layers with ReLU and dropout over a feature vector, (B, D) -> (B, out_features).

    Args:
        hidden: Width of each hidden layer.
        dropout: Share of each layer's input that is dropped in training.
    """

    def __init__(
        self,
        features: FeatureSpec,
        out_features: int,
        *,
        hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (256,),
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        widths = (features.size, *hidden)
        layers: list[nn.Module] = []
        for width, following in zip(widths, hidden, strict=False):
            layers += [nn.Dropout(dropout), nn.Linear(width, following), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden[-1], out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return float outputs (B, out_features) of float features (B, D)."""
        return self.output(self.dropout(self.hidden(features)))  # type: ignore[no-any-return]
