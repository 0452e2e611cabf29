"""A model: the stages of a backbone and a head, as one chain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from transfer.errors import PluginError
from transfer.interfaces import Backbone, Head

BATCH_NORM = nn.modules.batchnorm._NormBase
"""Every layer with running statistics: batch norm of any dimension, synchronised or not, and tracked instance norm."""


class Model(nn.Module):
    """The named stages of a backbone, then ``head``: what is frozen, trained, saved and exported.

    Parameter names begin with the stage's name (``layer1.0.conv1.weight``, ``head.output.weight``). Frozen modules stay
    in eval mode through :meth:`train`, so that neither batch-norm statistics nor dropout move in them.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self._stage_names = (*backbone.stage_names, "head")
        for name, stage in zip(self._stage_names, (*backbone.stages, head), strict=True):
            *groups, own = name.split(".")
            holder: nn.Module = self
            for group in groups:
                if not hasattr(holder, group):
                    holder.add_module(group, nn.Module())
                holder = getattr(holder, group)
            holder.add_module(own, stage)
        self._frozen: tuple[nn.Module, ...] = ()  # a tuple, which nn.Module does not register
        self._batch_norm_stays = True
        outside = [name for name, _ in backbone.named_parameters() if not name.startswith("stages.")]
        if outside:
            raise PluginError(
                f"{type(backbone).__name__} has parameters outside its stages: {', '.join(outside)}",
                fix="put every parameter into one of the stages",
            )

    def forward(self, inputs: Any, first_stage: int = 0) -> Any:
        """Run the chain of stages.

        Args:
            inputs: What the first of these stages takes.
            first_stage: Where to begin: later than at 0 with stored features.

        Returns:
            Outputs (B, out_features).
        """
        for stage in list(self)[first_stage:]:
            inputs = stage(inputs)
        return inputs

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, from input to output; the last is ``head``."""
        return {name: self.get_submodule(name) for name in self._stage_names}

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.stages.values())

    def __len__(self) -> int:
        return len(self._stage_names)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(self._stage_names[index])

    def stage_of(self, name: str) -> str:
        """Return the stage that a parameter or buffer belongs to, by its name."""
        return next(stage for stage in self._stage_names if name.startswith(f"{stage}."))

    def keep_in_eval(self, frozen: tuple[nn.Module, ...], *, batch_norm: bool = True) -> None:
        """Say which modules stay in eval mode from now on, whatever mode the rest is in.

        Args:
            frozen: The outermost such modules.
            batch_norm: Batch-norm layers inside them stay too; False lets their statistics follow the training data.
        """
        self._frozen = frozen
        self._batch_norm_stays = batch_norm
        self.train(self.training)

    def train(self, mode: bool = True) -> Model:
        """Set the mode of all but the frozen modules, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
            if not self._batch_norm_stays:
                for inner in module.modules():
                    if isinstance(inner, BATCH_NORM):
                        inner.train(mode)
        return self
