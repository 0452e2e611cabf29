"""The heads that need no modality."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfer import FeatureSpec, Head
from transfer.builtin.heads import MLP, Attention, Linear

FEATURES = FeatureSpec("vector", 6)
SEQUENCE = FeatureSpec("sequence", 6)


@pytest.mark.parametrize("head", [Linear(FEATURES, 3), MLP(FEATURES, 3), MLP(FEATURES, 3, hidden=(5, 4), dropout=0.5)])
def test_shapes(head: Head) -> None:
    outputs = head(torch.randn(7, 6))
    assert (outputs.shape, outputs.dtype) == ((7, 3), torch.float32)


def test_a_linear_head_is_a_linear_layer() -> None:
    head, inputs = Linear(FEATURES, 3), torch.randn(7, 6)
    assert torch.equal(head(inputs), inputs @ head.output.weight.T + head.output.bias)


def test_mlp_has_the_configured_widths() -> None:
    head = MLP(FEATURES, 3, hidden=(5, 4))
    widths = [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)]
    assert sorted(widths) == [(4, 3), (5, 4), (6, 5)]
    inputs = torch.randn(7, 6)
    first, second = (m for m in head.hidden if isinstance(m, nn.Linear))
    assert torch.allclose(head(inputs), head.output(second(first(inputs).relu()).relu()))


@pytest.mark.parametrize("kind", [Linear, MLP])
def test_dropout_acts_only_in_training(kind: type[Linear | MLP]) -> None:
    head = kind(FEATURES, 3, dropout=0.5)
    inputs = torch.randn(50, 6)
    assert not torch.equal(head(inputs), head(inputs))
    head.eval()
    assert torch.equal(head(inputs), head(inputs))


@pytest.mark.parametrize("kind", [Linear, MLP])
def test_a_head_can_be_checked_without_memory(kind: type[Linear | MLP]) -> None:
    with torch.device("meta"):
        assert kind(FEATURES, 3)(torch.empty(2, 6)).shape == (2, 3)


def sequence() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three sequences of 5, 2 and 1 real steps."""
    torch.manual_seed(0)
    return torch.randn(3, 5, 6), torch.arange(5) < torch.tensor([[5], [2], [1]])


def test_attention_weights_are_zero_at_padding_and_sum_to_one() -> None:
    steps, mask = sequence()
    weights = Attention(SEQUENCE, 2, hidden=4).weights((steps, mask))
    assert not weights[~mask].any()
    assert (weights[mask] > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_attention_is_the_weighted_mean_of_the_papers() -> None:
    steps, mask = sequence()
    head = Attention(SEQUENCE, 2)
    real = steps[1, :2]
    scores = torch.tanh(real @ head.projection.weight.T + head.projection.bias) @ head.query.weight[0]
    mean = (scores.exp() / scores.exp().sum()) @ real
    torch.testing.assert_close(head((steps, mask))[1], head.output(mean))


def test_attention_does_not_see_padding() -> None:
    steps, mask = sequence()
    head = Attention(SEQUENCE, 2)
    outputs = head((steps, mask))
    torch.testing.assert_close(head((steps.masked_fill(~mask[:, :, None], 99.0), mask)), outputs)
    torch.testing.assert_close(head((steps[1:, :2], mask[1:, :2])), outputs[1:])


def test_attention_learns_which_step_counts() -> None:
    torch.manual_seed(0)
    count = 256
    steps, mask = torch.randn(count, 5, 6).sign(), torch.ones(count, 5, dtype=torch.bool)
    steps[:, :, 0] = -1
    marked = torch.arange(count) % 5
    steps[torch.arange(count), marked, 0] = 1
    targets = (steps[torch.arange(count), marked, 1] > 0).long()
    head = Attention(SEQUENCE, 2, hidden=4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head((steps, mask)), targets).backward()
        optimizer.step()
    assert torch.equal(head.weights((steps, mask)).argmax(1), marked)


def test_heads_say_which_layout_they_take() -> None:
    assert (Linear.layouts, MLP.layouts, Attention.layouts) == ({"vector"}, {"vector"}, {"sequence"})


def test_attention_can_be_checked_without_memory() -> None:
    with torch.device("meta"):
        features = torch.empty(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
        assert Attention(SEQUENCE, 3)(features).shape == (2, 3)
