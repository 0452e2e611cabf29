"""Parameter groups, optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import Dense
from torch import nn
from torch.optim import Optimizer

from transfer import ConfigError
from transfer.config import TorchPart
from transfer.freezing import Frozen
from transfer.heads import Linear
from transfer.model import Model
from transfer.optim import OPTIMIZERS, SCHEDULERS, Schedule, build_optimizer, groups

NOTHING = Frozen(frozenset(), frozenset())


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    backbone = Dense()
    return Model(backbone, Linear(backbone.features, 2))


def freeze(model: Model, *stages: str) -> Frozen:
    names = (name for name, _ in model.named_parameters() if name.split(".")[0] in stages)
    return Frozen(frozenset(names), frozenset(stages))


def rates(model: Model, lr: float | Mapping[str, float], frozen: Frozen = NOTHING) -> dict[str, float]:
    return {group.stage: group.lr for group in groups(model, frozen, lr)}


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (0.1, {"first": 0.1, "second": 0.1, "third": 0.1, "head": 0.1}),
        ({"head": 0.1, "backbone": 0.01}, {"first": 0.01, "second": 0.01, "third": 0.01, "head": 0.1}),
        (
            {"head": 0.1, "backbone": 0.01, "second": 0.5},
            {"first": 0.01, "second": 0.5, "third": 0.01, "head": 0.1},
        ),
        (
            {"head": 0.8, "backbone": 0.4, "layer_decay": 0.5},
            {"first": 0.1, "second": 0.2, "third": 0.4, "head": 0.8},
        ),
        ({"head": 0.8, "layer_decay": 0.5}, {"first": 0.1, "second": 0.2, "third": 0.4, "head": 0.8}),
        (
            {"first": 0.1, "second": 0.2, "third": 0.3, "head": 0.4},
            {"first": 0.1, "second": 0.2, "third": 0.3, "head": 0.4},
        ),
    ],
)
def test_learning_rates_by_group(model: Model, lr: Any, expected: dict[str, float]) -> None:
    assert rates(model, lr) == pytest.approx(expected)


def test_frozen_stages_have_no_group(model: Model) -> None:
    assert rates(model, {"head": 0.1}, freeze(model, "first", "second", "third")) == {"head": 0.1}


def test_layer_decay_counts_frozen_stages_too(model: Model) -> None:
    found = rates(model, {"head": 0.8, "layer_decay": 0.5}, freeze(model, "second"))
    assert found == pytest.approx({"first": 0.1, "third": 0.4, "head": 0.8})


def test_layer_decay_passes_over_stages_without_parameters(model: Model) -> None:
    backbone = Dense()
    backbone.stages.add_module("pool", nn.Identity())
    found = rates(Model(backbone, Linear(backbone.features, 2)), {"head": 0.8, "layer_decay": 0.5})
    assert found == pytest.approx({"first": 0.1, "second": 0.2, "third": 0.4, "head": 0.8})


def test_groups_hold_every_trained_parameter_once(model: Model) -> None:
    frozen = freeze(model, "second")
    names = [name for group in groups(model, frozen, 0.1) for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters() if name not in frozen.parameters)


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"heda": 0.1, "backbone": 0.1}, "lr names 'heda'"),
        ({"head": 0.1, "fourth": 0.1}, "lr names 'fourth'"),
        ({"head": 0.1}, "lr says nothing of the stage 'first'"),
        ({"backbone": 0.1}, "lr says nothing of the stage 'head'"),
        ({"first": 0.1, "head": 0.1}, "lr says nothing of the stage 'second'"),
    ],
)
def test_wrong_learning_rates(model: Model, lr: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        groups(model, NOTHING, lr)


def optimizer(
    model: Model, name: str = "sgd", lr: Any = 0.1, before: Optimizer | None = None, **options: Any
) -> Optimizer:
    part = TorchPart(name, OPTIMIZERS[name], options)
    return build_optimizer(model, groups(model, NOTHING, lr), part, before)


def step(model: Model, made: Optimizer) -> None:
    model(torch.randn(6, 4)).square().mean().backward()
    made.step()
    made.zero_grad()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_by_name_takes_a_step(model: Model, name: str) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer(model, name, 0.01))
    assert not torch.equal(before["head.output.weight"], model.state_dict()["head.output.weight"])


def test_groups_are_real_parameter_groups(model: Model) -> None:
    made = optimizer(model, lr={"head": 0.1, "backbone": 0.01}, momentum=0.9)
    assert [(g["name"], g["lr"], g["momentum"]) for g in made.param_groups] == [
        ("first", 0.01, 0.9),
        ("second", 0.01, 0.9),
        ("third", 0.01, 0.9),
        ("head", 0.1, 0.9),
    ]


def test_options_that_torch_refuses_are_a_config_error(model: Model) -> None:
    with pytest.raises(ConfigError, match="SGD refuses its options"):
        optimizer(model, momentum=-1.0)
    with pytest.raises(ConfigError, match="Adam refuses its options"):
        optimizer(model, "adam", betas=(0.9, 2.0))


def test_state_is_kept_for_parameters_that_go_on(model: Model) -> None:
    part = TorchPart("adam", OPTIMIZERS["adam"], {})
    head_alone = freeze(model, "first", "second", "third")
    first = build_optimizer(model, groups(model, head_alone, 0.1), part, None)
    step(model, first)
    second = build_optimizer(model, groups(model, NOTHING, 0.1), part, first)
    head, lowest = model.get_parameter("head.output.weight"), model.get_parameter("first.0.weight")
    assert torch.equal(second.state[head]["exp_avg"], first.state[head]["exp_avg"])
    assert lowest not in second.state
    step(model, second)
    assert (second.state[head]["step"].item(), second.state[lowest]["step"].item()) == (2, 1)
    third = build_optimizer(model, groups(model, freeze(model, "head"), 0.1), part, second)
    assert head not in third.state
    assert lowest in third.state


def schedule(made: Optimizer, name: str | None, epochs: int = 4, steps: int = 3, **options: Any) -> Schedule:
    part = TorchPart(name, SCHEDULERS[name], options) if name else None
    return Schedule(part, made, epochs=epochs, steps_per_epoch=steps, higher_is_better=True)


def rates_over(model: Model, name: str | None, metrics: tuple[float, ...] = (0.0,) * 4, **options: Any) -> list[float]:
    """Return the learning rate of the head at every step of four epochs of three steps."""
    made = optimizer(model, momentum=0.9)
    plan = schedule(made, name, **options)
    seen = []
    for metric in metrics:
        for _ in range(3):
            seen.append(made.param_groups[-1]["lr"])
            made.step()
            plan.after_step()
        plan.after_epoch(metric)
    return seen


def by_epoch(*values: float) -> list[float]:
    return [value for value in values for _ in range(3)]


def test_no_scheduler_is_a_constant_rate(model: Model) -> None:
    assert rates_over(model, None) == by_epoch(0.1, 0.1, 0.1, 0.1)


def test_step_moves_after_epochs(model: Model) -> None:
    assert rates_over(model, "step", step_size=2, gamma=0.1) == pytest.approx(by_epoch(0.1, 0.1, 0.01, 0.01))


def test_cosine_covers_the_phase(model: Model) -> None:
    half = 0.5**0.5
    expected = by_epoch(0.1, 0.05 * (1 + half), 0.05, 0.05 * (1 - half))
    assert rates_over(model, "cosine") == pytest.approx(expected)


def test_one_cycle_moves_after_every_batch(model: Model) -> None:
    seen = rates_over(model, "one_cycle", pct_start=0.25, div_factor=10, final_div_factor=100)
    assert seen[0] == pytest.approx(0.01)
    assert max(seen) == pytest.approx(0.1)
    assert seen.index(max(seen)) == 2
    assert seen[-1] == pytest.approx(0.01 / 100)
    assert len(set(seen)) == 12


def test_one_cycle_keeps_the_rates_of_the_groups(model: Model) -> None:
    made = optimizer(model, lr={"head": 0.4, "backbone": 0.1}, momentum=0.9)
    schedule(made, "one_cycle", div_factor=10)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.01, 0.01, 0.01, 0.04])


def test_plateau_watches_the_metric(model: Model) -> None:
    seen = rates_over(model, "plateau", metrics=(0.5, 0.6, 0.6, 0.6, 0.7), patience=1, factor=0.5)
    assert seen == pytest.approx(by_epoch(0.1, 0.1, 0.1, 0.1, 0.05))


def test_multistep_moves_after_its_milestones(model: Model) -> None:
    assert rates_over(model, "multisteplr", milestones=(1, 3)) == pytest.approx(by_epoch(0.1, 0.01, 0.01, 0.001))


def test_cyclic_moves_after_every_batch(model: Model) -> None:
    seen = rates_over(model, "cycliclr", base_lr=0.02, step_size_up=2)
    assert seen[:5] == pytest.approx([0.02, 0.06, 0.1, 0.06, 0.02])


def test_options_that_a_scheduler_refuses_are_a_config_error(model: Model) -> None:
    with pytest.raises(ConfigError, match="OneCycleLR refuses its options"):
        schedule(optimizer(model, momentum=0.9), "one_cycle", pct_start=5.0)
