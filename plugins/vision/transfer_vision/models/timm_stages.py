"""Stages of the models of timm: a stem, one stage per block, and the pooling."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transfer import find_chain

STEM = ("patch_embed", "pos_drop", "patch_drop", "rope", "norm_pre")
"""The children of a vision transformer before its blocks; positions are added between them."""
Chain = Mapping[str, Sequence[str]]
"""Paths of the layers of each stage before the pooling, in order, by the name of the stage."""


def chain(network: Any, images: Tensor) -> Chain | None:
    """Return the stages before the pooling, or None if the layers do not pass one tensor from each to the next.

    timm assigns every parameter to a group, which it uses for layer-wise learning rates. There is a fine grouping by
    block and a coarse one, such as by resolution. A stage is a group of the fine one, if these layers form a chain.

    Args:
        network: Model on the meta device.
        images: Images on the meta device, (B, C, H, W).
    """
    coarse = _groups(network, coarse=True)
    for groups in (_groups(network, coarse=False), coarse):
        links = _links(network, groups, images) if groups else ()
        stages = _name_stages(links, groups, coarse, stem=list(STEM[:1]) if embeds_patches(network) else [])
        if stages.get("stem") and _has_same_output(network, stages, images):
            return stages
    return None


def split(network: Any, stages: Chain | None, images: Tensor) -> dict[str, nn.Module]:
    """Split a model into stages, whose tensors keep timm's names; without a chain it is a single stage.

    Args:
        network: Model.
        stages: Result of :func:`chain`.
        images: Images, of which only the size is used.
    """
    if stages is None:
        children = [name for name, _ in network.named_children()]
        return {"network": reduced(network, children, _complete)}
    embeds = embeds_patches(network)
    rotary = _rotary(network, images)
    parts: dict[str, nn.Module] = {name: Layers(network, paths, rotary) for name, paths in stages.items()}
    if embeds:
        parts["stem"] = reduced(network, [name for name, _ in network.named_children() if name in STEM], _embed)
    used = {path.split(".")[0] for paths in stages.values() for path in paths}
    left = [name for name, _ in network.named_children() if name not in {*used, *(STEM if embeds else ())}]
    return {**parts, "pool": reduced(network, left, _pool, tensors=not embeds)}


def embeds_patches(network: Any) -> bool:
    """Return whether a model is a vision transformer that adds positions and tokens to patches before its blocks."""
    from timm.models import Beit, Eva, VisionTransformer

    return isinstance(network, Beit | Eva | VisionTransformer)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of all blocks of a model.

    Args:
        table: Constant table (positions, D) that all blocks share. None: each block has its own, which is trained.
        module: Module of the model that computes the tables. It belongs to the first stage.
        grid: Height and width of the input in patches.
    """

    table: Tensor | None
    module: nn.Module
    grid: tuple[int, int]


class Layers(nn.Module):
    """Layers of a network, run in order, under their paths in the network (``blocks.3``).

    Args:
        network: Complete network.
        paths: Paths of the layers.
        rotary: Position embedding that the blocks take in addition to the values; None if they take none.
    """

    rotary_table: Tensor | None

    def __init__(self, network: Any, paths: Sequence[str], rotary: Rotary | None) -> None:
        super().__init__()
        self.paths = tuple(paths)
        for path in paths:
            *parents, name = path.split(".")
            holder: nn.Module = self
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(name, network.get_submodule(path))
        # Every stage has a copy of a constant table: stages then pass one tensor, and any prefix of them is cacheable.
        table = None if rotary is None or rotary.table is None else rotary.table.clone()
        self.register_buffer("rotary_table", table, persistent=False)
        # A trained table is computed with parameters of the first stage. In a tuple, torch does not register the module
        # a second time, so the parameters have one name, and freezing the first stage freezes them.
        self.rotary: tuple[Any, ...] = (
            () if rotary is None or rotary.table is not None else (rotary.module, rotary.grid)
        )
        # Runs of older versions numbered the layers of a stage.
        _rename_on_load(self, {f"{number}.": f"{path}." for number, path in enumerate(paths)})

    def forward(self, values: Any) -> Any:
        """Run the layers."""
        for path in self.paths:
            values = self.get_submodule(path)(values, **self._side_inputs(path))
        return values

    def _side_inputs(self, path: str) -> dict[str, Tensor]:
        if not path.startswith("blocks."):
            return {}
        if self.rotary:
            module, grid = self.rotary
            return {"rope": module.get_embed(grid)[int(path.split(".")[1])]}
        return {} if self.rotary_table is None else {"rope": self.rotary_table}


def _groups(network: Any, *, coarse: bool) -> dict[str, float]:
    """Return the number of the group of each parameter. Numbers rise from the input to the output."""
    from timm.models import group_parameters

    if not hasattr(network, "group_matcher"):
        return {}
    groups = group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)
    return {name: number for name, number in groups.items() if isinstance(number, int | float)}


def _links(network: Any, groups: Mapping[str, float], images: Tensor) -> Sequence[str]:
    """Return the paths of the layers that form a chain from the images to the features; empty if there is no chain."""
    embeds = embeds_patches(network)
    paths = [path for path in _layers(network, groups) if not embeds or path.split(".")[0] not in STEM]
    layers = {path: network.get_submodule(path) for path in paths}
    # The input of norm_pre are patches with positions added.
    first = {"norm_pre": network.norm_pre} if embeds and hasattr(network, "norm_pre") else {}
    run = network.eval().forward_features
    given = None if embeds else images
    side_inputs = embeds and getattr(network, "rope", None) is not None
    return (find_chain(first | layers, lambda: run(images), given, side_inputs=side_inputs) or ())[len(first) :]


