"""A model: the stages of a backbone and a head, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transfer.errors import PluginError
from transfer.interfaces import Backbone, Head
from transfer.models.layer_chain import layers_in

BATCH_NORM = nn.modules.batchnorm._NormBase
"""Layers with running statistics: batch norm of any dimension, synchronized or not, and tracked instance norm."""


_SCALING = ("_output_offset", "_output_scale")
"""Names of the head's buffers with the scaling of its outputs."""


def _scale(head: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
    offset, scale = (head.get_buffer(name) for name in _SCALING)
    return offset + scale * outputs


class Model(nn.Module):
    """The named stages of a backbone, then ``head``. Stages are the units of freezing, saving and exporting.

    Parameter names start with the name of the stage (``layer1.0.conv1.weight``, ``head.output.weight``). Frozen modules
    stay in eval mode through :meth:`train`, so that their batch-norm statistics and dropout do not change.

    Args:
        backbone: Backbone, whose stages become those of the model.
        head: Head, the last stage.
        fixed: Parameters of an adapted backbone that no freeze policy trains.

    Attributes:
        recompute: Whether the backward pass computes the activations of each backbone stage a second time, so that
            only the inputs of the stages stay in memory.
    """

    recompute = False

    def __init__(self, backbone: Backbone, head: Head, fixed: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self._stage_names = (*backbone.stage_names, "head")
        self._stage_paths = tuple(tuple(name.split(".")) for name in self._stage_names)
        for name, stage in zip(self._stage_names, (*backbone.stages, head), strict=True):
            *groups, stage_name = name.split(".")
            holder: nn.Module = self
            for group in groups:
                if not hasattr(holder, group):
                    holder.add_module(group, nn.Module())
                holder = getattr(holder, group)
            holder.add_module(stage_name, stage)
        self._frozen: tuple[nn.Module, ...] = ()  # nn.Module does not register the items of a tuple
        self._batch_norm_stays = True
        ids = {id(parameter) for parameter in fixed}
        self.fixed = frozenset(name for name, parameter in self.named_parameters() if id(parameter) in ids)
        outside = [name for name, _ in backbone.named_parameters() if not name.startswith("stages.")]
        if outside:
            raise PluginError(
                f"{type(backbone).__name__} has parameters outside its stages: {', '.join(outside)}",
                fix="put every parameter into one of the stages",
            )

    def forward(self, inputs: Any, first_stage: int = 0) -> Any:
        """Run the stages in order.

        Args:
            inputs: Inputs of the first stage that runs.
            first_stage: Index of the first stage to run; larger than 0 for cached features.

        Returns:
            Outputs (B, out_features).
        """
        *stages, head = list(self)[first_stage:]
        for stage in stages:
            inputs = _run_recomputed(stage, inputs) if self.recompute else stage(inputs)
        # The backward pass starts at the head: its activations are needed at once.
        return head(inputs)

    @property
    def stages(self) -> dict[str, nn.Module]:
        """Stages by name, from input to output; the last one is ``head``."""
        return {name: self.get_submodule(name) for name in self._stage_names}

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Units of freezing and learning rates, from input to output: names of their parameters by name of the unit.

        These are the stages. If only one stage of the backbone has parameters, because the network is no chain, they
        are the layers of this stage (``network.blocks.3``), by their paths in the model.
        """
        names = [name for name, _ in self.named_parameters()]
        layers = {s: tuple(name for name in names if name.startswith(f"{s}.")) for s in self._stage_names}
        with_parameters = [stage for stage in self._stage_names[:-1] if layers[stage]]
        if len(with_parameters) != 1:
            return layers
        (only,) = with_parameters
        parts = {
            f"{only}.{path}": tuple(f"{only}.{name}" for name in inside)
            for path, inside in layers_in(self.get_submodule(only)).items()
        }
        return {
            layer: parameters
            for stage in self._stage_names
            for layer, parameters in (parts if stage == only and parts else {stage: layers[stage]}).items()
        }

    @property
    def has_batch_norm(self) -> bool:
        """Whether a layer has running statistics."""
        return any(isinstance(module, BATCH_NORM) for module in self.modules())

    def __iter__(self) -> Iterator[nn.Module]:
        # Looked up at each step: a stage may be replaced. get_submodule does the same, but takes ten times as long.
        for path in self._stage_paths:
            stage: Any = self
            for name in path:
                stage = stage._modules[name]
            yield stage

    def __len__(self) -> int:
        return len(self._stage_names)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(self._stage_names[index])

    def stage_of(self, name: str) -> str:
        """Return the name of the stage that a parameter, a buffer or a module belongs to."""
        return next(stage for stage in self._stage_names if f"{name}.".startswith(f"{stage}."))

    def keep_in_eval(self, frozen: tuple[nn.Module, ...], *, batch_norm: bool = True) -> None:
        """Keep modules in eval mode from now on, independent of the mode of the model.

        Args:
            frozen: Outermost modules that stay in eval mode.
            batch_norm: Whether batch-norm layers inside them stay too. False lets their statistics follow the training
                data.
        """
        self._frozen = frozen
        self._batch_norm_stays = batch_norm
        self.train(self.training)

    def scale_outputs(self, scaling: tuple[Tensor, Tensor] | None) -> None:
        """Return ``offset + scale * x`` for the outputs x of the head from now on.

        Args:
            scaling: Offset and scale, float32 (out_features,) each; None changes nothing.
        """
        if scaling is None:
            return
        head, device = self.stages["head"], next(self.parameters()).device
        # Buffers move with the model and become constants of exported programs. They are not persistent, because the
        # task stores the values: names and content of weight files are those of the head.
        for name, value in zip(_SCALING, scaling, strict=True):
            head.register_buffer(name, value.to(device), persistent=False)
        # A hook instead of a wrapper, which would change the names of the head's parameters.
        head.register_forward_hook(_scale)

    @property
    def output_scaling(self) -> tuple[Tensor, Tensor] | None:
        """Offset and scale of the outputs (:meth:`scale_outputs`); None if they are not scaled."""
        buffers = dict(self.stages["head"].named_buffers(recurse=False))
        return (buffers[_SCALING[0]], buffers[_SCALING[1]]) if _SCALING[0] in buffers else None

    def head_as_linear(self) -> nn.Linear | None:
        """Return the linear layer that the head and the scaling of its outputs are equivalent to; None if none is."""
        linear: nn.Linear | None = self.stages["head"].as_linear()  # type: ignore[operator]
        if linear is None or self.output_scaling is None:
            return linear
        offset, scale = self.output_scaling
        scaled = nn.Linear(linear.in_features, linear.out_features, device=offset.device)
        with torch.no_grad():
            scaled.weight.copy_(linear.weight * scale[:, None])
            scaled.bias.copy_(offset if linear.bias is None else linear.bias * scale + offset)
        return scaled

    def train(self, mode: bool = True) -> Model:
        """Set the mode of all modules but the frozen ones, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
            if not self._batch_norm_stays:
                for inner in module.modules():
                    if isinstance(inner, BATCH_NORM):
                        inner.train(mode)
        return self


def _run_recomputed(stage: nn.Module, inputs: Any) -> Any:
    """Run a stage without storing its activations, which the backward pass computes again.

    The second pass draws the same random numbers. In stages that pass on no gradient nothing is stored anyway.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    has_gradient = any(isinstance(t, Tensor) and t.requires_grad for t in (*tensors, *stage.parameters()))
    if not (has_gradient and torch.is_grad_enabled()):
        return stage(inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _fixed_statistics(stage)

    return checkpoint(stage, inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _fixed_statistics(stage: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm in the block: the first pass has already updated them."""
    norms = [module for module in stage.modules() if isinstance(module, BATCH_NORM) and module.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # With momentum 0 the same tensors are stored for the backward pass as in the first one, unlike in eval mode.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
