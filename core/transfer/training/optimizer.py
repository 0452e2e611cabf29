"""Parameter groups and the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer.config.torch_classes import TorchClass, owner_and_name
from transfer.errors import ConfigError, nearest
from transfer.models.model import BATCH_NORM, Model
from transfer.training.freezing import Frozen

NORMS = (BATCH_NORM, nn.LayerNorm, nn.GroupNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
"""Normalization layers; ``nn.RMSNorm`` exists since torch 2.4."""


@dataclass(frozen=True)
class ParameterGroup:
    """A parameter group of the optimizer.

    Args:
        stage: Name of the stage that contains the parameters. If the network is a single stage whose layers have
            different rates, the name of the layer.
        lr: Learning rate of the group.
        parameters: Names of the parameters; none is frozen.
        decays: Whether weight decay applies.
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
    """Return the parameter groups of all stages with trained parameters, from input to output.

    A stage has one group, or two if some of its parameters are excluded from weight decay.

    In a mapping ``lr``, the name of a stage takes precedence over the group of a fused model (``image``), and that over
    ``head`` and ``backbone``. With ``layer_decay``, the last backbone stage with parameters has the rate ``backbone``,
    by default that of ``head`` times the decay. Every stage before it has the rate of the next stage times the decay
    (ULMFiT, Howard and Ruder 2018; BEiT, Bao et al. 2021).

    Args:
        model: Model to train.
        frozen: Freeze policy, resolved for the model.
        lr: Learning rate of all parameters, or learning rates by stage, group, ``head`` and ``backbone``. If the model
            has an adapter, ``adapter`` is another name of ``backbone``.
        no_weight_decay: Kinds of parameters that are excluded from weight decay.

    Raises:
        ConfigError: A key of ``lr`` does not exist in this model, or a trained stage has no learning rate.
    """
    layers = model.layers
    if model.fixed and isinstance(lr, Mapping) and "adapter" in lr:
        # The adapter contains all trained parameters of the backbone.
        lr = {"backbone": lr["adapter"], **{key: rate for key, rate in lr.items() if key != "adapter"}}
    rates = _rates([layer for layer, names in layers.items() if names or layer == "head"], list(layers), lr)
    no_decay = _no_decay_names(model, no_weight_decay)
    trained = {layer: [n for n in names if n not in frozen.parameters] for layer, names in layers.items()}
    members: dict[tuple[str, float, bool], list[str]] = {}
    for layer, names in trained.items():
        if not names:
            continue
        if layer not in rates:
            raise ConfigError(
                f"lr has no rate for the stage {layer!r}, which is trained",
                available=["head", "backbone", *list(layers)[:-1]],
                fix="add backbone: ..., or freeze the stage",
            )
        # Layers of a single stage are one group if they have the same rate.
        stage = model.stage_of(names[0])
        stage_rates = {rates.get(other) for other, n in trained.items() if n and model.stage_of(n[0]) == stage}
        for decays in (True, False):
            if matching := [name for name in names if (name in no_decay) != decays]:
                key = (stage if len(stage_rates) == 1 else layer, rates[layer], decays)
                members.setdefault(key, []).extend(matching)
    return [ParameterGroup(name, rate, tuple(names), decays) for (name, rate, decays), names in members.items()]


def _no_decay_names(model: Model, kinds: Collection[str]) -> set[str]:
    """Return the names of the parameters that are excluded from weight decay."""
    names = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            is_bias = name.startswith(("bias", "in_proj_bias"))  # nn.MultiheadAttention has an in_proj_bias
            if ("norm" in kinds and isinstance(module, NORMS)) or ("bias" in kinds and is_bias):
                names.add(f"{prefix}.{name}")
    return names


