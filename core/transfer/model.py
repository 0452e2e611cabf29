"""A model: the stages of a backbone and a head, as one chain."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from transfer.errors import PluginError
from transfer.interfaces import Backbone, Head


class Model(nn.Sequential):
    """The named stages of a backbone, then ``head``: what is frozen, trained, saved and exported.

    Parameter names begin with the stage's name (``layer1.0.conv1.weight``, ``head.output.weight``). Frozen modules stay
    in eval mode through :meth:`train`, so that neither batch-norm statistics nor dropout move in them.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__(OrderedDict([*backbone.stages.named_children(), ("head", head)]))
        # nn.Module would register modules in a list attribute of its own kind; a plain tuple stays a plain tuple.
        self._frozen: tuple[nn.Module, ...] = ()
        outside = [name for name, _ in backbone.named_parameters() if not name.startswith("stages.")]
        if outside:
            raise PluginError(
                f"{type(backbone).__name__} has parameters outside its stages: {', '.join(outside)}",
                fix="put every parameter into one of the stages",
            )

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, from input to output; the last is ``head``."""
        return dict(self.named_children())

    def keep_in_eval(self, frozen: tuple[nn.Module, ...]) -> None:
        """Say which modules stay in eval mode from now on, whatever mode the rest is in."""
        self._frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Model:
        """Set the mode of all but the frozen modules, which stay in eval mode."""
        super().train(mode)
        for module in getattr(self, "_frozen", ()):
            module.eval()
        return self
