"""Contracts of heads, for each supported layout of features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from transfer.interfaces import FeatureSpec, Head, Layout
from transfer.interfaces.preprocessing import move
from transfer.testing.cases import BATCH, Case, promise, require

SIZE = 8
STEPS = 5
OUT_FEATURES = 3


def _heads(case: Case, out_features: int = OUT_FEATURES) -> Iterator[tuple[Layout, Head, Any]]:
    """Yield a head in eval mode and features, for each layout."""
    component = case.component()
    layouts = component.cls.layouts
    valid = isinstance(layouts, frozenset) and layouts and layouts <= set(get_args(Layout))
    require(valid, f"layouts is {layouts!r}: expected a frozenset of {' and '.join(map(repr, get_args(Layout)))}")
    for layout in sorted(layouts):
        torch.manual_seed(0)
        head = component.make(FeatureSpec(layout, SIZE), out_features)
        yield layout, head.eval(), _features(layout)


def _features(layout: Layout) -> Any:
    generator = torch.Generator().manual_seed(1)
    if layout == "vector":
        return torch.randn(BATCH, SIZE, generator=generator)
    # Sequences of 5, 3, 1 and 2 real steps: one without padding, and one of a single step.
    mask = torch.arange(STEPS) < torch.tensor([[STEPS], [3], [1], [2]])
    return torch.randn(BATCH, STEPS, SIZE, generator=generator), mask


def _require_outputs(layout: str, value: Any, out_features: int) -> None:
    described = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    good = isinstance(value, Tensor) and value.shape == (BATCH, out_features) and value.dtype == torch.float32
    require(good, f"forward returns {described} for a {layout}: expected {(BATCH, out_features)} of torch.float32")


@promise("interfaces.Head", "quick")
def outputs_have_the_tasks_size(case: Case) -> None:
    """Outputs are finite float32 (B, out_features) for every layout in ``layouts`` and any ``out_features``."""
    # 1 as well: a head that squeezes its outputs fails for a single one.
    for out_features in (1, OUT_FEATURES):
        for layout, head, features in _heads(case, out_features):
            value = head(features)
            _require_outputs(layout, value, out_features)
            require(value.isfinite().all(), f"an output for a {layout} is not finite")


@promise("interfaces.Head", "quick")
def it_is_built_on_the_meta_device(case: Case) -> None:
    """The head can be built and run under torch.device("meta"), which is how a config is checked."""
    with torch.device("meta"):
        for layout, head, features in _heads(case):
            real = [name for name, tensor in head.state_dict().items() if not tensor.is_meta]
            require(not real, f"not on the meta device: {', '.join(real[:5])}; create tensors without a device")
            _require_outputs(layout, head(move(features, torch.device("meta"))), OUT_FEATURES)


@promise("interfaces.Head", "quick")
def padding_and_other_examples_do_not_count(case: Case) -> None:
    """In eval mode an example's outputs depend neither on the values at its padding nor on the rest of the batch."""
    for layout, head, features in _heads(case):
        value = head(features)
        if layout == "sequence":
            steps, mask = features
            # Large values, so that even a small weight of the padding shows.
            other = head((steps.masked_fill(~mask.unsqueeze(-1), 9.0), mask))
            require(torch.allclose(value, other, atol=1e-5), "the values at the padding change the outputs")
        first = features[:1] if isinstance(features, Tensor) else tuple(part[:1] for part in features)
        alone = head(first)
        require(
            torch.allclose(value[:1], alone, atol=1e-5), f"other examples in the batch change the outputs ({layout})"
        )


@promise("interfaces.Head", "quick")
def the_state_dict_restores_the_head(case: Case) -> None:
    """A second head with the state dict of the first computes the same outputs."""
    for (layout, head, features), (_, other, _) in zip(_heads(case), _heads(case), strict=True):
        for parameter in head.parameters():
            # Heads with zeros as initial weights would be equal before the state dict is loaded.
            torch.nn.init.normal_(parameter)
        other.load_state_dict(head.state_dict())
        require(torch.equal(other(features), head(features)), f"with the same state dict the outputs differ ({layout})")


@promise("interfaces.Head", "quick")
def gradients_are_finite(case: Case) -> None:
    """In training every parameter has a finite gradient."""
    for _, head, features in _heads(case):
        head.train()(features).square().sum().backward()
        for name, parameter in head.named_parameters():
            require(parameter.grad is not None, f"{name} has no gradient: the outputs do not depend on it")
            require(
                parameter.grad is not None and parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
            )


@promise("interfaces.Head", "quick")
def as_linear_computes_the_same(case: Case) -> None:
    """``as_linear`` returns None, or a linear layer (size, out_features) with the outputs of the head in evaluation."""
    for layout, head, features in _heads(case):
        linear = head.as_linear()
        if linear is None:
            continue
        require(layout == "vector", "as_linear returns a layer for a sequence, whose mask no linear layer takes")
        shape = (linear.in_features, linear.out_features) if isinstance(linear, torch.nn.Linear) else type(linear)
        require(shape == (SIZE, OUT_FEATURES), f"as_linear returns {shape}: expected Linear{(SIZE, OUT_FEATURES)}")
        equal = torch.allclose(linear(features), head(features), atol=1e-5)
        require(equal, "the layer of as_linear and the head compute different outputs")