def _has_same_output(network: Any, stages: Chain, images: Tensor) -> bool:
    """Return whether the stages run and return features of the same shape as the model, on the meta device.

    Layers of some models return dictionaries or tuples, which the model itself takes apart before the next layer.
    """
    values: Any = images
    with torch.no_grad():
        expected = _complete(network, images)
        try:
            for stage in split(network, stages, images).values():
                values = stage(values)
                if not isinstance(values, Tensor):
                    return False
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
    return bool(values.shape == expected.shape)


def _layers(network: nn.Module, groups: Mapping[str, float], prefix: str = "") -> list[str]:
    """Return the paths of a module's children, or of their children if these belong to several groups."""
    paths: list[str] = []
    for name, child in network.named_children():
        path = f"{prefix}{name}"
        numbers = {number for parameter, number in groups.items() if parameter.startswith(f"{path}.")}
        paths += _layers(child, groups, f"{path}.") if len(numbers) > 1 else [path]
    return paths


def _name_stages(
    links: Iterable[str], groups: Mapping[str, float], coarse: Mapping[str, float], *, stem: list[str]
) -> dict[str, list[str]]:
    """Return the layers of each stage: ``stem``, ``stage1``, ``stage2.0``, ``stage2.1`` ..."""
    stages: dict[tuple[int, int], list[str]] = {(0, 0): stem}
    fine_number = coarse_number = 0.0
    key = (0, 0)
    for path in links:
        fine, resolution = _number(groups, path, fine_number), _number(coarse, path, coarse_number)
        if fine > fine_number:
            key = (key[0] + 1, 0) if resolution > coarse_number else (key[0], key[1] + 1)
            fine_number, coarse_number = fine, max(resolution, coarse_number)
        stages.setdefault(key, []).append(path)
    sizes = [sum(1 for other, _ in stages if other == group) for group, _ in stages]
    names = [
        f"stage{group}.{index}" if size > 1 else f"stage{group}"
        for (group, index), size in zip(stages, sizes, strict=True)
    ]
    return dict(zip(["stem", *names[1:]], stages.values(), strict=True))


def _number(groups: Mapping[str, float], path: str, otherwise: float) -> float:
    return max((number for name, number in groups.items() if name.startswith(f"{path}.")), default=otherwise)


def _rotary(network: Any, images: Tensor) -> Rotary | None:
    """Return the rotary position embedding of a model for images of this size; None if it has none."""
    module = getattr(network, "rope", None)
    if module is None or not embeds_patches(network):
        return None
    height, width = network.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))
    is_trained = any(True for _ in module.parameters())
    table = None if is_trained else module.get_embed(shape=(height, width)).detach()
    return Rotary(table, module, (height, width))


def _rename_on_load(module: nn.Module, prefixes: Mapping[str, str]) -> None:
    """Rename tensors of runs of older versions before they are loaded: new prefix by old prefix, inside the stage."""

    def rename(state_dict: dict[str, Tensor], stage: str, *_: Any) -> None:
        for name in list(state_dict):
            inside = name.removeprefix(stage)
            old = next((old for old in prefixes if name.startswith(stage) and inside.startswith(old)), None)
            if old is not None:
                state_dict[stage + prefixes[old] + inside.removeprefix(old)] = state_dict.pop(name)

    hooked: Any = module
    hooked._register_load_state_dict_pre_hook(rename)


def reduced(
    network: Any, children: Collection[str], function: Callable[..., Any], *, tensors: bool = True
) -> nn.Module:
    """Return a shallow copy of a network that contains only some of its children and computes only a function.

    Args:
        network: Complete network.
        children: Names of the children that the function needs.
        function: Function of the reduced network and its input.
        tensors: Whether the copy contains the parameters and buffers of the network itself, such as ``cls_token``.
    """
    reduced: Any = copy.copy(network)
    reduced._modules = {name: network.get_submodule(name) for name in children}
    if not tensors:
        reduced._parameters, reduced._buffers = {}, {}
    reduced.forward = types.MethodType(function, reduced)  # torch calls the attribute of the object, if there is one
    reduced._load_state_dict_pre_hooks = copy.copy(network._load_state_dict_pre_hooks)
    _rename_on_load(reduced, {"network.": ""})  # as in runs of older versions
    module: nn.Module = reduced
    return module


def _complete(network: Any, images: Tensor) -> Any:
    return type(network).forward(network, images)


def _embed(network: Any, images: Tensor) -> Any:
    values = network.patch_embed(images)
    if not hasattr(network, "_pos_embed"):  # BEiT, which may have relative positions in its blocks only
        values = torch.cat([network.cls_token.expand(len(values), -1, -1), values], dim=1)
        return network.pos_drop(values if network.pos_embed is None else values + network.pos_embed)
    values = network._pos_embed(values)
    if isinstance(values, tuple):  # a model with rotary tables returns them too
        return network.norm_pre(values[0])
    return network.norm_pre(network.patch_drop(values))


def _pool(network: Any, features: Tensor) -> Any:
    return network.forward_head(features, pre_logits=True)
