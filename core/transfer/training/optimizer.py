"""Parameter groups and the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer.config.torch_classes import TorchClass
from transfer.errors import ConfigError, nearest
from transfer.models.model import BATCH_NORM, Model
from transfer.training.freezing import Frozen

NORMS = (BATCH_NORM, nn.LayerNorm, nn.GroupNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
"""RMSNorm came with torch 2.4."""


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group.

    Args:
        stage: The stage that its parameters belong to.
        lr: Its learning rate.
        parameters: Names of its parameters; none is frozen.
        decays: Weight decay applies to it.
    """

    stage: str
    lr: float
    parameters: tuple[str, ...]
    decays: bool = True


def parameter_groups(
    model: Model,
    frozen: Frozen,
    lr: float | Mapping[str, float],
    no_weight_decay: Collection[Literal["norm", "bias"]] = (),
) -> list[ParameterGroup]:
    """Return parameter groups for every stage that has something to train, from input to output.

    A stage has one group, or two where some of its parameters are left out of weight decay.

    ``lr`` by group: a stage's own name wins, then ``head`` or ``backbone``. With ``layer_decay`` the topmost backbone
    stage with parameters has the rate ``backbone`` (or, where that is not given, ``head`` times the decay), and every
    stage below it that of the one above times the decay (ULMFiT, Howard and Ruder 2018; BEiT, Bao et al. 2021).

    Raises:
        ConfigError: A key of ``lr`` is no group of this model, or a stage that is trained has no learning rate.
    """
    stages = {
        stage: tuple(f"{stage}.{name}" for name, _ in module.named_parameters())
        for stage, module in model.stages.items()
    }
    rates = _rates([stage for stage, names in stages.items() if names or stage == "head"], list(stages), lr)
    found = []
    for stage, names in stages.items():
        trained = tuple(name for name in names if name not in frozen.parameters)
        if not trained:
            continue
        if stage not in rates:
            raise ConfigError(
                f"lr says nothing of the stage {stage!r}, which is trained",
                available=["head", "backbone", *list(stages)[:-1]],
                fix="add backbone: ..., or freeze the stage",
            )
        spared = _no_decay_names(model.stages[stage], no_weight_decay)
        for decays in (True, False):
            members = tuple(name for name in trained if (name.removeprefix(f"{stage}.") in spared) != decays)
            if members:
                found.append(ParameterGroup(stage, rates[stage], members, decays))
    return found


def _no_decay_names(stage: nn.Module, kinds: Collection[str]) -> set[str]:
    """Return the names of a stage's parameters that are left out of weight decay."""
    spared = set()
    for prefix, module in stage.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            bias = name.startswith(("bias", "in_proj_bias"))  # in_proj_bias: of attention
            if ("norm" in kinds and isinstance(module, NORMS)) or ("bias" in kinds and bias):
                spared.add(f"{prefix}.{name}" if prefix else name)
    return spared


def _rates(with_parameters: list[str], stages: list[str], lr: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(lr, Mapping):
        return dict.fromkeys(stages, lr)
    groups = sorted({stage.rpartition(".")[0] for stage in stages if "." in stage})
    known = ["head", "backbone", "layer_decay", *groups, *stages[:-1]]
    for key in lr:
        if key not in known:
            close = nearest(key, known)
            fix = f"did you mean {close!r}?" if close else None
            raise ConfigError(f"lr names {key!r}, which is no group of this model", available=known, fix=fix)
    decay = lr.get("layer_decay", 1.0)
    top = lr.get("backbone", lr["head"] * decay if "layer_decay" in lr and "head" in lr else None)
    rates: dict[str, float] = {}
    if top is not None:
        below = [stage for stage in with_parameters if stage != "head"][::-1]
        rates = {stage: top * decay**depth for depth, stage in enumerate(below)}
    rates |= {stage: lr[group] for stage in stages if (group := stage.rpartition(".")[0]) in lr}
    return rates | {stage: lr[stage] for stage in stages if stage in lr}


def build_optimizer(
    model: Model, found: list[ParameterGroup], part: TorchClass, previous: Optimizer | None
) -> Optimizer:
    """Build the optimizer of a phase; parameters that were trained in the phase before keep their state.

    Args:
        model: The model.
        found: What :func:`groups` returned.
        part: Which optimizer, with its options.
        previous: The optimizer of the phase before, or None.

    Raises:
        ConfigError: Torch refuses the options.
    """
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    made = [
        {"params": [parameters[name] for name in g.parameters], "lr": g.lr, "name": g.stage}
        | ({} if g.decays else {"weight_decay": 0.0})
        for g in found
    ]
    try:
        options = {**part.options, "fused": True} if _fused_on_the_cpu(model, part) else part.options
        optimizer: Optimizer = part.cls(made, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"torch's {part.cls.__name__} refuses its options: {error}") from error
    if previous is not None:
        kept: dict[Tensor, Any] = {
            p: previous.state[p] for g in optimizer.param_groups for p in g["params"] if p in previous.state
        }
        optimizer.state.update(kept)
    return optimizer


def _fused_on_the_cpu(model: Model, part: TorchClass) -> bool:
    """Say whether to take torch's fused kernel of an optimizer, a tenth of the time: the config leaves the choice.

    On a GPU torch chooses well by itself; on the CPU it would go through the parameters one operation at a time.
    """
    if torch.__version__ < "2.4" or "fused" not in inspect.signature(part.cls).parameters:
        return False
    if any(part.options.get(key) is not None for key in ("fused", "foreach", "differentiable")):
        return False
    # Torch itself looks at the first parameter alone, and at no gradient, which an embedding may make sparse.
    dense = not any(getattr(module, "sparse", False) for module in model.modules())
    return dense and all(p.device.type == "cpu" and p.is_floating_point() for p in model.parameters())


def learning_rates(optimizer: Optimizer | None) -> dict[str, float]:
    """Return the current learning rate of each parameter group by stage."""
    return {} if optimizer is None else {group["name"]: group["lr"] for group in optimizer.param_groups}