def _rates(with_parameters: list[str], stages: list[str], lr: float | Mapping[str, float]) -> dict[str, float]:
    """Return learning rates by stage, without the stages that ``lr`` leaves out.

    Args:
        with_parameters: Names of the stages with parameters. ``layer_decay`` counts only these.
        stages: Names of all stages.
        lr: Learning rate of all stages, or learning rates by key.
    """
    if not isinstance(lr, Mapping):
        return dict.fromkeys(stages, lr)
    # Every prefix of a name is a group: image of image.stem, network and network.blocks of network.blocks.3.
    groups = sorted(
        {prefix for stage in stages for prefix in _groups_of(stage)}, key=lambda name: (name.count("."), name)
    )
    keys = ["head", "backbone", "layer_decay", *groups, *stages[:-1]]
    for key in lr:
        if key not in keys:
            close = nearest(key, keys)
            fix = f"did you mean {close!r}?" if close else None
            raise ConfigError(f"lr names {key!r}, which is not a stage or group of this model", available=keys, fix=fix)
    decay = lr.get("layer_decay", 1.0)
    last_rate = lr.get("backbone", lr["head"] * decay if "layer_decay" in lr and "head" in lr else None)
    rates: dict[str, float] = {}
    if last_rate is not None:
        # The decay counts from the output down: early layers are the most general and should change least.
        from_last = [stage for stage in with_parameters if stage != "head"][::-1]
        rates = {stage: last_rate * decay**depth for depth, stage in enumerate(from_last)}
    # The more specific key comes later and wins.
    for group in groups:
        if group in lr:
            rates |= {stage: lr[group] for stage in stages if group in _groups_of(stage)}
    return rates | {stage: lr[stage] for stage in stages if stage in lr}


def _groups_of(stage: str) -> list[str]:
    """Return the groups of a stage, from the outermost to the innermost: a.b.c belongs to a and a.b."""
    parts = stage.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def build_optimizer(
    model: Model,
    groups: list[ParameterGroup],
    torch_class: TorchClass,
    previous: Optimizer | None,
    *,
    trained_before: Collection[str] | None = (),
) -> Optimizer:
    """Build the optimizer of a phase.

    Groups with the same options become one: torch's kernels update each group of the optimizer separately.

    Args:
        model: Model to train.
        groups: Parameter groups (:func:`parameter_groups`).
        torch_class: Optimizer class with its options.
        previous: Optimizer of the previous phase: parameters that both phases train keep their state. None starts
            without state.
        trained_before: Names of the parameters that the previous phase trained. They form groups of their own, because
            the fused kernel of SGD refuses groups in which only some parameters have a momentum. None merges no groups.

    Raises:
        ConfigError: torch refuses the options.
    """
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    merged: dict[Any, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        decay = {} if group.decays else {"weight_decay": 0.0}
        for name in group.parameters:
            key = number if trained_before is None else (group.lr, group.decays, name in trained_before)
            torch_group = merged.setdefault(key, {"params": [], "lr": group.lr, "stages": (), **decay})
            torch_group["params"].append(parameters[name])
            if group.stage not in torch_group["stages"]:
                torch_group["stages"] += (group.stage,)
    torch_groups = list(merged.values())
    options = dict(torch_class.options)
    if _use_fused_kernel(model, torch_class):
        options["fused"] = True
    try:
        optimizer: Optimizer = torch_class.cls(torch_groups, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{owner_and_name(torch_class)} refuses its options: {error}") from error
    # Moments of Adam take many steps to estimate: parameters that both phases train keep theirs.
    if previous is not None:
        kept_state: dict[Tensor, Any] = {
            parameter: previous.state[parameter]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in previous.state
        }
        optimizer.state.update(kept_state)
    return optimizer


FUSED_ON_CUDA = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose fused kernel exists for CUDA; that of Adagrad is only for the CPU."""


def _use_fused_kernel(model: Model, torch_class: TorchClass) -> bool:
    """Return whether to use torch's fused kernel.

    On the CPU it takes a tenth of the time of torch's default, a loop over the parameters. On CUDA it is one kernel for
    many parameters, and it does not wait for the device when it skips a step whose fp16 gradients overflowed.
    """
    if torch.__version__ < "2.4" or "fused" not in inspect.signature(torch_class.cls).parameters:
        return False
    if any(torch_class.options.get(key) is not None for key in ("fused", "foreach", "differentiable")):
        return False  # the config decides
    # torch checks only the first parameter, and no gradients: those of a sparse embedding have no fused kernel.
    dense = not any(getattr(module, "sparse", False) for module in model.modules())
    devices = {p.device.type for p in model.parameters()}
    supported = devices == {"cpu"} or (devices == {"cuda"} and torch_class.cls in FUSED_ON_CUDA)
    return dense and supported and all(p.is_floating_point() for p in model.parameters())


def learning_rates(optimizer: Optimizer | None) -> dict[str, float]:
    """Return the current learning rate of each stage with trained parameters."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {stage: group["lr"] for group in groups for stage in group["stages"]}
