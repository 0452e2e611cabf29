"""What a head promises, for each layout of features that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from transfer.data.batch import move
from transfer.interfaces import FeatureSpec, Head, Layout
from transfer.testing.cases import BATCH, Case, promise, require

SIZE = 8
STEPS = 5
OUT_FEATURES = 3


def _heads(case: Case, out_features: int = OUT_FEATURES) -> Iterator[tuple[Layout, Head, Any]]:
    """Yield for each of its layouts a head in eval mode, and features."""
    component = case.component()
    layouts = component.cls.layouts
    known = isinstance(layouts, frozenset) and layouts and layouts <= set(get_args(Layout))
    require(known, f"layouts is {layouts!r}: a frozenset of {' and '.join(map(repr, get_args(Layout)))} belongs there")
    for layout in sorted(layouts):
        torch.manual_seed(0)
        head = component.make(FeatureSpec(layout, SIZE), out_features)
        yield layout, head.eval(), _features(layout)


def _features(layout: Layout) -> Any:
    generator = torch.Generator().manual_seed(1)
    if layout == "vector":
        return torch.randn(BATCH, SIZE, generator=generator)
    mask = torch.arange(STEPS) < torch.tensor([[STEPS], [3], [1], [2]])
    return torch.randn(BATCH, STEPS, SIZE, generator=generator), mask


def _require_outputs(layout: str, value: Any, out_features: int) -> None:
    found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    good = isinstance(value, Tensor) and value.shape == (BATCH, out_features) and value.dtype == torch.float32
    require(good, f"of a {layout} it returns {found}, where {(BATCH, out_features)} of torch.float32 belongs")


@promise("interfaces.Head", "quick")
def outputs_have_the_tasks_size(case: Case) -> None:
    """Outputs are float32 (B, out_features) for every layout in ``layouts`` and any number of outputs, and finite."""
    for out_features in (1, OUT_FEATURES):
        for layout, head, features in _heads(case, out_features):
            value = head(features)
            _require_outputs(layout, value, out_features)
            require(value.isfinite().all(), f"an output of a {layout} is not finite")


@promise("interfaces.Head", "quick")
def it_is_built_on_the_meta_device(case: Case) -> None:
    """It is built and run under torch.device("meta"): so a config is checked."""
    with torch.device("meta"):
        for layout, head, features in _heads(case):
            real = [name for name, tensor in head.state_dict().items() if not tensor.is_meta]
            require(not real, f"these are built in memory: {', '.join(real[:5])}")
            _require_outputs(layout, head(move(features, torch.device("meta"))), OUT_FEATURES)


@promise("interfaces.Head", "quick")
def padding_and_other_examples_do_not_count(case: Case) -> None:
    """In eval mode an example's outputs depend neither on what stands at its padding nor on the rest of the batch."""
    for layout, head, features in _heads(case):
        value = head(features)
        if layout == "sequence":
            steps, mask = features
            other = head((steps.masked_fill(~mask.unsqueeze(-1), 9.0), mask))
            require(torch.allclose(value, other, atol=1e-5), "other numbers at the padding give other outputs")
        first = features[:1] if isinstance(features, Tensor) else tuple(part[:1] for part in features)
        alone = head(first)
        require(torch.allclose(value[:1], alone, atol=1e-5), f"alone, the outputs of an example's {layout} differ")


@promise("interfaces.Head", "quick")
def the_state_dict_makes_another_one_the_same(case: Case) -> None:
    """A head built again, with this one's state dict, computes the same."""
    for (layout, head, features), (_, other, _) in zip(_heads(case), _heads(case), strict=True):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
        other.load_state_dict(head.state_dict())
        require(torch.equal(other(features), head(features)), f"of a {layout} it computes something else")


@promise("interfaces.Head", "quick")
def gradients_are_finite(case: Case) -> None:
    """In training every parameter gets a finite gradient."""
    for _, head, features in _heads(case):
        head.train()(features).square().sum().backward()
        for name, parameter in head.named_parameters():
            require(parameter.grad is not None, f"{name} takes no part in the outputs")
            require(
                parameter.grad is not None and parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
            )
