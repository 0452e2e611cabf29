"""Whether the layers of somebody else's network are a chain, which may then be stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def find_chain(
    layers: Mapping[str, nn.Module], run: Callable[[], Any], given: Tensor | None = None
) -> tuple[str, ...] | None:
    """Return the names of the layers that a network calls, in order, if each hands one tensor on to the next.

    It is looked up, not believed: the network runs (on the meta device that costs next to nothing), and each layer must
    be called once, with the very tensor that the one before it returned and with nothing else but None and False. Of
    a tuple or a list the first is handed on.

    Args:
        layers: Those that may be links of the chain, by name; one that is never called is left out.
        run: Runs the network and returns what must be what the last of them returned.
        given: What the first of them must be given; None: whatever it is given.

    Returns:
        None where the layers are no chain.
    """
    calls: list[tuple[str, Any, Any]] = []

    def note(name: str, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        values = [value for value in (*inputs, *options.values()) if value is not None and value is not False]
        returned = output[0] if isinstance(output, tuple | list) else output
        calls.append((name, values[0] if len(values) == 1 else None, returned))

    handles = [layer.register_forward_hook(partial(note, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    names = tuple(name for name, _, _ in calls)
    if not names or len(set(names)) < len(names):
        return None
    value = calls[0][1] if given is None else given
    for _, received, returned in calls:
        if received is not value:
            return None
        value = returned
    return names if value is result else None
