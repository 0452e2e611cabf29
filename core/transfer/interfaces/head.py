"""The contract of a head."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from transfer.interfaces.backbone import Backbone, Layout


class Head(nn.Module, ABC):
    """Module that maps a backbone's features to a task's outputs, a float tensor (B, out_features).

    The constructor of a subclass is called as ``(features: FeatureSpec, out_features: int, *, <options>)``. Its
    ``forward`` takes features of the layout: (B, D), or the pair of (B, T, D) and the mask (B, T).
    """

    layouts: ClassVar[frozenset[Layout]] = frozenset({"vector"})
    """The layouts of features that this head accepts."""

    def initialize(self, backbone: Backbone, classes: Sequence[str]) -> None:
        """Initialize weights from the pretrained backbone and the names of the classes; by default do nothing.

        Args:
            backbone: Backbone with its pretrained weights.
            classes: Names of the classes, labels or numbers, in the order of the outputs.
        """
        return

    def as_linear(self) -> nn.Linear | None:
        """Return the linear layer that this head is equivalent to in evaluation, for export; None if there is none."""
        return None
