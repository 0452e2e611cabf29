"""Contracts of freezing: a backbone is trained for two steps with each of its stages as the boundary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from transfer.config.torch_classes import OPTIMIZERS, TorchClass
from transfer.config.train_settings import BatchNorm, Freeze, Until
from transfer.models.model import Model
from transfer.testing.backbones import TARGETS, Subject, tensors
from transfer.testing.cases import Case, promise, require
from transfer.training.freezing import Frozen, apply, resolve
from transfer.training.optimizer import build_optimizer, parameter_groups

STEPS = 2


@dataclass
class Trained:
    """Record of a model that was trained for some steps.

    Args:
        until: Name of the last frozen stage.
        frozen: Frozen stages and parameters.
        before: Digests of every parameter and buffer before training.
        after: Digests of every parameter and buffer after training.
        in_training_mode: Names of the modules in training mode.
        with_gradient: Names of the parameters that had a gradient.
        with_state: Names of the parameters in the optimizer.
        prefix_has_graph: Whether the output of the last frozen stage requires a gradient.
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
        """Names of the parameters and buffers that are not bit-identical after training."""
        return {name for name, digest in self.before.items() if self.after[name] != digest}


def digests(model: Model) -> dict[str, str]:
    """Return a digest of the bits of every parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: hashlib.sha256(_bits(tensor)).hexdigest() for name, tensor in named}


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@lru_cache(maxsize=16)
def built(case: Case) -> tuple[Model, dict[str, Tensor], Any]:
    """Return a case's backbone under a head, a copy of its weights, and a batch."""
    subject = Subject(case)
    model = subject.model()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}, subject.inputs


def in_stage(stage: str, names: Iterable[str]) -> set[str]:
    """Return the names that belong to a stage."""
    return {name for name in names if name.startswith(f"{stage}.")}


def train(case: Case, policy: Freeze, until: str = "", batch_norm: BatchNorm = "frozen") -> Trained:
    """Train for some steps with a policy, always from the same weights, and record the result."""
    model, weights, inputs = built(case)
    # The model is cached: undo what the previous run has frozen before the weights are restored.
    apply(model, Frozen(frozenset(), frozenset()))
    model.load_state_dict(weights)
    frozen = resolve(model, policy, batch_norm)
    apply(model, frozen)
    # Weight decay changes every parameter in the optimizer, with or without a gradient.
    part = TorchClass("adamw", OPTIMIZERS["adamw"], {"weight_decay": 0.1})
    optimizer: Optimizer = build_optimizer(model, parameter_groups(model, frozen, 0.01), part, None)
    before = digests(model)
    with_gradient: set[str] = set()
    torch.manual_seed(0)
    for _ in range(STEPS):
        model.train()
        loss = torch.nn.functional.cross_entropy(model(inputs), torch.tensor(TARGETS))
        loss.backward()  # type: ignore[no-untyped-call]
        # Before zero_grad(), which sets gradients to None.
        with_gradient |= {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    in_optimizer |= {id(p) for p in optimizer.state}
    in_training_mode = {name for name, module in model.named_modules() if module.training}
    after = digests(model)
    # A frozen prefix must not record autograd history: this is where freezing saves memory.
    value, has_graph = inputs, False
    if until:
        for stage in list(model)[: list(model.stages).index(until) + 1]:
            value = stage(value)
        has_graph = any(tensor.requires_grad or tensor.grad_fn for tensor in tensors(value))
    with_state = {name for name, p in model.named_parameters() if id(p) in in_optimizer}
    return Trained(until, frozen, before, after, in_training_mode, with_gradient, with_state, has_graph)


@lru_cache(maxsize=16)
def runs(case: Case) -> tuple[Trained, ...]:
    """Train with each stage of the backbone as the boundary."""
    stages = list(built(case)[0].stages)[:-1]
    return tuple(train(case, Until(until=stage), stage) for stage in stages)


def boundaries(case: Case) -> Iterator[tuple[Trained, list[str], list[str]]]:
    """Yield each run with the names of its frozen stages and of the other stages."""
    stages = list(built(case)[0].stages)
    for run in runs(case):
        cut = stages.index(run.until) + 1
        yield run, stages[:cut], stages[cut:]


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5])


@promise("training.freezing.apply", "training")
def frozen_parameters_and_buffers_are_bit_identical(case: Case) -> None:
    """After training, every parameter and buffer of a frozen stage is bit-identical, batch-norm statistics too."""
    for run, frozen, _ in boundaries(case):
        moved = {name for stage in frozen for name in in_stage(stage, run.changed)}
        require(not moved, f"these change although frozen until {run.until!r}: {_list(moved)}")


@promise("training.freezing.apply", "training")
def frozen_modules_stay_in_eval_mode_and_no_others(case: Case) -> None:
    """In training the modules of frozen stages are in eval mode, dropout and batch norm too, and no others are."""
    modules = dict(built(case)[0].named_modules())
    for run, frozen, _ in boundaries(case):
        expected = modules.keys() - {name for stage in frozen for name in {stage, *in_stage(stage, modules)}}
        wrong = run.in_training_mode ^ expected
        require(not wrong, f"these are in the wrong mode if frozen until {run.until!r}: {_list(wrong)}")


@promise("training.freezing.apply", "training")
def frozen_parameters_have_no_gradient_and_no_optimizer_state(case: Case) -> None:
    """A frozen parameter has no gradient and is not in the optimizer; every other one has both."""
    parameters = dict(built(case)[0].named_parameters())
    for run, _, others in boundaries(case):
        expected = {name for stage in others for name in in_stage(stage, parameters)}
        for kind, names in (("a gradient", run.with_gradient), ("optimizer state", run.with_state)):
            require(
                names <= expected, f"these have {kind} although frozen until {run.until!r}: {_list(names - expected)}"
            )
            require(names >= expected, f"these lack {kind} if frozen until {run.until!r}: {_list(expected - names)}")
        require(not run.prefix_has_graph, f"autograd records the stages that are frozen until {run.until!r}")


@promise("training.freezing.apply", "training")
def every_other_stage_is_trained(case: Case) -> None:
    """Every parameter of the other stages changes."""
    parameters = dict(built(case)[0].named_parameters())
    for run, _, others in boundaries(case):
        still = {name for stage in others for name in in_stage(stage, parameters)} - run.changed
        require(not still, f"these do not change if frozen until {run.until!r}: {_list(still)}")
