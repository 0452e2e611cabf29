"""The heads that need no modality."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfer import FeatureSpec, Head
from transfer.heads import MLP, Linear

FEATURES = FeatureSpec("vector", 6)


@pytest.mark.parametrize("head", [Linear(FEATURES, 3), MLP(FEATURES, 3), MLP(FEATURES, 3, hidden=(5, 4), dropout=0.5)])
def test_shapes(head: Head) -> None:
    outputs = head(torch.randn(7, 6))
    assert (outputs.shape, outputs.dtype) == ((7, 3), torch.float32)


def test_a_linear_head_is_a_linear_layer() -> None:
    head, inputs = Linear(FEATURES, 3), torch.randn(7, 6)
    assert torch.equal(head(inputs), inputs @ head.output.weight.T + head.output.bias)


def test_an_mlp_has_the_widths_that_were_asked_for() -> None:
    head = MLP(FEATURES, 3, hidden=(5, 4))
    widths = [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)]
    assert sorted(widths) == [(4, 3), (5, 4), (6, 5)]
    inputs = torch.randn(7, 6)
    first, second = (m for m in head.hidden if isinstance(m, nn.Linear))
    assert torch.allclose(head(inputs), head.output(second(first(inputs).relu()).relu()))


@pytest.mark.parametrize("kind", [Linear, MLP])
def test_dropout_is_in_training_alone(kind: type[Linear | MLP]) -> None:
    head = kind(FEATURES, 3, dropout=0.5)
    inputs = torch.randn(50, 6)
    assert not torch.equal(head(inputs), head(inputs))
    head.eval()
    assert torch.equal(head(inputs), head(inputs))


@pytest.mark.parametrize("kind", [Linear, MLP])
def test_a_head_can_be_checked_without_memory(kind: type[Linear | MLP]) -> None:
    with torch.device("meta"):
        assert kind(FEATURES, 3)(torch.empty(2, 6)).shape == (2, 3)
