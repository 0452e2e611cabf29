"""What is frozen is the same, bit by bit, after training: every registered backbone, every stage as the boundary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from backbone_cases import Case, cases, head
from torch import Tensor
from torch.optim import Optimizer

from transfer import ConfigError
from transfer.freezing import Frozen, apply, prefix_length, resolve
from transfer.model import BATCH_NORM, Model
from transfer.optim import OPTIMIZERS, TorchPart, build_optimizer, groups
from transfer.settings import Freeze, Parameters, Until

every = pytest.mark.parametrize("case", cases(training=True))
WITH_BATCH_NORM = [parameter for parameter in cases(training=True) if "resnet" in parameter.values[0].name]
STEPS = 2


def digests(model: Model) -> dict[str, str]:
    """Return a digest of the bits of every parameter and buffer."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for name, tensor in found}


@dataclass
class Trained:
    """What was seen of a model that was trained for some steps.

    Args:
        until: The last stage that was frozen.
        frozen: As the policy says.
        before, after: Digests.
        in_training_mode: Modules, while it was trained.
        with_gradient: Parameters, before the gradients were dropped.
        with_state: Parameters that the optimizer holds.
        prefix_has_graph: The last frozen stage's output wants a gradient.
    """

    until: str
    frozen: Frozen
    before: dict[str, str]
    after: dict[str, str]
    in_training_mode: set[str]
    with_gradient: set[str]
    with_state: set[str]
    prefix_has_graph: bool

    @property
    def changed(self) -> set[str]:
        return {name for name, digest in self.before.items() if self.after[name] != digest}


@cache
def built(case: Case) -> tuple[Model, dict[str, Tensor], Any]:
    backbone = case.make()
    model = Model(backbone, head(backbone.features))
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}, case.inputs(backbone)


def of(stage: str, names: Any) -> set[str]:
    return {name for name in names if name.startswith(f"{stage}.")}


def train(case: Case, policy: Freeze, until: str = "", batch_norm: Any = "frozen") -> Trained:
    """Train for some steps with a policy, from the same weights each time, and look."""
    model, weights, inputs = built(case)
    apply(model, Frozen(frozenset(), frozenset()))
    model.load_state_dict(weights)
    frozen = resolve(model, policy, batch_norm)
    apply(model, frozen)
    # Weight decay moves every parameter that the optimizer knows, with or without a gradient.
    part = TorchPart("adamw", OPTIMIZERS["adamw"], {"weight_decay": 0.1})
    optimizer: Optimizer = build_optimizer(model, groups(model, frozen, 0.01), part, None)
    before = digests(model)
    with_gradient: set[str] = set()
    torch.manual_seed(0)
    for _ in range(STEPS):
        model.train()
        loss = torch.nn.functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        with_gradient |= {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    known = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in optimizer.state}
    in_training_mode = {name for name, module in model.named_modules() if module.training}
    after = digests(model)
    value, has_graph = inputs, False
    if until:
        for stage in list(model)[: list(model.stages).index(until) + 1]:
            value = stage(value)
        has_graph = any(t.requires_grad or t.grad_fn for t in (value if isinstance(value, tuple) else [value]))
    with_state = {name for name, p in model.named_parameters() if id(p) in known}
    return Trained(until, frozen, before, after, in_training_mode, with_gradient, with_state, has_graph)


@cache
def runs(case: Case) -> tuple[Trained, ...]:
    """Train with every stage of the backbone as the boundary."""
    stages = list(built(case)[0].stages)[:-1]
    return tuple(train(case, Until(until=stage), stage) for stage in stages)


def boundaries(case: Case) -> Iterator[tuple[Trained, list[str], list[str]]]:
    """Yield each run with the names of its frozen and of its other stages."""
    stages = list(built(case)[0].stages)
    for run in runs(case):
        cut = stages.index(run.until) + 1
        yield run, stages[:cut], stages[cut:]


