"""Heads for features of any modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from transfer.errors import ConfigError
from transfer.interfaces import ZERO_SHOT_TEMPLATES, Backbone, FeatureSpec, Head, Layout

Dropout = Annotated[float, Field(ge=0, lt=1)]


class Linear(Head):
    """One linear layer over a feature vector, (B, D) -> (B, out_features).

    Args:
        dropout: Fraction of the features that is zeroed in training.
    """

    def __init__(self, features: FeatureSpec, out_features: int, *, dropout: Dropout = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return float outputs (B, out_features) of float features (B, D)."""
        return self.output(self.dropout(features))  # type: ignore[no-any-return]

    def as_linear(self) -> nn.Linear:
        """Return the layer itself; dropout only acts in training."""
        return self.output


class ZeroShot(Linear):
    """A linear layer that starts as the zero-shot classifier of the backbone's text tower.

    Each class has the embedding of its name in the templates as weights, times the scale of the pretraining. The
    backbone needs a text tower, such as that of ``open_clip``.

    Args:
        templates: Texts in which ``{}`` is replaced by the name of a class, with spaces for underscores. The embeddings
            of all templates are averaged.
        dropout: Fraction of the features that is zeroed in training.
    """

    def __init__(
        self,
        features: FeatureSpec,
        out_features: int,
        *,
        templates: Annotated[
            tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)
        ] = ZERO_SHOT_TEMPLATES,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__(features, out_features, dropout=dropout)
        self.templates = templates

    def initialize(self, backbone: Backbone, classes: Sequence[str]) -> None:
        """Copy the weights of the zero-shot classifier.

        Raises:
            ConfigError: The backbone has no pretrained text tower.
        """
        classifier = backbone.zero_shot([name.replace("_", " ") for name in classes], self.templates)
        if classifier is None:
            raise ConfigError(
                "the head 'zero_shot' needs a backbone with a pretrained text tower",
                fix="choose the backbone open_clip with its pretrained weights, or another head",
            )
        with torch.no_grad():
            self.output.weight.copy_(classifier[0])
            self.output.bias.copy_(classifier[1])


class MLP(Head):
    """Hidden layers with ReLU and dropout over a feature vector, (B, D) -> (B, out_features).

    Args:
        hidden: Width of each hidden layer.
        dropout: Fraction of each layer's input that is zeroed in training.
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


class Attention(Head):
    """A learned weighted mean over the steps of a sequence, then one linear layer, (B, T, D) -> (B, out_features).

    The weight of a step h is the softmax over the real steps of u . tanh(W h + b): additive attention (Bahdanau et al.
    2015, https://arxiv.org/abs/1409.0473) with a learned query u (Yang et al. 2016, https://aclanthology.org/N16-1174).

    Args:
        hidden: Width of the layer that scores a step; null: the size of the features.
        dropout: Fraction of the weighted mean that is zeroed in training.
    """

    layouts: ClassVar[frozenset[Layout]] = frozenset({"sequence"})

    def __init__(
        self,
        features: FeatureSpec,
        out_features: int,
        *,
        hidden: Annotated[int, Field(ge=1)] | None = None,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        width = features.size if hidden is None else hidden
        self.projection = nn.Linear(features.size, width)
        self.query = nn.Linear(width, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """Return float outputs (B, out_features) of float steps (B, T, D) and their bool mask (B, T)."""
        steps, _ = features
        # (B, 1, T) @ (B, T, D) -> (B, 1, D): the mean of the steps of each example.
        mean = (self.weights(features).unsqueeze(1) @ steps).squeeze(1)
        return self.output(self.dropout(mean))  # type: ignore[no-any-return]

    def weights(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """Return the weight of each step, float (B, T): 0 at padding, and 1 in total."""
        steps, mask = features
        # Padding gets a weight of exactly 0. Every sequence has a real step, so softmax is never over -inf only.
        scores: Tensor = self.query(torch.tanh(self.projection(steps))).squeeze(2)
        return scores.masked_fill(~mask, -torch.inf).softmax(1)
