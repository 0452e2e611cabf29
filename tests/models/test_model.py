"""A model as one chain of stages."""

from __future__ import annotations

import pytest
import torch
from conftest import Dense, MeanOfSteps, Steps
from torch import nn

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
