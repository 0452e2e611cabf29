"""Freeze policies, resolved for a model: which parameters do not change, and which modules stay in eval mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transfer.config.train_settings import BatchNorm, Freeze, Until
from transfer.errors import ConfigError, nearest
from transfer.models.model import BATCH_NORM, Model


@dataclass(frozen=True)
class Frozen:
    """A freeze policy, resolved for a model.

    Args:
        parameters: Names of the frozen parameters.
        stages: Names of the stages in which all parameters and buffers are frozen.
        batch_norm: Mode of batch norm. ``train`` lets the running statistics of frozen layers follow the training data;
            ``eval`` keeps the statistics of all layers in the backbone, also of those whose weights are trained.
    """

    parameters: frozenset[str]
    stages: frozenset[str]
    batch_norm: BatchNorm = "frozen"


def resolve(model: Model, policy: Freeze, batch_norm: BatchNorm = "frozen") -> Frozen:
    """Resolve a freeze policy for a model on any device, including meta.

    Raises:
        ConfigError: A stage does not exist, a pattern matches no parameter, or nothing is left to train. Or
            ``batch_norm: train`` is set, and no batch-norm layer is frozen, or ``eval``, and none is trained.
    """
    names = [name for name, _ in model.named_parameters()]
    parameters, stages = _select(model, names, policy)
    if model.fixed:  # the weights under an adapter are frozen in every phase
        parameters |= model.fixed
        stages |= {
            stage for stage in model.stages if (inside := _in_stage(stage, names)) and parameters.issuperset(inside)
        }
    if parameters.issuperset(names):
        raise ConfigError(
            f"freeze: {_format(policy)} leaves nothing to train",
            available=list(model.layers),
            fix="freeze fewer stages; the head is a stage too",
        )
    frozen = Frozen(parameters, stages, batch_norm)
    if batch_norm == "train" and not any(
        isinstance(inner, BATCH_NORM) for module in _frozen_modules(model, frozen) for inner in module.modules()
    ):
        raise ConfigError(
            "batch_norm: train has no effect: it applies to frozen batch-norm layers, and none is frozen",
            fix="remove it, or freeze a stage with batch norm",
        )
    if batch_norm == "eval" and not _trained_batch_norm(model, frozen):
        raise ConfigError(
            "batch_norm: eval has no effect: it applies to trained batch-norm layers, and the backbone has none",
            fix="remove it, or train a stage with batch norm",
        )
    return frozen


def _trained_batch_norm(model: Model, frozen: Frozen) -> list[nn.Module]:
    """Return the batch-norm layers of the backbone that are not in a frozen module."""
    # A new head has no pretrained statistics to keep.
    backbone = [inner for name, stage in model.stages.items() if name != "head" for inner in stage.modules()]
    frozen_modules = {id(inner) for module in _frozen_modules(model, frozen) for inner in module.modules()}
    return [inner for inner in backbone if isinstance(inner, BATCH_NORM) and id(inner) not in frozen_modules]


def trains_batch_norm(model: Model, policy: Freeze) -> bool:
    """Return whether a freeze policy leaves batch-norm layers of the backbone to train."""
    names = [name for name, _ in model.named_parameters()]
    return bool(_trained_batch_norm(model, Frozen(*_select(model, names, policy))))


def fixed_statistics(model: Model, frozen: Frozen, layer: str) -> bool:
    """Return whether a trained stage or layer has batch norm whose statistics are fixed (``batch_norm: eval``)."""
    layers = {id(layer) for layer in _trained_batch_norm(model, frozen)} if frozen.batch_norm == "eval" else set()
    return any(id(inner) in layers for inner in model.get_submodule(layer).modules())


# Layers without parameters whose output depends on nothing else than their input. Dropout is not among them: in train
# mode its output is random.
_STATELESS = (
    nn.Sequential,
    nn.Identity,
    nn.Flatten,
    nn.ReLU,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
)


def prefix_length(model: Model, frozen: Frozen) -> int:
    """Return the length of the frozen prefix: the number of stages, from the input on, that are worth caching.

    These stages compute the same features in every epoch. A stage that only pools, reshapes or rectifies belongs to
    the frozen stage before it. A last stage that is cheaper to compute than to read from disk is left out: such a
    stage, for example an embedding, has an attribute ``recompute``.
    """
    count = 0
    # Only leading stages count: the input of a frozen stage behind a trained one changes with every step.
    for name, stage in model.stages.items():
        norms = [inner for inner in stage.modules() if isinstance(inner, BATCH_NORM)]
        # Without running statistics, batch norm depends on the other examples of the batch, even in eval mode.
        if norms and (frozen.batch_norm == "train" or not all(norm.track_running_stats for norm in norms)):
            break
        extends_prefix = count and all(isinstance(inner, _STATELESS) for inner in stage.modules())
        if name not in frozen.stages and not extends_prefix:
            break
        count += 1
    count = min(count, len(model) - 1)  # the head computes the outputs, even if it is frozen
    while count and getattr(model[count - 1], "recompute", False):
        count -= 1
    return count


def apply(model: Model, frozen: Frozen) -> None:
    """Freeze exactly these parameters, and keep the modules without a trained parameter in eval mode."""
    # Every parameter is set, because an earlier phase may have frozen others.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen.parameters)
        if name in frozen.parameters:
            parameter.grad = None  # a gradient of the phase before would count in the norm that is clipped
    in_eval = _frozen_modules(model, frozen)
    if frozen.batch_norm == "eval":
        in_eval += _trained_batch_norm(model, frozen)
    model.keep_in_eval(tuple(in_eval), batch_norm=frozen.batch_norm != "train")


def _select(model: Model, names: list[str], policy: Freeze) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the parameters and of the complete stages that a policy freezes."""
    layers = list(model.layers)
    frozen: set[str] = set()
    selected: list[str] = []
    if isinstance(policy, str):
        selected = layers[:-1] if policy == "backbone" else []
    elif isinstance(policy, tuple):
        selected = [layer for name in policy for layer in members(name, layers)]
    elif isinstance(policy, Until):
        selected = layers[: layers.index(members(policy.until, layers)[-1]) + 1]
    else:
        for pattern in policy.parameters:
            try:
                matched = [name for name in names if re.search(pattern, name)]
            except re.error as error:
                raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error
            if not matched:
                raise ConfigError(
                    f"the pattern {pattern!r} matches no parameter",
                    available=layers,
                    fix=f"parameter names start with the name of a stage, for example {names[0]}",
                )
            frozen.update(matched)
    frozen.update(name for layer in selected for name in model.layers[layer])
    # A stage without parameters is complete only if the policy names it.
    complete = [s for s in model.stages if s in selected or ((own := _in_stage(s, names)) and frozen.issuperset(own))]
    return frozenset(frozen), frozenset(complete)


