"""Detection of sequential layers in a network of another library, which can then be stages."""

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