@every
def test_frozen_parameters_and_buffers_are_bit_identical(case: Case) -> None:
    for run, frozen, _ in boundaries(case):
        for stage in frozen:
            assert not of(stage, run.changed), run.until


@every
def test_every_other_stage_is_trained(case: Case) -> None:
    for run, _, others in boundaries(case):
        for stage in others:
            parameters = of(stage, dict(built(case)[0].named_parameters()))
            assert parameters <= run.changed, run.until
        assert of("head", run.changed)


@every
def test_batch_norm_of_other_stages_follows_the_data(case: Case) -> None:
    for run, _, others in boundaries(case):
        for stage in others:
            statistics = {n for n in of(stage, run.before) if n.endswith(("running_mean", "running_var"))}
            assert statistics <= run.changed, run.until


@every
def test_frozen_modules_stay_in_eval_mode_and_no_others(case: Case) -> None:
    modules = dict(built(case)[0].named_modules())
    for run, frozen, _ in boundaries(case):
        expected = {name for name in modules if name.split(".")[0] not in frozen}
        assert run.in_training_mode == expected, run.until


@every
def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(case: Case) -> None:
    parameters = dict(built(case)[0].named_parameters())
    for run, _, others in boundaries(case):
        expected = {name for stage in others for name in of(stage, parameters)}
        assert run.with_gradient == expected, run.until
        assert run.with_state == expected, run.until
        assert run.frozen.parameters == parameters.keys() - expected


@every
def test_no_graph_is_built_over_the_frozen_prefix(case: Case) -> None:
    for run in runs(case):
        assert not run.prefix_has_graph, run.until


@every
def test_the_frozen_stages_are_what_the_cache_may_store(case: Case) -> None:
    model = built(case)[0]
    stages = list(model.stages)
    for run, frozen, _ in boundaries(case):
        count = prefix_length(model, run.frozen)
        beyond = stages[len(frozen) : count]
        assert all(not list(model.stages[stage].parameters()) for stage in beyond), run.until
        left_out = stages[count : len(frozen)]
        assert all(getattr(model.stages[stage], "recompute", False) for stage in left_out), run.until


@every
def test_a_list_freezes_its_stages_alone(case: Case) -> None:
    model = built(case)[0]
    with_parameters = [name for name, stage in model.stages.items() if any(True for _ in stage.parameters())][:-1]
    chosen = tuple(with_parameters[-1:])
    run = train(case, chosen)
    parameters = dict(model.named_parameters())
    assert run.changed & parameters.keys() == {name for name in parameters if name.split(".")[0] not in chosen}
    assert not of(chosen[0], run.changed)


@every
def test_a_pattern_freezes_what_it_matches_alone(case: Case) -> None:
    model = built(case)[0]
    parameters = dict(model.named_parameters())
    run = train(case, Parameters(parameters=("bias",)))
    assert run.changed & parameters.keys() == {name for name in parameters if "bias" not in name}
    with pytest.raises(ConfigError, match="matches no parameter"):
        resolve(model, Parameters(parameters=("^nothing",)))


@pytest.mark.parametrize("case", WITH_BATCH_NORM)
def test_batch_norm_train_moves_running_statistics_and_nothing_else_that_is_frozen(case: Case) -> None:
    model = built(case)[0]
    stages = list(model.stages)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORM)}
    for until in ("stem", "layer2", "layer4"):
        run = train(case, Until(until=until), until, batch_norm="train")
        frozen = stages[: stages.index(until) + 1]
        inside = {name for name in norms if name.split(".")[0] in frozen}
        expected = {
            f"{name}.{buffer}" for name in inside for buffer in ("running_mean", "running_var", "num_batches_tracked")
        }
        assert {name for stage in frozen for name in of(stage, run.changed)} == expected, until
        assert {name for name in run.in_training_mode if name.split(".")[0] in frozen} == inside
        assert not run.prefix_has_graph
        assert run.with_gradient == {name for name, _ in model.named_parameters() if name.split(".")[0] not in frozen}
        assert prefix_length(model, run.frozen) == 0
