"""What a freeze policy means for a model: which parameters do not change, and which modules stay in eval mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from transfer.config.train_settings import BatchNorm, Freeze, Until
from transfer.errors import ConfigError, nearest
from transfer.models.model import BATCH_NORM, Model


@dataclass(frozen=True)
class Frozen:
    """A freeze policy worked out for one model.

    Args:
        parameters: Names of the parameters that do not change.
        stages: Names of the stages of which nothing changes, parameters and buffers.
        batch_norm: ``train`` lets the statistics of frozen batch-norm layers follow the training data after all.
    """

    parameters: frozenset[str]
    stages: frozenset[str]
    batch_norm: BatchNorm = "frozen"


def resolve(model: Model, policy: Freeze, batch_norm: BatchNorm = "frozen") -> Frozen:
    """Work out a freeze policy for a model (on any device, meta included).

    Raises:
        ConfigError: A stage does not exist, a pattern matches no parameter, nothing is left to train, or there are no
            frozen batch-norm layers whose statistics could follow.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen, whole = _named(model, names, policy)
    if not any(name not in frozen for name in names):
        raise ConfigError(
            f"freeze: {_show(policy)} leaves nothing to train",
            available=list(model.stages),
            fix="freeze fewer stages; the head is a stage too",
        )
    found = Frozen(frozen, whole, batch_norm)
    if batch_norm == "train" and not any(
        isinstance(inner, BATCH_NORM) for module in _frozen_modules(model, found) for inner in module.modules()
    ):
        raise ConfigError(
            "batch_norm: train lets frozen batch-norm layers follow the data, and none is frozen",
            fix="remove it, or freeze a stage with batch norm",
        )
    return found


_WITHOUT_STATE = (
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
    """Return how many stages, counted from the input, compute the same thing in every epoch and are worth storing.

    A stage that only pools, reshapes or rectifies goes with the frozen one before it. A last stage that is cheaper to
    compute than to read back (a look-up says so by an attribute ``recompute``) is left out.
    """
    count = 0
    for name, stage in model.stages.items():
        norms = [inner for inner in stage.modules() if isinstance(inner, BATCH_NORM)]
        # Without running statistics batch norm depends on the rest of the batch, in eval mode too.
        if norms and (frozen.batch_norm == "train" or not all(norm.track_running_stats for norm in norms)):
            break
        follows = count and all(isinstance(inner, _WITHOUT_STATE) for inner in stage.modules())
        if name not in frozen.stages and not follows:
            break
        count += 1
    count = min(count, len(model) - 1)  # a head that is frozen too still gives the outputs
    while count and getattr(model[count - 1], "recompute", False):
        count -= 1
    return count


def apply(model: Model, frozen: Frozen) -> None:
    """Freeze exactly these parameters and keep the modules that hold nothing else in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen.parameters)
        if name in frozen.parameters:
            parameter.grad = None
    model.keep_in_eval(tuple(_frozen_modules(model, frozen)), batch_norm=frozen.batch_norm == "frozen")


def _named(model: Model, names: list[str], policy: Freeze) -> tuple[frozenset[str], frozenset[str]]:
    stages = list(model.stages)
    if isinstance(policy, str):
        whole = stages[:-1] if policy == "backbone" else []
    elif isinstance(policy, tuple):
        whole = [stage for name in policy for stage in members(name, stages)]
    elif isinstance(policy, Until):
        whole = stages[: stages.index(members(policy.until, stages)[-1]) + 1]
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


def members(name: str, stages: Sequence[str]) -> list[str]:
    """Return the stage of that name, or all stages of the group (``image`` of ``image.stem``, ``image.layer1``).

    Raises:
        ConfigError: There is neither.
    """
    found = [stage for stage in stages if stage == name or stage.startswith(f"{name}.")]
    if not found:
        close = nearest(name, stages)
        raise ConfigError(
            f"there is no stage called {name!r}",
            available=stages,
            fix=f"did you mean {close!r}?" if close else "name one of the model's stages",
        )
    return found


def _frozen_modules(model: Model, frozen: Frozen) -> list[nn.Module]:
    """Return the outermost modules of which nothing is trained."""
    found: list[nn.Module] = [model.stages[stage] for stage in model.stages if stage in frozen.stages]
    covered = {id(inner) for module in found for inner in module.modules()}
    inside = (
        (f"{stage}.{name}".rstrip("."), inner) for stage, m in model.stages.items() for name, inner in m.named_modules()
    )
    for prefix, module in inside:
        own = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        if own and id(module) not in covered and frozen.parameters.issuperset(own):
            found.append(module)
            covered.update(id(inner) for inner in module.modules())
    return found


def _show(policy: Freeze) -> str:
    if isinstance(policy, str):
        return policy
    return str(list(policy)) if isinstance(policy, tuple) else str(policy.model_dump())
