"""Adapters of peft. They need the extra ``peft``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import nn

from transfer.errors import ConfigError
from transfer.interfaces import Adapter, Backbone

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that are adapted by default."""
MAX_NAMES = 8
"""Maximum number of layer names that an error lists."""


class LoRA(Adapter):
    """Low-rank adaptation (Hu et al. 2021) by peft: the trained product of two small matrices is added to each layer.

    Args:
        rank: Inner size of the two matrices; a larger rank trains more parameters.
        alpha: The product is scaled by alpha / rank.
        dropout: Probability of dropout on the input of the matrices.
        dora: Whether to train the magnitude of each output separately (DoRA, Liu et al. 2024).
        stages: Names of the adapted stages, or of groups of stages; null adapts all. The stages below the lowest one
            stay in the feature cache.
        targets: Names of the adapted layers, such as qkv, or the ends of their names, such as attn.qkv. null adapts all
            linear layers and convolutions, except grouped convolutions.
    """

    def __init__(
        self,
        *,
        rank: Annotated[int, Field(ge=1)] = 8,
        alpha: Annotated[float, Field(gt=0)] = 16.0,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        dora: bool = False,
        stages: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
    ) -> None:
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.dora = dora
        self.stages = stages
        self.targets = targets

    def inject(self, backbone: Backbone) -> None:
        """Replace layers by layers of peft that contain them."""
        names = self._layer_names(backbone)
        settings = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # a float: peft only multiplies by it
            lora_dropout=self.dropout,
            use_dora=self.dora,
            # As a regular expression, because peft compares names in a list with the ends of other names, too.
            target_modules="|".join(map(re.escape, names)),
        )
        try:
            peft.inject_adapter_in_model(settings, backbone.stages)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"peft cannot adapt these layers: {error}", available=names[:MAX_NAMES]) from error

    def merge(self, module: nn.Module) -> None:
        """Merge every layer of peft and put the original layer in its place."""
        merged: dict[int, nn.Module] = {}  # a layer may be in several places of the module
        for name, layer in list(module.named_modules(remove_duplicate=False)):
            if isinstance(layer, BaseTunerLayer):
                if id(layer) not in merged:
                    # safe_merge raises for weights that are not finite, before the original is overwritten.
                    layer.merge(safe_merge=True)
                    merged[id(layer)] = layer.get_base_layer()
                parent, _, child = name.rpartition(".")
                setattr(module.get_submodule(parent), child, merged[id(layer)])

    def _layer_names(self, backbone: Backbone) -> list[str]:
        """Return the names of the adapted layers in ``backbone.stages``.

        Raises:
            ConfigError: A stage does not exist, or a target matches no layer.
        """
        stages = backbone.stage_names
        # As for freezing, `image` is the group of `image.stem` and `image.layer1`.
        chosen = [s for s in stages if self.stages is None or any(f"{s}.".startswith(f"{n}.") for n in self.stages)]
        if unknown := [n for n in self.stages or () if not any(f"{s}.".startswith(f"{n}.") for s in stages)]:
            raise ConfigError(f"adapter.stages names {unknown[0]!r}, which is not a stage", available=stages)
        modules = {
            f"{child}.{name}".rstrip("."): module
            for stage, (child, stage_module) in zip(stages, backbone.stages.named_children(), strict=True)
            if stage in chosen
            for name, module in stage_module.named_modules()
        }
        adaptable = list(_adaptable(modules))
        if self.targets is None:
            if not adaptable:
                raise ConfigError("the adapter has nothing to adapt: these stages have no linear layer or convolution")
            return adaptable
        inside_attention = _inside_attention(modules)
        names: list[str] = []
        for target in self.targets:
            matched = [name for name in modules if name == target or name.endswith(f".{target}")]
            if not matched:
                ends = sorted({name.rpartition(".")[2] for name in adaptable})
                raise ConfigError(
                    f"adapter.targets names {target!r}, which matches no layer of the adapted stages", available=ends
                )
            if inside := [name for name in matched if id(modules[name]) in inside_attention]:
                raise ConfigError(
                    f"adapter.targets names {target!r}, which cannot be adapted: nn.MultiheadAttention reads the "
                    f"weights of {inside[0]} without calling it",
                    fix="name other layers, or choose a backbone whose attention calls linear layers, such as timm's",
                )
            names += matched
        return list(dict.fromkeys(names))


def _adaptable(modules: dict[str, nn.Module]) -> Iterator[str]:
    inside_attention = _inside_attention(modules)
    for name, module in modules.items():
        grouped = getattr(module, "groups", 1) > 1  # peft requires a rank that the groups divide
        if isinstance(module, LAYERS) and id(module) not in inside_attention and not grouped:
            yield name


def _inside_attention(modules: dict[str, nn.Module]) -> set[int]:
    """Return the ids of the layers inside attention, which reads their weights and does not call them."""
    attention = [module for module in modules.values() if isinstance(module, nn.MultiheadAttention)]
    return {id(inner) for module in attention for inner in module.modules()}
