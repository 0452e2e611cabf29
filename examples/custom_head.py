"""A custom head in a script: maxout instead of a linear layer. Run: python custom_head.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

import transfer


@transfer.register("head", "maxout")
class Maxout(transfer.Head):
    """Maxout (Goodfellow et al. 2013): the maximum of several linear functions per output, (B, D) -> (B, out_features).

    Args:
        pieces: Number of linear functions per output.
        dropout: Dropout probability of the features.
    """

    layouts = frozenset({"vector"})  # a head for sequences receives a pair: features (B, T, D) and mask (B, T)

    def __init__(
        self,
        features: transfer.FeatureSpec,  # from the backbone
        out_features: int,  # from the task
        *,  # the options of the config's head block follow
        pieces: Annotated[int, Field(ge=2)] = 3,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    ) -> None:
        super().__init__()
        self.out_features, self.pieces = out_features, pieces
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(features.size, out_features * pieces)

    def forward(self, features: Tensor) -> Tensor:
        """Return float outputs (B, out_features)."""
        return self.linear(self.dropout(features)).unflatten(1, (self.out_features, self.pieces)).amax(2)


if __name__ == "__main__":
    run = transfer.run("configs/quickstart_text.yaml", ["head={name: maxout, pieces: 4}", "train.phases=[{epochs: 6}]"])
    print(run.summary["test"], run.folder)
