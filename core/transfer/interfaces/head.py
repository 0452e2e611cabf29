"""The contract of a head."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from torch import nn

from transfer.interfaces.backbone import Layout

# --------------------------------------------------------------------------------------------------------------- head


class Head(nn.Module, ABC):
    """From a backbone's features to a task's outputs: float tensor (B, out_features).

    A subclass's constructor is called as ``(features: FeatureSpec, out_features: int, *, <options>)``. Its ``forward``
    takes what the layout says: (B, D), or the pair of (B, T, D) and the mask (B, T).
    """

    layouts: ClassVar[frozenset[Layout]] = frozenset({"vector"})
    """The layouts of features that this head takes."""

    def as_linear(self) -> nn.Linear | None:
        """Return the one layer that this head is outside training, for networks that end in one; None if it is more."""
        return None
