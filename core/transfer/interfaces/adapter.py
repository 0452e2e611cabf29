"""The contract of an adapter: small trained additions to a pretrained backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from transfer.interfaces.backbone import Backbone


class Adapter(ABC):
    """Small trained additions to the stages of a backbone, whose own parameters never change.

    The constructor takes only options.
    """

    @abstractmethod
    def inject(self, backbone: Backbone) -> None:
        """Add parameters to stages of a backbone, in place. It may be on the meta device.

        Every parameter of the backbone remains the same object, possibly under another name: the framework freezes
        these in every phase, and trains the added ones.

        Raises:
            ConfigError: The options do not fit the backbone.
        """

    @abstractmethod
    def merge(self, module: nn.Module) -> None:
        """Add the trained additions to the weights of the layers, in place, and remove the adapter.

        The outputs in eval mode stay the same, except for rounding, and every parameter has the name that it had before
        :meth:`inject`.

        Args:
            module: Module that contains the adapted backbone and the model of it, which have layers in common.
        """
