"""Freeze policies: frozen parameters and buffers are bit-identical after training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Dense
from torch import nn

import transfer
from transfer import ConfigError
from transfer.builtin.heads import Linear
from transfer.config.check import load_config
from transfer.models.model import Model
from transfer.models.saved_model import read_model
from transfer.training.build import build
from transfer.training.freezing import Frozen, apply, fixed_statistics, prefix_length, resolve


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    backbone = Dense()
    return Model(backbone, Linear(backbone.features, 2, dropout=0.5))


def policy(config: dict[str, Any], text: str) -> Any:
    phases = load_config(config, [f"train.phases=[{{epochs: 1, freeze: {text}}}]"]).train.phases
    assert phases
    return phases[0].freeze


FIRST = {"first.0.weight", "first.0.bias", "first.1.weight", "first.1.bias"}
SECOND = {"second.0.weight", "second.0.bias"}
THIRD = {"third.0.weight", "third.0.bias", "third.1.weight", "third.1.bias"}
POLICIES = [
    ("none", set(), set()),
    ("backbone", FIRST | SECOND | THIRD, {"first", "second", "third"}),
    ("{until: second}", FIRST | SECOND, {"first", "second"}),
    ("[]", set(), set()),
    ("[second]", SECOND, {"second"}),
    ("[first, third]", FIRST | THIRD, {"first", "third"}),
    ("[head]", {"head.output.weight", "head.output.bias"}, {"head"}),
    ("{parameters: ['^second']}", SECOND, {"second"}),
    (
        "{parameters: ['0.bias$', '^third.1']}",
        {"first.0.bias", "second.0.bias", "third.0.bias", "third.1.weight", "third.1.bias"},
        set(),
    ),
]


@pytest.mark.parametrize(("text", "parameters", "stages"), POLICIES)
def test_resolved_policies(
    model: Model, config: dict[str, Any], text: str, parameters: set[str], stages: set[str]
) -> None:
    frozen = resolve(model, policy(config, text))
    assert frozen.parameters == parameters
    assert frozen.stages == stages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{until: secnd}", "there is no stage called 'secnd'"),
        ("[first, fourth]", "there is no stage called 'fourth'"),
        ("{until: head}", "leaves nothing to train"),
        ("[first, second, third, head]", "leaves nothing to train"),
        ("{parameters: ['.']}", "leaves nothing to train"),
        ("{parameters: ['^first', nothing]}", "the pattern 'nothing' matches no parameter"),
        ("{parameters: ['(']}", "is not a regular expression"),
    ],
)
def test_wrong_policies(model: Model, config: dict[str, Any], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", "\\(")):
        resolve(model, policy(config, text))


def test_unknown_stage_suggests_the_nearest(model: Model, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(model, policy(config, "{until: secnd}"))
    (problem,) = caught.value.problems
    assert problem.available == ("first", "second", "third", "head")
    assert problem.fix == "did you mean 'second'?"


def test_wrong_policy_names_its_config_line(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        transfer.check(config, ["train.phases.0.freeze={until: secnd}"])
    assert caught.value.problems[0].where == "override 'train.phases.0.freeze={until: secnd}'"


@pytest.mark.parametrize(("text", "parameters", "stages"), POLICIES)
def test_frozen_parameters_require_no_gradient(
    model: Model, config: dict[str, Any], text: str, parameters: set[str], stages: set[str]
) -> None:
    apply(model, resolve(model, policy(config, text)))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == parameters


def test_frozen_modules_stay_in_eval_mode(model: Model, config: dict[str, Any]) -> None:
    apply(model, resolve(model, policy(config, "{until: second}")))
    model.train()
    training = {name: module.training for name, module in model.named_modules()}
    assert not any(training[name] for name in ("first", "first.1", "second", "second.2"))
    assert all(training[name] for name in ("third", "third.1", "head", "head.dropout"))
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert not model.stages["first"].training


def test_module_without_trained_parameters_stays_in_eval_mode(model: Model, config: dict[str, Any]) -> None:
    apply(model, resolve(model, policy(config, "{parameters: ['^first.1', '^third.0.bias']}")))
    model.train()
    assert not model.get_submodule("first.1").training
    assert model.get_submodule("first").training
    assert model.get_submodule("third.0").training


def test_unfreezing_restores_gradients_and_train_mode(model: Model, config: dict[str, Any]) -> None:
    apply(model, resolve(model, policy(config, "backbone")))
    apply(model, resolve(model, policy(config, "none")))
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.train().modules())


def test_stage_without_parameters_can_be_frozen(config: dict[str, Any]) -> None:
    backbone = Dense()
    backbone.stages.add_module("pool", nn.Dropout(0.5))
    model = Model(backbone, Linear(backbone.features, 2))
    apply(model, resolve(model, policy(config, "[pool]")))
    assert not model.train().stages["pool"].training


@pytest.mark.parametrize(("text", "parameters", "stages"), POLICIES)
def test_frozen_stages_are_bit_identical_after_training(
    config: dict[str, Any], tmp_path: Any, text: str, parameters: set[str], stages: set[str]
) -> None:
    overrides = [f"train.phases=[{{epochs: 2, freeze: {text}}}]", "train.optimizer={name: adamw, lr: 0.01}"]
    before = build(load_config(config, overrides), lambda event: None).experiment.model.state_dict()
    after = read_model(transfer.run(config, overrides, output=tmp_path).folder / "model").model.state_dict()
    for name, tensor in before.items():
        module = name.rpartition(".")[0]
        # Buffers are frozen if all parameters of their module are.
        frozen = name in parameters or parameters >= {f"{module}.weight", f"{module}.bias"}
        assert torch.equal(tensor, after[name]) == frozen, name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", 0),
        ("backbone", 3),
        ("{until: first}", 1),
        ("{until: second}", 2),
        ("[second]", 0),
        ("[first, third]", 1),
        ("[first, head]", 1),
        ("{parameters: ['^first', '^second']}", 2),
        ("{parameters: ['^first.0', '^second']}", 0),
    ],
)
def test_prefix_ends_before_the_first_trained_stage(
    model: Model, config: dict[str, Any], text: str, expected: int
) -> None:
    assert prefix_length(model, resolve(model, policy(config, text))) == expected


def with_stage(stage: nn.Module, name: str = "last") -> Model:
    backbone = Dense()
    backbone.stages.add_module(name, stage)
    return Model(backbone, Linear(backbone.features, 2))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (nn.Flatten(), 4),
        (nn.Sequential(nn.ReLU(), nn.Identity()), 4),
        (nn.Dropout(0.5), 3),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), 3),
        (nn.BatchNorm1d(8, affine=False), 3),
    ],
    ids=["pool", "nested", "dropout", "nested dropout", "statistics"],
)
def test_stateless_stage_extends_the_prefix(config: dict[str, Any], stage: nn.Module, expected: int) -> None:
    model = with_stage(stage)
    assert prefix_length(model, resolve(model, policy(config, "{until: third}"))) == expected
    assert prefix_length(model, resolve(model, policy(config, "none"))) == 0


def test_prefix_excludes_last_stage_with_recompute(config: dict[str, Any]) -> None:
    model = with_stage(nn.Linear(8, 8))
    model.stages["second"].recompute = True  # type: ignore[assignment]
    assert prefix_length(model, resolve(model, policy(config, "{until: second}"))) == 1
    assert prefix_length(model, resolve(model, policy(config, "{until: third}"))) == 3


def batch_norm(model: Model, config: dict[str, Any], text: str) -> Frozen:
    return resolve(model, policy(config, text), "train")


def test_batch_norm_train_updates_only_running_statistics(model: Model, config: dict[str, Any]) -> None:
    apply(model, batch_norm(model, config, "{until: second}"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    training = {name for name, module in model.named_modules() if module.training}
    assert "first.1" in training
    assert not training & {"first", "first.0", "second", "second.2"}
    model(torch.randn(16, 4)).sum().backward()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{name}.{buffer}" for name in ("first.1", "third.1") for buffer in statistics}
    assert model.get_parameter("first.1.weight").grad is None
    assert not any(module.training for module in model.eval().modules())


def test_prefix_ends_before_updated_statistics(model: Model, config: dict[str, Any]) -> None:
    assert prefix_length(model, batch_norm(model, config, "backbone")) == 0
    backbone = Dense()
    backbone.stages[0] = nn.Linear(4, 8)
    other = Model(backbone, Linear(backbone.features, 2))
    assert prefix_length(other, batch_norm(other, config, "backbone")) == 2


@pytest.mark.parametrize("text", ["none", "[second]", "{parameters: ['^first.0', 'bias$']}"])
def test_batch_norm_train_needs_frozen_batch_norm(model: Model, config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match="none is frozen"):
        batch_norm(model, config, text)


def test_batch_norm_eval_trains_weights_with_fixed_statistics(model: Model, config: dict[str, Any]) -> None:
    frozen = resolve(model, policy(config, "[first]"), "eval")
    apply(model, frozen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    training = {name for name, module in model.named_modules() if module.training}
    assert "third" in training
    assert not training & {"first", "third.1"}
    model(torch.randn(16, 4)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.get_parameter("third.1.weight").grad is not None
    assert [fixed_statistics(model, frozen, stage) for stage in model.stages] == [False, False, True, False]
    apply(model, resolve(model, policy(config, "[first]")))
    assert model.train().get_submodule("third.1").training


def test_batch_norm_eval_needs_trained_batch_norm(model: Model, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the backbone has none"):
        resolve(model, policy(config, "backbone"), "eval")


def test_later_phase_freezes_statistics_again(model: Model, config: dict[str, Any]) -> None:
    apply(model, batch_norm(model, config, "backbone"))
    apply(model, resolve(model, policy(config, "backbone")))
    assert not any(module.training for module in model.train().stages["first"].modules())