def _in_stage(stage: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{stage}.")]


def members(name: str, stages: Sequence[str]) -> list[str]:
    """Return the stage of that name, or all stages of a group (``image`` of ``image.stem``, ``image.layer1``).

    The same holds for the layers of a single stage (``network.blocks`` of ``network.blocks.0``, ``network.blocks.1``).

    Raises:
        ConfigError: There is no such stage or group.
    """
    matched = [stage for stage in stages if stage == name or stage.startswith(f"{name}.")]
    if not matched:
        close = nearest(name, stages)
        raise ConfigError(
            f"there is no stage called {name!r}",
            available=stages,
            fix=f"did you mean {close!r}?" if close else "name one of the model's stages",
        )
    return matched


def _frozen_modules(model: Model, frozen: Frozen) -> list[nn.Module]:
    """Return the outermost modules without a trained parameter."""
    # Outermost, because eval() and train() apply to all modules inside. Layers inside a partly trained stage count too:
    # frozen batch norm would otherwise update its statistics.
    outermost: list[nn.Module] = [model.stages[stage] for stage in model.stages if stage in frozen.stages]
    covered = {id(inner) for module in outermost for inner in module.modules()}
    # named_modules yields a module before the modules inside it, so the outermost comes first.
    candidates = (
        (f"{stage}.{name}".rstrip("."), inner)
        for stage, module in model.stages.items()
        for name, inner in module.named_modules()
    )
    for prefix, module in candidates:
        names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        # Under an adapter, statistics of the backbone without parameters of their own stay fixed, too.
        is_fixed = bool(model.fixed) and isinstance(module, BATCH_NORM) and not prefix.startswith("head.")
        if (names or is_fixed) and id(module) not in covered and frozen.parameters.issuperset(names):
            outermost.append(module)
            covered.update(id(inner) for inner in module.modules())
    return outermost


def _format(policy: Freeze) -> str:
    if isinstance(policy, str):
        return policy
    return str(list(policy)) if isinstance(policy, tuple) else str(policy.model_dump())


def copy_frozen(source: nn.Module, target: nn.Module, frozen: Frozen) -> None:
    """Copy the frozen parameters of a model into another model with the same parameters."""
    with torch.no_grad():
        for name in frozen.parameters:
            target.get_parameter(name).copy_(source.get_parameter(name))
