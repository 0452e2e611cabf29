"""Which layers of a network hand on one tensor from each to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transfer import find_chain


class Network(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second, self.third, self.unused = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, inputs: Tensor) -> Any:
        one = self.first(inputs)
        match self.way:
            case "chain":
                return self.third(self.second(one))
            case "other order":
                return self.second(self.third(one))
            case "residual":
                return self.third(self.second(one) + one)
            case "twice":
                return self.third(self.second(self.second(one)))
            case "changed inputs":
                return self.third(self.second(self.first(inputs * 2)))
            case "changed output":
                return self.third(self.second(one)).relu()
        raise AssertionError(self.way)


def found(network: nn.Module, *, any_input: bool = False) -> tuple[str, ...] | None:
    inputs = torch.ones(2, 3)
    return find_chain(dict(network.named_children()), lambda: network(inputs), None if any_input else inputs)


@pytest.mark.parametrize(
    ("way", "names"),
    [
        ("chain", ("first", "second", "third")),
        ("other order", ("first", "third", "second")),
        ("residual", None),
        ("twice", None),
        ("changed inputs", None),
        ("changed output", None),
    ],
)
def test_chain_of_sequential_layers(way: str, names: tuple[str, ...] | None) -> None:
    network = Network(way)
    assert found(network) == names
    assert not any(module._forward_hooks for module in network.modules())


class Told(nn.Module):
    """A layer that may be told something beside its input, and returns a tuple."""

    def forward(self, states: Tensor, mask: Any = None, cached: bool = False) -> tuple[Tensor, None]:
        return states + 1, None


@pytest.mark.parametrize(("told", "names"), [({}, ("0", "1")), ({"cached": False}, ("0", "1")), ({"mask": 1}, None)])
def test_layer_with_more_arguments_breaks_the_chain(told: dict[str, Any], names: tuple[str, ...] | None) -> None:
    layers = nn.ModuleList([Told(), Told()])
    inputs = torch.ones(2)
    modules = dict(layers.named_children())
    assert find_chain(modules, lambda: layers[1](layers[0](inputs)[0], **told)[0], inputs) == names


def test_chain_with_any_first_input() -> None:
    assert found(Network("changed inputs"), any_input=True) is None  # the first is called twice
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert find_chain(dict(network.named_children()), lambda: network(torch.ones(1, 3) * 2)) == ("0", "1")
