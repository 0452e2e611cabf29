"""What a freeze policy means for a model: which parameters do not change, and which modules stay in eval mode."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from transfer.errors import ConfigError, nearest
from transfer.model import Model

if TYPE_CHECKING:
    from transfer.config import Freeze


@dataclass(frozen=True)
class Frozen:
    """A freeze policy worked out for one model.

    Args:
        parameters: Names of the parameters that do not change.
        stages: Names of the stages of which nothing changes, parameters and buffers.
    """

    parameters: frozenset[str]
    stages: frozenset[str]


def resolve(model: Model, policy: Freeze) -> Frozen:
    """Work out a freeze policy for a model (on any device, meta included).

    Raises:
        ConfigError: A stage does not exist, a pattern matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen, whole = _named(model, names, policy)
    if not any(name not in frozen for name in names):
        raise ConfigError(
            f"freeze: {_show(policy)} leaves nothing to train",
            available=list(model.stages),
            fix="freeze fewer stages; the head is a stage too",
        )
    return Frozen(frozen, whole)


def apply(model: Model, frozen: Frozen) -> None:
    """Freeze exactly these parameters and keep the modules that hold nothing else in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen.parameters)
        if name in frozen.parameters:
            parameter.grad = None
    model.keep_in_eval(tuple(_frozen_modules(model, frozen)))


def _named(model: Model, names: list[str], policy: Freeze) -> tuple[frozenset[str], frozenset[str]]:
    stages = list(model.stages)
    if isinstance(policy, str):
        whole = stages[:-1] if policy == "backbone" else []
    elif isinstance(policy, tuple):
        for stage in policy:
            _known(stage, stages)
        whole = list(policy)
    elif hasattr(policy, "until"):
        _known(policy.until, stages)
        whole = stages[: stages.index(policy.until) + 1]
    else:
        frozen: set[str] = set()
        for pattern in policy.parameters:
            try:
                matched = [name for name in names if re.search(pattern, name)]
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
            if not matched:
                raise ConfigError(
                    f"the pattern {pattern!r} matches no parameter",
                    available=stages,
                    fix=f"parameter names begin with a stage's name, for example {names[0]}",
                )
            frozen.update(matched)
        complete = [s for s in stages if (own := _of_stage(s, names)) and frozen.issuperset(own)]
        return frozenset(frozen), frozenset(complete)
    return frozenset(name for stage in whole for name in _of_stage(stage, names)), frozenset(whole)


def _of_stage(stage: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{stage}.")]


def _known(stage: str, stages: list[str]) -> None:
    if stage not in stages:
        close = nearest(stage, stages)
        raise ConfigError(
            f"there is no stage called {stage!r}",
            available=stages,
            fix=f"did you mean {close!r}?" if close else "name one of the model's stages",
        )


def _frozen_modules(model: Model, frozen: Frozen) -> list[nn.Module]:
    """Return the outermost modules of which nothing is trained."""
    found: list[nn.Module] = [model.stages[stage] for stage in model.stages if stage in frozen.stages]
    covered = {id(inner) for module in found for inner in module.modules()}
    for prefix, module in model.named_modules():
        own = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        if prefix and own and id(module) not in covered and frozen.parameters.issuperset(own):
            found.append(module)
            covered.update(id(inner) for inner in module.modules())
    return found


def _show(policy: Freeze) -> str:
    if isinstance(policy, str):
        return policy
    return str(list(policy)) if isinstance(policy, tuple) else str(policy.model_dump())
