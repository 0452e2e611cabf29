"""Checks of a config on the meta device: no data, no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from transfer.config.run_config import RunConfig
from transfer.config.yaml_document import Key
from transfer.data.batch import move
from transfer.errors import ConfigError, PluginError, Problem, UserError
from transfer.feature_cache.loader import reason_not_cached
from transfer.interfaces import Backbone, Dataset, DataSpec, FeatureSpec, Task
from transfer.models.assemble import assemble
from transfer.models.model import BATCH_NORM, Model
from transfer.training import freezing
from transfer.training.experiment import PhasePlan
from transfer.training.mixup import check_mixable
from transfer.training.optimizer import build_optimizer, parameter_groups
from transfer.training.scheduler import Schedule

LARGE_EPOCH_STEPS = 1000
"""Stand in for the steps of an epoch before the data has been counted."""
PLACEHOLDER_CLASSES = ("(class 1)", "(class 2)")
"""Stand in for the classes of a dataset that must be read to know them."""


@dataclass(frozen=True)
class CheckedParts:
    """The parts of a model, fitted together.

    Args:
        dataset: What it learns from; nothing has been read.
        backbone, task: As the config names them.
        model: The stages of backbone and head.
        phases: Worked out for this model.
        shapes: What each stage returns for a batch of two examples, where the backbone knows a typical one.
    """

    dataset: Dataset
    backbone: Backbone
    task: Task
    model: Model
    phases: tuple[PhasePlan, ...]
    shapes: Mapping[str, str]


def preflight(config: RunConfig) -> CheckedParts:
    """Build the model on the meta device and fit everything together: no data, no weights, no memory.

    Raises:
        ConfigError: Parts that do not fit, or freeze policies or learning rates that name nothing; every problem found.
    """
    for tracker in config.trackers:
        tracker.make()
    dataset: Dataset = config.data.make()
    spec = dataset.spec if dataset.spec.classes else replace(dataset.spec, classes=PLACEHOLDER_CLASSES)
    with torch.device("meta"):
        backbone: Backbone = config.backbone.make()
        _check_compatibility(config, spec, backbone)
        task, model = assemble(backbone, config.head, config.task, spec)
    shapes = _run_on_meta(config, backbone, task, model)
    phases = resolve_phases(config, model)
    _refuse_dead_settings(config, backbone, model, phases)
    return CheckedParts(dataset, backbone, task, model, phases, shapes)


def _check_compatibility(config: RunConfig, data: DataSpec, backbone: Backbone) -> None:
    """Refuse parts that do not fit, naming the lines of both."""
    where = {section: config.document.location((section,)) for section in ("data", "backbone", "head", "task")}
    names = {
        "data": f"dataset {config.data.plugin.name!r}",
        "backbone": f"backbone {config.backbone.plugin.name!r}",
        "head": f"head {config.head.plugin.name!r}",
        "task": f"task {config.task.plugin.name!r}",
    }
    problems = []
    for field in sorted(set(backbone.fields) - set(data.fields)):
        message = f"{names['backbone']} takes the field {field!r}, which {names['data']} ({where['data']}) lacks"
        fix = f"choose a backbone for {' or '.join(data.fields)}, or another dataset"
        problems.append(Problem(message, where["backbone"], data.fields, fix))
    if data.target not in config.task.cls.targets:
        wants = " or ".join(sorted(config.task.cls.targets))
        message = (
            f"{names['task']} learns a target of kind {wants}, and {names['data']} ({where['data']}) has {data.target}"
        )
        fix = f"choose a task for {data.target}"
        problems.append(Problem(message, where["task"], fix=fix))
    layout = backbone.features.layout
    if layout not in config.head.cls.layouts:
        wants = " or ".join(sorted(config.head.cls.layouts))
        message = f"{names['head']} takes a {wants}, and {names['backbone']} ({where['backbone']}) gives a {layout}"
        problems.append(Problem(message, where["head"], fix=f"choose a head that takes a {layout}"))
    if problems:
        raise ConfigError.of(problems)


def _run_on_meta(config: RunConfig, backbone: Backbone, task: Task, model: Model) -> dict[str, str]:
    """Send two typical examples through the stages on the meta device, and hold what comes to the contracts."""
    example = backbone.preprocessing.example()
    if example is None:
        return {}
    encoded = backbone.preprocessing.encode([example, example])
    value = move(backbone.preprocessing.collate(encoded), torch.device("meta"))
    if config.train.mix is not None:
        with config.at("train", "mix"):
            check_mixable(value, config.train.mix)
    shapes = {}
    spec = backbone.features
    model.eval()
    with torch.no_grad():
        for name, stage in model.stages.items():
            if name == "head":
                _check_features(config, value, spec)
            value = stage(value)
            shapes[name] = _shape(value)
    if not isinstance(value, torch.Tensor) or value.shape != (2, task.out_features):
        raise PluginError(
            f"head {config.head.plugin.name!r} returns {_shape(value)}, and the task has {task.out_features} outputs",
            where=config.head.where,
            fix="a head returns a float tensor (B, out_features)",
        )
    return shapes


def _check_features(config: RunConfig, value: Any, spec: FeatureSpec) -> None:
    if spec.layout == "vector":
        good = isinstance(value, torch.Tensor) and value.shape == (2, spec.size)
    else:
        good = isinstance(value, tuple) and len(value) == 2 and value[0].dim() == 3 and value[0].shape[2] == spec.size
        good = good and value[1].shape == value[0].shape[:2] and value[1].dtype == torch.bool
    if not good:
        raise PluginError(
            f"backbone {config.backbone.plugin.name!r} returns {_shape(value)}, and says {spec.layout} of {spec.size}",
            where=config.backbone.where,
            fix="a vector is (B, D); a sequence is a pair of (B, T, D) and a bool mask (B, T)",
        )


def _shape(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"({', '.join(['B', *map(str, value.shape[1:])])})"
    return " and ".join(map(_shape, value)) if isinstance(value, tuple) else type(value).__name__


def resolve_phases(config: RunConfig, model: Model) -> tuple[PhasePlan, ...]:
    """Return the phases of a config, resolved for a model."""
    plans, problems = [], []
    stages = [name for name, stage in list(model.stages.items())[:-1] if any(True for _ in stage.parameters())]
    for phase in config.phases(stages):
        try:
            with config.at(*phase.key, "freeze"):
                frozen = freezing.resolve(model, phase.freeze, phase.batch_norm)
            own = (*phase.key, "lr")
            with config.at(*own if config.document.is_set(own) else ("train", "optimizer", "lr")):
                groups = parameter_groups(model, frozen, phase.lr, config.optimizer_options.no_weight_decay)
            plan = PhasePlan(phase.epochs, frozen, groups, phase.scheduler, phase.patience)
            _check_optimizer_and_schedule(config, model, plan, phase.key)
            plans.append(plan)
        except UserError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise ConfigError.of(problems)
    return tuple(plans)


def _refuse_dead_settings(config: RunConfig, backbone: Backbone, model: Model, phases: tuple[PhasePlan, ...]) -> None:
    """Refuse settings that would change nothing, and those that need another machine."""
    train = config.train
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "train.precision: fp16 needs a GPU, which scales its gradients",
            where=config.document.location(("train", "precision")),
            fix="use bf16 or fp32",
        )
    if config.optimizer_options.no_weight_decay and not config.weight_decay:
        raise ConfigError(
            f"no_weight_decay spares parameters from weight decay, and {config.optimizer.name} applies none here",
            where=config.document.location(("train", "optimizer", "no_weight_decay")),
            fix="set weight_decay, or remove no_weight_decay",
        )
    if train.max_tokens is not None and not backbone.preprocessing.encode_once:
        raise ConfigError(
            f"train.max_tokens counts tokens, and what {config.backbone.plugin.name} takes has no length beforehand",
            where=config.document.location(("train", "max_tokens")),
            fix="set train.batch_size instead",
        )
    if train.views is None:
        return
    augments = backbone.preprocessing.augments and train.augment
    reasons = [
        reason_not_cached(
            freezing.prefix_length(model, phase.frozen),
            cache=train.cache != "off",
            augments=augments,
            views=train.views,
            mixed=train.mix is not None,
            batch_norm=model.has_batch_norm,
        )
        for phase in phases
    ]
    dead = "nothing is augmented at random" if not augments else None
    if dead is None and all(reasons):
        dead = reasons[0]
    if dead:
        raise ConfigError(
            f"train.views keeps augmented views of each example, and {dead}",
            where=config.document.location(("train", "views")),
            fix="remove train.views",
        )


def _check_optimizer_and_schedule(config: RunConfig, model: Model, plan: PhasePlan, key: Key) -> None:
    """Find what torch would only refuse once the phase began."""
    with config.at("train", "optimizer"):
        optimizer = build_optimizer(model, plan.groups, config.optimizer, previous=None)
    own = (*key, "scheduler")
    # A scheduler of the phase's own, else the run's; a warm-up that is too long is named there too.
    with config.at(*own if config.document.is_set(own) else ("train", "scheduler")):
        Schedule(
            plan.scheduler,
            optimizer,
            epochs=plan.epochs,
            steps_per_epoch=LARGE_EPOCH_STEPS,
            warmup_epochs=0.0 if config.quick_try else config.train.warmup_epochs,
            higher_is_better=True,
        )
    trained = {name for group in plan.groups for name in group.parameters}
    norms = [
        prefix
        for prefix, module in model.named_modules()
        if isinstance(module, BATCH_NORM) and trained & {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    ]
    if norms and (config.train.max_tokens or config.train.batch_size == 1):
        setting, which = ("batch_size", "")
        if config.train.max_tokens:
            setting, which = ("max_tokens", ", which max_tokens may make")
        raise ConfigError(
            f"batch norm ({norms[0]}) cannot train on batches of one example{which}",
            where=config.document.location(("train", setting)),
            fix="set a larger train.batch_size, or freeze the stages with batch norm",
        )


def treatment(config: RunConfig, model: Model, phase: PhasePlan, stage: str) -> tuple[str, bool]:
    """Return what a phase does with a stage, in words, and whether it trains it."""
    groups = [group for group in phase.groups if group.stage == stage]
    parameters = len(list(model.stages[stage].parameters()))
    if not groups:
        return "frozen" if stage in phase.frozen.stages or parameters else "-", False
    decay = config.weight_decay
    text = f"lr {groups[0].lr:.3g}"
    if decay:
        text += f", decay {decay:g}{'' if all(group.decays for group in groups) else '*'}"
    if sum(len(group.parameters) for group in groups) < parameters:
        text += ", partly frozen"
    return text, True
