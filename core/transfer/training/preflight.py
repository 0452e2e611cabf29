"""Checks of a config on the meta device: no data, no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from transfer.config.component import error_location, plugin_errors
from transfer.config.recipes import FINE_TUNING, MIN_EXAMPLES_FOR_STATISTICS, PROBING
from transfer.config.run_config import RunConfig
from transfer.config.yaml_document import Key
from transfer.errors import ConfigError, PluginError, Problem, UserError
from transfer.feature_cache.loader import reason_not_cached
from transfer.interfaces import Backbone, Dataset, DataSpec, FeatureSpec, Task
from transfer.models.assemble import assemble
from transfer.models.model import BATCH_NORM, Model
from transfer.models.saved_backbone import build_backbone
from transfer.system.devices import resolve_device
from transfer.system.ranks import cpu_is_requested, rank_from_environment
from transfer.training import freezing
from transfer.training.experiment import Phase
from transfer.training.mixup import check_mixable
from transfer.training.optimizer import build_optimizer, parameter_groups
from transfer.training.scheduler import Schedule
from transfer.training.selection import Selection
from transfer.training.solver import reason_not_solved

LARGE_EPOCH_STEPS = 1000
"""Placeholder for the number of steps per epoch, which is unknown before the data is read."""
PLACEHOLDER_CLASSES = ("(class 1)", "(class 2)")
"""Placeholder for the classes of a dataset that are unknown before the data is read."""


@dataclass(frozen=True)
class CheckedParts:
    """The components of a config, checked against each other.

    Args:
        dataset: Dataset; no data has been read.
        backbone: Backbone on the meta device.
        task: Task: loss and metrics.
        model: Model on the meta device: the stages of the backbone and the head.
        phases: Phases, resolved for the model.
        device: Device to train on.
        shapes: Output shape of each stage. Empty if the preprocessing has no typical example.
    """

    dataset: Dataset
    backbone: Backbone
    task: Task
    model: Model
    phases: tuple[Phase, ...]
    device: torch.device
    shapes: Mapping[str, str]


def preflight(config: RunConfig) -> CheckedParts:
    """Build the model on the meta device and check all components against each other, without data and weights.

    Raises:
        ConfigError: Components do not fit together, or freeze policies or learning rates name stages that do not
            exist. The error contains every problem that was found.
        UserError: The device does not exist on this machine.
    """
    # Built only so that their constructors refuse wrong options; the run builds them again.
    for component in (*config.trackers, *([config.sampler] if config.sampler else [])):
        component.make()
    dataset: Dataset = config.data.make()
    spec = dataset.spec
    # The classes of most datasets are unknown until they are read: placeholders give the head a size.
    if not spec.classes:
        spec = replace(spec, classes=PLACEHOLDER_CLASSES, placeholders=True)
    with torch.device("meta"):
        backbone = build_backbone(config.backbone)
        _check_compatibility(config, spec, backbone)
        task, model = assemble(backbone, config.head, config.task, spec, config.adapter)
    _require_meta(config, model)
    # Built only for its check: an unknown metric would otherwise fail after the first epoch.
    with config.at("train", "select"):
        Selection.of(task, config.train.select)
    shapes = _run_on_meta(config, backbone, task, model)
    # Settled again with the number of examples when the data has been read.
    config, _ = settle_recipe(config, backbone, model, task)
    phases = resolve_phases(config, model)
    device = resolve_training_device(config)
    _refuse_dead_settings(config, backbone, model, phases, device)
    return CheckedParts(dataset, backbone, task, model, phases, device, shapes)


def _check_compatibility(config: RunConfig, data: DataSpec, backbone: Backbone) -> None:
    """Refuse components that do not fit together; the error names the config lines of both."""
    where = {section: config.document.location((section,)) for section in ("data", "backbone", "head", "task")}
    names = {
        "data": f"dataset {config.data.plugin.name!r}",
        "backbone": f"backbone {config.backbone.plugin.name!r}",
        "head": f"head {config.head.plugin.name!r}",
        "task": f"task {config.task.plugin.name!r}",
    }
    problems = []
    for field in sorted(set(backbone.fields) - set(data.fields)):
        message = (
            f"{names['backbone']} takes the field {field!r}, which {names['data']} ({where['data']}) does not have"
        )
        fix = f"choose a backbone for {' or '.join(data.fields)}, or another dataset"
        problems.append(Problem(message, where["backbone"], data.fields, fix))
    if data.target not in config.task.cls.targets:
        kinds = " or ".join(sorted(config.task.cls.targets))
        message = (
            f"{names['task']} learns a target of kind {kinds}, and {names['data']} ({where['data']}) has {data.target}"
        )
        fix = f"choose a task for {data.target}"
        problems.append(Problem(message, where["task"], fix=fix))
    layout = backbone.features.layout
    if layout not in config.head.cls.layouts:
        layouts = " or ".join(sorted(config.head.cls.layouts))
        message = f"{names['head']} takes a {layouts}, and {names['backbone']} ({where['backbone']}) gives a {layout}"
        problems.append(Problem(message, where["head"], fix=f"choose a head that takes a {layout}"))
    if problems:
        raise ConfigError.of(problems)


def _require_meta(config: RunConfig, model: Model) -> None:
    """Refuse parameters that existed before the constructor ran, such as those of a global module."""
    for name, stage in model.stages.items():
        if outside := [key for key, parameter in stage.named_parameters() if not parameter.is_meta]:
            block = config.head if name == "head" else config.backbone
            raise PluginError(
                f"{block.kind} {block.plugin.name!r} contains parameters that its constructor did not create: expected "
                f"all on the meta device, where a config is checked, got {', '.join(outside[:5])} of {name!r}",
                where=block.where,
                fix="create modules in the constructor, without a device; copy existing weights in load_pretrained",
            )


def _run_on_meta(config: RunConfig, backbone: Backbone, task: Task, model: Model) -> dict[str, str]:
    """Run two typical examples through the stages on the meta device; check the shapes, and return them by stage."""
    example = backbone.preprocessing.example()
    if example is None:
        return {}
    name = f"backbone {config.backbone.plugin.name!r}"
    with error_location(config.backbone.where), plugin_errors(f"{name} cannot encode the example of its preprocessing"):
        # Two examples: with a batch of one, a stage that drops the batch axis would go unnoticed.
        encoded = backbone.preprocessing.encode([example, example])
        value = backbone.preprocessing.model_inputs(encoded, torch.device("meta"))
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
            value = _run_stage(config, name, stage, value)
            shapes[name] = _shape(value)
    if not isinstance(value, torch.Tensor) or value.shape != (2, task.out_features):
        raise PluginError(
            f"head {config.head.plugin.name!r} returns the wrong shape: expected (B, {task.out_features}), "
            f"got {_shape(value)}",
            where=config.head.where,
            fix="a head returns a float tensor (B, out_features)",
        )
    return shapes


def _run_stage(config: RunConfig, name: str, stage: torch.nn.Module, value: Any) -> Any:
    """Run one stage, or the head, on the meta device; an exception becomes a PluginError."""
    block = config.head if name == "head" else config.backbone
    part = f"{block.kind} {block.plugin.name!r}" + ("" if name == "head" else f", stage {name!r},")
    try:
        with error_location(block.where), plugin_errors(f"{part} cannot process the shape {_shape(value)}"):
            return stage(value)
    except UserError as error:
        if config.adapter is None or name == "head":
            raise
        # Stages that read the weights of a layer, instead of calling it, do not run with an adapted layer.
        raise ConfigError(
            f"the adapter does not fit stage {name!r}: {error.problems[0].message}",
            where=config.adapter.where,
            fix="set adapter.stages or adapter.targets to other layers, or remove adapter",
        ) from error


def _check_features(config: RunConfig, value: Any, spec: FeatureSpec) -> None:
    if spec.layout == "vector":
        matches = isinstance(value, torch.Tensor) and value.shape == (2, spec.size)
    else:
        matches = isinstance(value, tuple) and len(value) == 2 and value[0].dim() == 3
        matches = matches and value[0].shape[2] == spec.size
        matches = matches and value[1].shape == value[0].shape[:2] and value[1].dtype == torch.bool
    if not matches:
        raise PluginError(
            f"backbone {config.backbone.plugin.name!r} returns the wrong features: expected a {spec.layout} of size "
            f"{spec.size}, got {_shape(value)}",
            where=config.backbone.where,
            fix="a vector is (B, D); a sequence is a pair of (B, T, D) and a bool mask (B, T)",
        )


def _shape(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"({', '.join(['B', *map(str, value.shape[1:])])})"
    return " and ".join(map(_shape, value)) if isinstance(value, tuple) else type(value).__name__


def settle_recipe(
    config: RunConfig, backbone: Backbone, model: Model, task: Task, examples: int = 0
) -> tuple[RunConfig, str | None]:
    """Return the config with the options of its recipe that depend on the model and the number of training examples.

    Args:
        config: Checked config.
        backbone: Backbone with its preprocessing.
        model: Model on any device.
        task: Task: loss and metrics.
        examples: Number of training examples; 0 if the data was not read.

    Returns:
        The config, and the reason why a head is trained by gradient steps instead of solved; None otherwise.

    Raises:
        ConfigError: ``solver: lbfgs`` is set, and the head cannot be solved.
    """
    recipe = config.train.recipe
    asked: list[Key] = [("recipe",)] if recipe is not None and recipe.solver == "lbfgs" else []
    asked += [("phases", i) for i, phase in enumerate(config.train.phases or ()) if phase.solver == "lbfgs"]
    may_solve = recipe is not None and recipe.name in PROBING and recipe.solver is None
    reason = reason_not_solved(config, backbone, model, task, examples) if asked or may_solve else None
    # A solver that the config names must work; as a default it falls back to gradient steps.
    if asked and reason is not None:
        raise ConfigError(
            f"solver: lbfgs cannot solve the head: {reason}",
            where=config.document.location(("train", *asked[0], "solver")),
            fix="remove it, so that the head is trained by gradient steps",
        )
    if recipe is None:
        return config, None
    settled: dict[str, Any] = {"solver": "gradient" if reason else "lbfgs"} if may_solve else {}
    if recipe.name in FINE_TUNING and recipe.batch_norm is None:
        # Few examples estimate running statistics badly: trained batch norm keeps those of pretraining.
        is_small = examples < MIN_EXAMPLES_FOR_STATISTICS
        settled["batch_norm"] = "eval" if is_small and freezing.trains_batch_norm(model, "none") else "frozen"
    return config.with_recipe(settled), reason


def resolve_phases(config: RunConfig, model: Model) -> tuple[Phase, ...]:
    """Return the phases of a config, resolved for a model.

    Raises:
        ConfigError: Phases do not fit the model. The error contains the problems of all phases.
    """
    phases, problems = [], []
    trainable = {name for name, _ in model.named_parameters() if name not in model.fixed}
    stages = [layer for layer, names in model.layers.items() if layer != "head" and trainable.intersection(names)]
    for index, settings in enumerate(config.phases(stages)):
        key = config.phase_key(index)
        try:
            with config.at(*key, "freeze"):
                batch_norm = settings.batch_norm
                # A phase of a recipe may train only stages without batch norm.
                if key == ("train", "recipe") and not freezing.trains_batch_norm(model, settings.freeze):
                    batch_norm = "frozen"
                frozen = freezing.resolve(model, settings.freeze, batch_norm)
            lr_key = (*key, "lr")
            with config.at(*lr_key if config.document.is_set(lr_key) else ("train", "optimizer", "lr")):
                assert settings.lr is not None
                groups = parameter_groups(model, frozen, settings.lr, config.optimizer_options.no_weight_decay)
            scheduler = config.phase_scheduler(index)
            phase = Phase(settings.epochs, frozen, groups, scheduler, settings.patience, settings.solver)
            _check_optimizer_and_schedule(config, model, phase, key)
            phases.append(phase)
        except UserError as error:
            # Several phases may have the same problem, such as a wrong key of train.optimizer.lr.
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise ConfigError.of(problems)
    # Every trainable parameter of an adapted backbone belongs to the adapter.
    adapted = {name for name in trainable if not name.startswith("head.")}
    if model.fixed and all(adapted <= phase.frozen.parameters for phase in phases):
        raise ConfigError(
            "the adapter is never trained: every phase freezes its stages",
            where=config.document.location(("adapter",)),
            fix="remove adapter, or add a phase with freeze: none, which trains only the adapter and the head",
        )
    return tuple(phases)


def resolve_training_device(config: RunConfig) -> torch.device:
    """Return the device that ``train.device`` names on this machine.

    Raises:
        UserError: This machine does not have the device.
        ConfigError: ``train.device`` names one GPU, and training is distributed.
    """
    name, location = config.train.device, config.document.location(("train", "device"))
    if ":" in name and rank_from_environment().world_size > 1:
        raise ConfigError(
            f"train.device is {name}: expected auto or cuda in distributed training",
            where=location,
            fix="set train.device: cuda, so that each process uses the GPU of its local rank",
        )
    # `accelerate launch --cpu` does not hide the GPUs from its processes.
    return resolve_device("cpu" if name == "auto" and cpu_is_requested() else name, where=location)


def _refuse_dead_settings(
    config: RunConfig, backbone: Backbone, model: Model, phases: tuple[Phase, ...], device: torch.device
) -> None:
    """Refuse settings without an effect, and settings that this machine does not support."""
    train = config.train
    if train.sync_batch_norm and device.type != "cuda":
        raise ConfigError(
            f"train.sync_batch_norm needs a GPU (CUDA), and the device is {device}",
            where=config.document.location(("train", "sync_batch_norm")),
            fix="remove it; batch_norm: frozen or eval in train.phases needs no statistics of other processes",
        )
    if train.precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"train.precision: fp16 needs a GPU (CUDA), and the device is {device}",
            where=config.document.location(("train", "precision")),
            fix="use bf16 or fp32",
        )
    if config.optimizer_options.no_weight_decay and not config.weight_decay:
        raise ConfigError(
            f"no_weight_decay has no effect, because the weight decay of {config.optimizer.name} is zero",
            where=config.document.location(("train", "optimizer", "no_weight_decay")),
            fix="set weight_decay, or remove no_weight_decay",
        )
    if train.max_tokens is not None and not backbone.preprocessing.encode_once:
        raise ConfigError(
            f"train.max_tokens needs inputs with a length in tokens, which {config.backbone.plugin.name} does not have",
            where=config.document.location(("train", "max_tokens")),
            fix="set train.batch_size instead",
        )
    if train.views is None or train.views == "auto":
        return
    augments = backbone.preprocessing.augments and train.augment
    # The option is dead only if it has no effect in every phase.
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
    reason = "nothing is augmented at random" if not augments else None
    if reason is None and all(reasons):
        reason = reasons[0]
    if reason:
        raise ConfigError(
            f"train.views caches augmented views of each example, which has no effect here: {reason}",
            where=config.document.location(("train", "views")),
            fix="remove train.views",
        )


def _check_optimizer_and_schedule(config: RunConfig, model: Model, phase: Phase, key: Key) -> None:
    """Refuse options that torch refuses at the start of the phase, and batch norm on batches of one example."""
    with config.at("train", "optimizer"):
        # Built for the checks in torch's constructors. The parameters are on the meta device and take no memory.
        optimizer = build_optimizer(model, phase.groups, config.optimizer, previous=None)
    scheduler_key = (*key, "scheduler")
    # The location of the phase's scheduler, otherwise that of the run's: also for a warm-up that is too long.
    with config.at(*scheduler_key if config.document.is_set(scheduler_key) else ("train", "scheduler")):
        Schedule(
            phase.scheduler,
            optimizer,
            epochs=phase.epochs,
            steps_per_epoch=LARGE_EPOCH_STEPS,
            warmup_epochs=0.0 if config.quick_try else config.train.warmup_epochs,
            higher_is_better=True,
        )
    trained = {name for group in phase.groups for name in group.parameters}
    norms = [
        prefix
        for prefix, module in model.named_modules()
        if isinstance(module, BATCH_NORM) and trained & {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    ]
    # In the backbone, `eval` normalizes by stored statistics, which works for a single example.
    if phase.frozen.batch_norm == "eval":
        norms = [prefix for prefix in norms if model.stage_of(prefix) == "head"]
    if norms and (config.train.max_tokens or config.train.batch_size == 1):
        setting, reason = "batch_size", ""
        if config.train.max_tokens:
            setting, reason = "max_tokens", ", which max_tokens allows"
        raise ConfigError(
            f"batch norm ({norms[0]}) cannot train on batches of one example{reason}",
            where=config.document.location(("train", setting)),
            fix="set a larger train.batch_size, or freeze the stages with batch norm",
        )


def treatment(config: RunConfig, model: Model, phase: Phase, stage: str) -> tuple[str, bool]:
    """Describe the treatment of a stage in a phase for a table.

    Args:
        config: Checked config.
        model: Model that the phase is resolved for.
        phase: Phase.
        stage: Name of the stage, or of a layer of a single stage.

    Returns:
        The description, and whether the phase trains the stage.
    """
    parameters = set(model.layers[stage])
    groups = [group for group in phase.groups if parameters.intersection(group.parameters)]
    if not groups:
        return "frozen" if stage in phase.frozen.stages or parameters else "-", False
    if phase.solver == "lbfgs":
        return "solved (L-BFGS)", True
    decay = config.weight_decay
    text = f"lr {groups[0].lr:.3g}"
    if decay:
        text += f", decay {decay:g}{'' if all(group.decays for group in groups) else '*'}"
    if not parameters.isdisjoint(phase.frozen.parameters):
        text += ", partly frozen"
    if freezing.fixed_statistics(model, phase.frozen, stage):
        text += ", batch norm eval"
    return text, True


def describe_preprocessing(config: RunConfig, backbone: Backbone) -> dict[str, Any]:
    """Return the settings of the preprocessing for a table; ``train.augment: false`` disables the augmentation."""

    def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: effective(value)
            if isinstance(value, Mapping)
            else "none (train.augment: false)"
            if name == "augmentation" and not config.train.augment
            else value
            for name, value in settings.items()
        }

    return effective(backbone.preprocessing.describe())
