"""A model as one chain of stages."""

from __future__ import annotations

import pytest
import torch
from conftest import Dense, MeanOfSteps, Steps
from torch import Tensor, nn

from transfer import PluginError
from transfer.builtin.heads import Linear
from transfer.models.model import Model


def test_model_runs_stages_and_head() -> None:
    backbone = Dense()
    head = Linear(backbone.features, 3)
    model = Model(backbone, head).eval()
    assert list(model.stages) == ["first", "second", "third", "head"]
    inputs = torch.randn(5, 4)
    assert torch.equal(model(inputs), head(backbone.eval()(inputs)))
    assert {name.split(".")[0] for name in model.state_dict()} == set(model.stages)


def test_model_passes_sequence_with_mask() -> None:
    backbone = Steps()
    assert Model(backbone, MeanOfSteps(backbone.features, 2))(torch.randn(5, 4)).shape == (5, 2)


def test_parameters_outside_the_stages_are_refused() -> None:
    backbone = Dense()
    backbone.extra = nn.Linear(2, 2)
    with pytest.raises(PluginError, match=r"outside its stages: extra\.weight, extra\.bias"):
        Model(backbone, Linear(backbone.features, 3))


def test_modules_in_keep_in_eval_ignore_train() -> None:
    backbone = Dense()
    model = Model(backbone, Linear(backbone.features, 3))
    model.keep_in_eval((model.stages["first"],))
    assert model.training
    assert not model.stages["first"].training
    assert not model.train().stages["first"].training
    model.keep_in_eval(())
    assert model.train().stages["first"].training
    assert [name for name, _ in model.named_children()] == ["first", "second", "third", "head"]


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving-average", "cumulative-average"])
def test_recomputed_model_has_the_same_gradients_and_statistics(momentum: float | None) -> None:
    def step(*, recompute: bool) -> tuple[Model, int]:
        torch.manual_seed(0)
        backbone = Dense(dropout=0.5)
        model = Model(backbone, Linear(backbone.features, 3))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = momentum
        model.recompute = recompute
        sizes: list[int] = []
        weights = {id(parameter) for parameter in model.parameters()}

        def store(tensor: Tensor) -> Tensor:
            sizes.append(0 if id(tensor) in weights else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            outputs = model(torch.randn(64, 4))
        outputs.square().sum().backward()
        return model, sum(sizes)

    (plain, stored), (recomputed, stored_less) = step(recompute=False), step(recompute=True)
    assert stored_less < stored / 2
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), name
    for name, buffer in plain.named_buffers():
        assert torch.equal(recomputed.get_buffer(name), buffer), name
