"""Parameter groups, optimizers and schedulers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import Dense
from torch import nn
from torch.optim import Optimizer

from transfer import ConfigError
from transfer.builtin.heads import Linear
from transfer.config.run_config import TorchClass
from transfer.config.torch_classes import OPTIMIZERS, SCHEDULERS
from transfer.models.model import Model
from transfer.training.freezing import Frozen
from transfer.training.optimizer import build_optimizer, learning_rates, parameter_groups
from transfer.training.scheduler import Schedule

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
    return {group.stage: group.lr for group in parameter_groups(model, frozen, lr)}


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


def test_layer_decay_skips_stages_without_parameters(model: Model) -> None:
    backbone = Dense()
    backbone.stages.add_module("pool", nn.Identity())
    found = rates(Model(backbone, Linear(backbone.features, 2)), {"head": 0.8, "layer_decay": 0.5})
    assert found == pytest.approx({"first": 0.1, "second": 0.2, "third": 0.4, "head": 0.8})


def test_groups_contain_every_trained_parameter_once(model: Model) -> None:
    frozen = freeze(model, "second")
    names = [name for group in parameter_groups(model, frozen, 0.1) for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters() if name not in frozen.parameters)


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"heda": 0.1, "backbone": 0.1}, "lr names 'heda'"),
        ({"head": 0.1, "fourth": 0.1}, "lr names 'fourth'"),
        ({"head": 0.1}, "lr has no rate for the stage 'first'"),
        ({"backbone": 0.1}, "lr has no rate for the stage 'head'"),
        ({"first": 0.1, "head": 0.1}, "lr has no rate for the stage 'second'"),
    ],
)
def test_wrong_learning_rates_are_refused(model: Model, lr: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parameter_groups(model, NOTHING, lr)


def optimizer(
    model: Model, name: str = "sgd", lr: Any = 0.1, previous: Optimizer | None = None, **options: Any
) -> Optimizer:
    part = TorchClass(name, OPTIMIZERS[name], options)
    return build_optimizer(model, parameter_groups(model, NOTHING, lr), part, previous)


def step(model: Model, made: Optimizer) -> None:
    model(torch.randn(6, 4)).square().mean().backward()
    made.step()
    made.zero_grad()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_makes_a_step(model: Model, name: str) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer(model, name, 0.01))
    assert not torch.equal(before["head.output.weight"], model.state_dict()["head.output.weight"])


# The larger eps keeps gradients that are zero but for rounding from being scaled up to steps.
@pytest.mark.parametrize(("name", "options"), [("adam", {"eps": 0.1}), ("adamw", {"eps": 0.1}), ("sgd", {})])
@pytest.mark.parametrize("own", [{"fused": False}, {"foreach": True}])
def test_fused_kernel_is_used_unless_config_decides(
    model: Model, name: str, options: dict[str, Any], own: dict[str, Any]
) -> None:
    same = copy.deepcopy(model)
    fused, chosen = optimizer(model, name, 0.01, **options), optimizer(same, name, 0.01, **options, **own)
    assert [made.param_groups[0]["fused"] for made in (fused, chosen)] == [True, own.get("fused")]
    for net, made in ((model, fused), (same, chosen)):
        torch.manual_seed(0)
        for _ in range(3):
            step(net, made)
    torch.testing.assert_close(dict(model.state_dict()), dict(same.state_dict()))


def test_no_fused_kernel_for_complex_or_sparse_gradients(model: Model) -> None:
    complex_ = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    for weight, table in ((complex_, None), (None, nn.Embedding(2, 3, sparse=True))):
        net = copy.deepcopy(model)
        net.head.register_parameter("phase", weight)
        net.head.register_module("table", table)
        made = optimizer(net, "sgd", 0.5)
        assert {group["fused"] for group in made.param_groups} == {None}
        loss = table(torch.tensor([1])).sum() if table is not None else (weight * weight.conj()).real.sum()
        before = [parameter.detach().clone() for parameter in net.head.parameters()]
        loss.backward()
        made.step()
        changed = [not torch.equal(old, new) for old, new in zip(before, net.head.parameters(), strict=True)]
        assert changed.count(True) == 1


def test_optimizer_merges_stages_with_the_same_options(model: Model) -> None:
    lr = {"head": 0.1, "backbone": 0.01}
    made = optimizer(model, lr=lr, momentum=0.9)
    assert [(g["stages"], g["lr"], g["momentum"]) for g in made.param_groups] == [
        (("first", "second", "third"), 0.01, 0.9),
        (("head",), 0.1, 0.9),
    ]
    assert learning_rates(made) == {"first": 0.01, "second": 0.01, "third": 0.01, "head": 0.1}


def test_merged_groups_make_the_same_step(model: Model) -> None:
    groups = parameter_groups(model, NOTHING, 0.01, ("norm", "bias"))
    part, states = TorchClass("adamw", OPTIMIZERS["adamw"], {"weight_decay": 0.3}), []
    for before in ((), None):
        net = copy.deepcopy(model)
        made = build_optimizer(net, groups, part, None, trained_before=before)
        torch.manual_seed(0)
        for _ in range(2):
            step(net, made)
        states.append((len(made.param_groups), net.state_dict()))
    (merged, first), (separate, second) = states
    assert (merged, separate) == (2, 8)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_momentum_of_the_previous_phase_is_kept_in_merged_groups(model: Model) -> None:
    # The fused kernel of SGD refuses groups in which only some parameters have a momentum.
    part = TorchClass("sgd", OPTIMIZERS["sgd"], {"momentum": 0.9})
    partly = Frozen(freeze(model, "first").parameters | {"second.0.weight"}, frozenset({"first"}))
    groups = parameter_groups(model, partly, 0.1)
    first = build_optimizer(model, groups, part, None)
    step(model, first)
    before = {name for group in groups for name in group.parameters}
    second = build_optimizer(model, parameter_groups(model, NOTHING, 0.1), part, first, trained_before=before)
    assert [group["stages"] for group in second.param_groups] == [("first", "second"), ("second", "third", "head")]
    step(model, second)


def test_options_refused_by_torch_raise_config_error(model: Model) -> None:
    with pytest.raises(ConfigError, match="SGD refuses its options"):
        optimizer(model, momentum=-1.0)
    with pytest.raises(ConfigError, match="Adam refuses its options"):
        optimizer(model, "adam", betas=(0.9, 2.0))


def test_state_of_shared_parameters_is_kept(model: Model) -> None:
    part = TorchClass("adam", OPTIMIZERS["adam"], {})
    head_alone = freeze(model, "first", "second", "third")
    first = build_optimizer(model, parameter_groups(model, head_alone, 0.1), part, None)
    step(model, first)
    second = build_optimizer(model, parameter_groups(model, NOTHING, 0.1), part, first)
    head, lowest = model.get_parameter("head.output.weight"), model.get_parameter("first.0.weight")
    assert torch.equal(second.state[head]["exp_avg"], first.state[head]["exp_avg"])
    assert lowest not in second.state
    step(model, second)
    assert (second.state[head]["step"].item(), second.state[lowest]["step"].item()) == (2, 1)
    third = build_optimizer(model, parameter_groups(model, freeze(model, "head"), 0.1), part, second)
    assert head not in third.state
    assert lowest in third.state


def schedule(made: Optimizer, name: str | None, epochs: int = 4, steps: int = 3, **options: Any) -> Schedule:
    part = TorchClass(name, SCHEDULERS[name], options) if name else None
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


def test_no_scheduler_keeps_rate_constant(model: Model) -> None:
    assert rates_over(model, None) == by_epoch(0.1, 0.1, 0.1, 0.1)


def test_step_scheduler_steps_after_epochs(model: Model) -> None:
    assert rates_over(model, "step", step_size=2, gamma=0.1) == pytest.approx(by_epoch(0.1, 0.1, 0.01, 0.01))


def test_cosine_scheduler_falls_to_zero_by_step(model: Model) -> None:
    assert rates_over(model, "cosine") == pytest.approx([cosine(step, 12) for step in range(12)])


def test_linear_scheduler_falls_to_zero_by_step(model: Model) -> None:
    expected = [0.1 * (1 - step / 12) for step in range(12)]
    assert rates_over(model, "linear") == pytest.approx(expected)
    assert warmed(model, "linear", 1.0) == pytest.approx([*RISING, *expected])


def test_linear_scheduler_with_options_is_that_of_torch(model: Model) -> None:
    seen = rates_over(model, "linear", start_factor=0.5, total_iters=2)
    assert seen == pytest.approx(by_epoch(0.05, 0.075, 0.1, 0.1))


def test_one_cycle_steps_after_every_batch(model: Model) -> None:
    seen = rates_over(model, "one_cycle", pct_start=0.25, div_factor=10, final_div_factor=100)
    assert seen[0] == pytest.approx(0.01)
    assert max(seen) == pytest.approx(0.1)
    assert seen.index(max(seen)) == 2
    assert seen[-1] == pytest.approx(0.01 / 100)
    assert len(set(seen)) == 12


def test_one_cycle_keeps_rates_of_groups(model: Model) -> None:
    made = optimizer(model, lr={"head": 0.4, "backbone": 0.1}, momentum=0.9)
    schedule(made, "one_cycle", div_factor=10)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.01, 0.04])


def test_plateau_watches_the_metric(model: Model) -> None:
    seen = rates_over(model, "plateau", metrics=(0.5, 0.6, 0.6, 0.6, 0.7), patience=1, factor=0.5)
    assert seen == pytest.approx(by_epoch(0.1, 0.1, 0.1, 0.1, 0.05))


def test_multistep_steps_after_its_milestones(model: Model) -> None:
    assert rates_over(model, "multisteplr", milestones=(1, 3)) == pytest.approx(by_epoch(0.1, 0.01, 0.01, 0.001))


def test_cyclic_steps_after_every_batch(model: Model) -> None:
    seen = rates_over(model, "cycliclr", base_lr=0.02, step_size_up=2)
    assert seen[:5] == pytest.approx([0.02, 0.06, 0.1, 0.06, 0.02])


def test_options_refused_by_scheduler_raise_config_error(model: Model) -> None:
    with pytest.raises(ConfigError, match="OneCycleLR refuses its options"):
        schedule(optimizer(model, momentum=0.9), "one_cycle", pct_start=5.0)


def warmed(
    model: Model, name: str | None, warmup_epochs: float, *, epochs: int = 4, steps: int = 4, **options: Any
) -> list[float]:
    """Return the learning rate of the head at every step."""
    made = optimizer(model, momentum=0.9)
    part = TorchClass(name, SCHEDULERS[name], options) if name else None
    plan = Schedule(
        part, made, epochs=epochs, steps_per_epoch=steps, warmup_epochs=warmup_epochs, higher_is_better=True
    )
    seen = []
    for _ in range(epochs):
        for _ in range(steps):
            seen.append(made.param_groups[-1]["lr"])
            made.step()
            plan.after_step()
        plan.after_epoch(0.0)
    return seen


RISING = [0.02, 0.04, 0.06, 0.08]
"""Learning rates of four warm-up steps before 0.1."""


def test_warmup_rises_linearly_to_the_rate(model: Model) -> None:
    assert warmed(model, None, 1.0) == pytest.approx([*RISING, *[0.1] * 12])


def test_warmup_ends_within_an_epoch(model: Model) -> None:
    assert warmed(model, None, 0.5) == pytest.approx([0.1 / 3, 0.2 / 3, *[0.1] * 14])
    rising = [0.1 * k / 7 for k in range(1, 7)]
    assert warmed(model, None, 1.5) == pytest.approx([*rising, *[0.1] * 10])


def test_warmup_rises_to_rate_of_each_group(model: Model) -> None:
    made = optimizer(model, lr={"head": 0.4, "backbone": 0.1})
    plan = Schedule(None, made, epochs=2, steps_per_epoch=3, warmup_epochs=1.0, higher_is_better=True)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in made.param_groups])
        made.step()
        plan.after_step()
    assert seen[0] == pytest.approx([0.025, 0.1])
    assert seen[3] == pytest.approx([0.1, 0.4])


def test_step_scheduler_starts_after_warmup(model: Model) -> None:
    seen = warmed(model, "step", 1.0, step_size=1, gamma=0.1)
    assert seen == pytest.approx([*RISING, *[0.1] * 4, *[0.01] * 4, *[0.001] * 4])


def cosine(step: int, steps: int) -> float:
    return 0.05 * (1 + math.cos(math.pi * step / steps))


@pytest.mark.parametrize("warmup_epochs", [1.0, 1.1])
def test_cosine_scheduler_spans_steps_after_warmup(model: Model, warmup_epochs: float) -> None:
    """Four warm-up steps, exactly or after rounding."""
    rest = [cosine(step, 12) for step in range(12)]
    assert warmed(model, "cosine", warmup_epochs) == pytest.approx([*RISING, *rest])


def test_cosine_scheduler_after_warmup_of_half_an_epoch(model: Model) -> None:
    rest = [cosine(step, 14) for step in range(14)]
    assert warmed(model, "cosine", 0.5) == pytest.approx([0.1 / 3, 0.2 / 3, *rest])


def test_warmup_shorter_than_half_a_step_is_ignored(model: Model) -> None:
    assert warmed(model, "cosine", 0.1) == pytest.approx([cosine(step, 16) for step in range(16)])


def test_plateau_ignores_epochs_with_warmup(model: Model) -> None:
    seen = warmed(model, "plateau", 2.0, epochs=5, patience=0, factor=0.5)
    assert seen[8:] == pytest.approx([*[0.1] * 8, *[0.05] * 4])


@pytest.mark.parametrize(
    ("name", "warmup_epochs", "message"),
    [
        ("one_cycle", 1.0, "OneCycleLR already contains a warm-up"),
        ("cycliclr", 1.0, "CyclicLR already contains a warm-up"),
        ("cosine", 4.0, "warmup_epochs is too long: expected less than the 4 epochs of a phase, got 4"),
        (None, 9.0, "warmup_epochs is too long"),
    ],
)
def test_warmup_that_does_not_fit_is_refused(
    model: Model, name: str | None, warmup_epochs: float, message: str
) -> None:
    options = {"base_lr": 0.01} if name == "cycliclr" else {}
    with pytest.raises(ConfigError, match=message):
        warmed(model, name, warmup_epochs, **options)


def over(made: Optimizer, plan: Schedule, steps: list[int]) -> list[float]:
    """Return the learning rate of the head at every step of epochs with these numbers of steps."""
    seen = []
    for epoch in steps:
        for _ in range(epoch):
            seen.append(made.param_groups[-1]["lr"])
            made.step()
            plan.after_step()
        plan.after_epoch(0.0)
    return seen


UNEVEN = [3, 5, 4]
"""Number of optimizer steps per epoch."""


def test_one_cycle_over_uneven_epochs(model: Model) -> None:
    made = optimizer(model, momentum=0.9)
    part = TorchClass("one_cycle", SCHEDULERS["one_cycle"], {})
    seen = over(made, Schedule(part, made, epochs=3, steps_per_epoch=UNEVEN, higher_is_better=True), UNEVEN)
    assert len(set(seen)) == 12
    assert seen[-1] == min(seen)


@pytest.mark.parametrize(("warmup_epochs", "steps"), [(1.0, 3), (2.0, 8), (1.6, 6), (2.25, 9)])
def test_warmup_over_uneven_epochs_counts_their_steps(model: Model, warmup_epochs: float, steps: int) -> None:
    made = optimizer(model)
    plan = Schedule(None, made, epochs=3, steps_per_epoch=UNEVEN, warmup_epochs=warmup_epochs, higher_is_better=True)
    rising = [0.1 * k / (steps + 1) for k in range(1, steps + 1)]
    assert over(made, plan, UNEVEN) == pytest.approx([*rising, *[0.1] * (12 - steps)])


@pytest.mark.parametrize("name", [None, "cosine", "plateau"])
def test_schedule_state_is_json(model: Model, name: str | None) -> None:
    part = TorchClass(name, SCHEDULERS[name], {}) if name else None
    made = optimizer(model)
    plan = Schedule(part, made, epochs=4, steps_per_epoch=3, warmup_epochs=1.0, higher_is_better=True)
    made.step()
    plan.after_step()
    state = json.loads(json.dumps(plan.state_dict(), allow_nan=False))
    assert state["warmup_steps"] == 2
    assert state["warmup"]["last_epoch"] == 1


NORMS = {"first.1.weight", "first.1.bias", "third.1.weight", "third.1.bias"}
BIASES = {"first.0.bias", "first.1.bias", "second.0.bias", "third.0.bias", "third.1.bias", "head.output.bias"}


@pytest.mark.parametrize(
    ("kinds", "expected"), [((), set()), (("norm",), NORMS), (("bias",), BIASES), (("norm", "bias"), NORMS | BIASES)]
)
def test_kinds_of_parameters_without_weight_decay(model: Model, kinds: Any, expected: set[str]) -> None:
    found = parameter_groups(model, NOTHING, 0.1, kinds)
    assert {name for group in found if not group.decays for name in group.parameters} == expected
    names = [name for group in found for name in group.parameters]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    part = TorchClass("adamw", OPTIMIZERS["adamw"], {"weight_decay": 0.3})
    made = build_optimizer(model, found, part, None)
    decays = {id(p): group["weight_decay"] > 0 for group in made.param_groups for p in group["params"]}
    assert {name for name, parameter in model.named_parameters() if not decays[id(parameter)]} == expected
    assert all(group["lr"] == 0.1 for group in made.param_groups)


def test_frozen_parameters_are_in_no_group(model: Model) -> None:
    found = parameter_groups(model, freeze(model, "first", "second", "third"), 0.1, ("norm", "bias"))
    assert [(group.stage, group.decays, group.parameters) for group in found] == [
        ("head", True, ("head.output.weight",)),
        ("head", False, ("head.output.bias",)),
    ]


def test_no_weight_decay_for_norms_and_biases() -> None:
    backbone = Dense()
    backbone.stages.add_module("attention", nn.MultiheadAttention(8, 2))
    backbone.stages.add_module("norms", nn.ModuleList([nn.LayerNorm(8), nn.GroupNorm(2, 8)]))
    backbone.stages.add_module("recurrent", nn.LSTM(8, 3))
    model = Model(backbone, Linear(backbone.features, 2))
    found = parameter_groups(model, NOTHING, 0.1, ("norm", "bias"))
    spared = {name for group in found if not group.decays for name in group.parameters}
    assert {name for name in spared if name.startswith("attention")} == {
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }
    assert {name for name in spared if name.startswith("norms")} == {
        f"norms.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    assert {name for name in spared if name.startswith("recurrent")} == {
        "recurrent.bias_ih_l0",
        "recurrent.bias_hh_l0",
    }
