"""Layers of networks of other libraries: sequential ones, which can be stages, and those of one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def find_chain(
    layers: Mapping[str, nn.Module], run: Callable[[], Any], given: Tensor | None = None, *, side_inputs: bool = False
) -> tuple[str, ...] | None:
    """Return the names of the layers that a network calls, in order, if they are sequential; None otherwise.

    The network is run to find out (cheaply on the meta device). Each layer must be called once, with the tensor object
    that the previous layer returned and with no other argument but None and False. If a layer returns a tuple or a
    list, its first item is the input of the next layer.

    Args:
        layers: Candidate layers by name. Layers that are never called are left out.
        run: Function that runs the network and returns the output of the last layer.
        given: Required input of the first layer. None allows any input.
        side_inputs: Whether layers may have other arguments after the first one, such as positions.
    """
    calls: list[tuple[str, Any, Any]] = []

    def record(name: str, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        # None and False are the defaults of optional arguments, such as masks that are not used.
        values = [value for value in (*inputs, *options.values()) if value is not None and value is not False]
        returned = output[0] if isinstance(output, tuple | list) else output
        # The tensors themselves: their identity shows whose output a layer receives.
        calls.append((name, values[0] if len(values) == 1 or (values and side_inputs) else None, returned))

    handles = [layer.register_forward_hook(partial(record, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    names = tuple(name for name, _, _ in calls)
    # A layer that is called twice shares its weights between two positions, which a chain cannot express.
    if not names or len(set(names)) < len(names):
        return None
    value = calls[0][1] if given is None else given
    for _, received, returned in calls:
        # The network computes something between two layers, outside of any of them.
        if received is not value:
            return None
        value = returned
    return names if value is result else None


def layers_in(stage: nn.Module) -> dict[str, list[str]]:
    """Return the layers of a network that is one stage, in order of definition: names of parameters by path.

    Layers are the children of the network, and instead of the child with the longest list of numbered blocks, its own
    children and these blocks. Parameters of the network itself, such as ``cls_token``, belong to the first layer.
    """
    sizes = {path: _count_blocks(module) for path, module in stage.named_modules()}
    longest = max(sizes, key=lambda path: sizes[path])
    opened = longest.split(".") if sizes[longest] > 1 else []
    layers: dict[str, list[str]] = {}

    def visit(module: nn.Module, prefix: str, path: list[str]) -> None:
        children = dict(module.named_children())
        for name, child in children.items():
            if path[:1] == [name] or (not opened and len(children) == 1):
                visit(child, f"{prefix}{name}.", path[1:])
            # The blocks of the longest list, and the neighbors of the modules that contain it.
            elif any(True for _ in child.parameters()):
                layers[f"{prefix}{name}"] = []

    visit(stage, "", opened)
    if len(layers) < 2:
        return {}
    for name, _ in stage.named_parameters():
        layers[next((layer for layer in layers if name.startswith(f"{layer}.")), next(iter(layers)))].append(name)
    return {layer: names for layer, names in layers.items() if names}  # shared parameters belong to their first layer


def _count_blocks(module: nn.Module) -> int:
    """Return the number of blocks with parameters in a list of numbered blocks; 0 for other modules."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return 0
    return sum(name.isdigit() and any(True for _ in child.parameters()) for name, child in module.named_children())
