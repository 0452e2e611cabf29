"""What every registered backbone promises."""

from __future__ import annotations

import importlib
import json
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from backbone_cases import Case, cases, head
from torch import Tensor

from transfer import Backbone, Preprocessing, registry
from transfer.heads import Linear
from transfer.loading import move
from transfer.model import Model

every = pytest.mark.parametrize("case", cases())
trained = pytest.mark.parametrize("case", cases(training=True))


@cache
def built(case: Case) -> tuple[Backbone, Any]:
    """Return a backbone in eval mode and a batch; no test changes them."""
    backbone = case.make().eval()
    return backbone, case.inputs(backbone)


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def same(one: Any, other: Any) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return isinstance(one, Tensor) == isinstance(other, Tensor) and all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def outputs(backbone: Backbone, inputs: Any) -> Any:
    return backbone.eval()(inputs)


def test_every_built_in_backbone_is_here() -> None:
    registered = {plugin.name for plugin in registry.plugins("backbone") if plugin.distribution == "transfer"}
    assert registered == {case.values[0].name for case in cases()}
    assert len(registered) >= 6


@every
def test_stages_hold_every_parameter_and_buffer_once(case: Case) -> None:
    backbone, _ = built(case)
    stages = dict(backbone.stages.named_children())
    for kind in ("named_parameters", "named_buffers"):
        staged = [f"stages.{s}.{name}" for s, stage in stages.items() for name, _ in getattr(stage, kind)()]
        assert sorted(staged) == sorted(name for name, _ in getattr(backbone, kind)())
    parameters = [id(p) for stage in stages.values() for p in stage.parameters()]
    assert len(set(parameters)) == len(parameters)  # no two stages share one


@every
def test_forward_is_the_chain_of_stages(case: Case) -> None:
    backbone, inputs = built(case)
    value = inputs
    with torch.no_grad():
        for stage in backbone.stages:
            value = stage(value)
    assert same(value, outputs(backbone, inputs))


def assert_as_declared(backbone: Backbone, value: Any) -> None:
    spec = backbone.features
    if spec.layout == "vector":
        assert isinstance(value, Tensor)
        assert value.shape == (4, spec.size)
        assert value.dtype == torch.float32
        return
    steps, mask = value
    assert steps.shape == (*mask.shape, spec.size)
    assert (len(steps), steps.dtype, mask.dtype) == (4, torch.float32, torch.bool)


@every
def test_features_are_as_declared(case: Case) -> None:
    backbone, inputs = built(case)
    value = outputs(backbone, inputs)
    assert_as_declared(backbone, value)
    assert tensors(value)[0].isfinite().all()
    if backbone.features.layout == "sequence":
        assert value[1].any(1).all()


@every
def test_features_are_as_declared_on_the_meta_device(case: Case) -> None:
    with torch.device("meta"):
        backbone = case.cls(**case.options)
    assert all(tensor.is_meta for tensor in backbone.state_dict().values())
    inputs = move(case.inputs(backbone), torch.device("meta"))
    assert_as_declared(backbone, outputs(backbone, inputs))


@every
def test_examples_do_not_depend_on_their_batch(case: Case) -> None:
    backbone, inputs = built(case)
    together = tensors(outputs(backbone, inputs))
    preprocessing = backbone.preprocessing
    alone = tensors(outputs(backbone, preprocessing.collate(preprocessing.encode(case.values[1:2]))))
    for one, other in zip(alone, together, strict=True):
        if backbone.features.layout == "sequence":
            other = other[:, : one.shape[1]]
        torch.testing.assert_close(one[0], other[1], rtol=1e-3, atol=1e-4 * float(other.float().abs().max()))


@every
def test_the_state_dict_makes_another_one_the_same(case: Case) -> None:
    backbone, inputs = built(case)
    torch.manual_seed(1)
    other = case.cls.from_data(case.values, **case.options)
    assert not same(outputs(other, inputs), outputs(backbone, inputs))
    other.load_state_dict(backbone.state_dict())
    assert same(outputs(other, inputs), outputs(backbone, inputs))


@every
def test_assets_and_state_dict_bring_it_back_without_data(case: Case) -> None:
    backbone, inputs = built(case)
    assets = backbone.assets()
    assert all(isinstance(text, str) for text in assets.values())
    other = case.cls.from_assets(assets, **case.options)
    other.load_state_dict(backbone.state_dict())
    assert same(case.inputs(other), inputs)
    assert same(outputs(other, inputs), outputs(backbone, inputs))
    assert other.features == backbone.features
    assert other.preprocessing.describe() == backbone.preprocessing.describe()


@every
def test_preprocessing_is_deterministic_and_survives_pickling(case: Case) -> None:
    backbone, inputs = built(case)
    torch.manual_seed(99)
    assert same(case.inputs(backbone), inputs)
    copy: Preprocessing = pickle.loads(pickle.dumps(backbone.preprocessing))
    assert same(copy.collate(copy.encode(case.values)), inputs)
    assert copy.describe() == backbone.preprocessing.describe()
    assert [copy.length(v) for v in copy.encode(case.values)] == [
        backbone.preprocessing.length(v) for v in backbone.preprocessing.encode(case.values)
    ]


@every
def test_the_same_seed_gives_the_same_augmentation(case: Case) -> None:
    preprocessing = built(case)[0].preprocessing
    if not preprocessing.augments:
        assert preprocessing.augment("as it is") == "as it is"
        return
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(preprocessing.collate([preprocessing.augment(v) for v in preprocessing.encode(case.values)]))
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


@every
def test_the_example_goes_through(case: Case) -> None:
    backbone, _ = built(case)
    example = backbone.preprocessing.example()
    if example is not None:
        value = outputs(backbone, backbone.preprocessing.collate(backbone.preprocessing.encode([example] * 4)))
        assert_as_declared(backbone, value)


@trained
def test_every_parameter_gets_a_finite_gradient(case: Case) -> None:
    backbone = case.make()
    model = Model(backbone, head(backbone.features)).train()
    outputs = model(case.inputs(backbone))
    torch.nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, stage in model.stages.items():
        gradients = [p.grad for p in stage.parameters() if p.grad is not None]
        assert not gradients or any(g.abs().sum() > 0 for g in gradients), name


@every
def test_models_of_other_libraries_take_its_weights_and_give_its_outputs(case: Case) -> None:
    backbone, inputs = built(case)
    for foreign in backbone.foreign_models(3).values():
        last = head(backbone.features)
        assert isinstance(last, Linear)
        weights = {foreign.names[name]: value for name, value in backbone.state_dict().items()}
        weights |= {f"{foreign.output}.{name}": value for name, value in last.output.state_dict().items()}
        module, _, function = foreign.factory.partition(":")
        theirs = getattr(importlib.import_module(module), function)(**foreign.options)
        theirs.load_state_dict(weights, strict=True)
        assert json.loads(json.dumps(foreign.options)) == foreign.options
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(inputs), last.eval()(outputs(backbone, inputs)))
