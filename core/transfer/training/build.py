"""From a config to an experiment: first on the meta device, where every misfit shows, then with data and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from transfer.config.run_config import Component, RunConfig, located
from transfer.config.train_settings import BATCH_SIZE, TrainConfig
from transfer.config.yaml_document import Key
from transfer.data.loader import Loader, move
from transfer.data.splits import complete, count_classes, digest
from transfer.errors import ConfigError, PluginError, Problem, UserError
from transfer.feature_cache.loader import why_not
from transfer.interfaces import Backbone, Data, Dataset, DataSpec, FeatureSpec, Split, Task
from transfer.models.model import BATCH_NORM, Model
from transfer.training import freezing, scheduler
from transfer.training.auto_batch_size import find_batch_size
from transfer.training.engine import QUICK_BATCHES, Experiment, PhasePlan
from transfer.training.events import Note, Observer
from transfer.training.mixup import check_blendable

LARGE_EPOCH_STEPS = 1000
"""Stand in for the steps of an epoch before the data has been counted."""
ASSUMED_CLASSES = ("(class 1)", "(class 2)")
"""Stand in for the classes of a dataset that must be read to know them."""


@dataclass(frozen=True)
class Parts:
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


@dataclass(frozen=True)
class Built:
    """An experiment, and what the run directory keeps of how it came about.

    Args:
        config: What was built, with the batch size that ``auto`` found.
        experiment: For the engine.
        loaders: The batches of each split.
        backbone: With its preprocessing and what it learned from the training split.
        data: What the data holds.
        learned: What the backbone learned from the training split.
        pretrained: What was read into the backbone.
        classes: Examples of each class in each split.
    """

    config: RunConfig
    experiment: Experiment
    loaders: dict[str, Loader]
    backbone: Backbone
    data: DataSpec
    learned: dict[str, Any]
    pretrained: dict[str, Any]
    classes: dict[str, dict[str, int]]


def preflight(config: RunConfig) -> Parts:
    """Build the model on the meta device and fit everything together: no data, no weights, no memory.

    Raises:
        ConfigError: Parts that do not fit, freeze policies or learning rates that name nothing; all that is found.
    """
    for tracker in config.trackers:
        tracker.make()
    dataset: Dataset = config.data.make()
    spec = dataset.spec if dataset.spec.classes else replace(dataset.spec, classes=ASSUMED_CLASSES)
    with torch.device("meta"):
        backbone: Backbone = config.backbone.make()
        _fit_together(config, spec, backbone)
        task, model = assemble(backbone, config.head, config.task, spec)
    shapes = _run_on_meta(config, backbone, task, model)
    phases = _phases(config, model)
    _refuse_dead_settings(config, backbone, model, phases)
    return Parts(dataset, backbone, task, model, phases, shapes)


def build(config: RunConfig, observe: Observer, *, quick: bool = False) -> Built:
    """Check the config, read the data, build the model and read its pretrained weights.

    Args:
        config: What to build.
        observe: Is told what was found.
        quick: Run a few batches of each part only.

    Raises:
        UserError: As :func:`preflight`, or the data or the weights are not right.
        TrainingError: No batch size fits into memory.
    """
    fields = preflight(config).backbone.fields
    data, splits = read_data(config)
    backbone_class: type[Backbone] = config.backbone.cls
    torch.manual_seed(config.seed)
    with located(config.backbone.where):
        values = splits["train"].column(*fields)
        backbone = backbone_class.from_data(values, **config.backbone.options)
        pretrained = dict(backbone.load_pretrained()) if config.pretrained else {}
    learned = dict(backbone.learned())
    if learned:
        observe(Note("learned from the training split", learned))
    if pretrained:
        observe(Note("pretrained weights", pretrained))
    task, model = assemble(backbone, config.head, config.task, data.spec)
    task.prepare(splits["train"].targets)
    loaders = {
        name: make_loader(config, split, backbone, training=name == "train", repeated=name != "test")
        for name, split in splits.items()
    }
    experiment = make_experiment(config, model, task, backbone, loaders, quick=quick)
    if config.train.batch_size == "auto":
        config = config.with_batch_size(find_batch_size(experiment, observe))
        experiment = replace(experiment, settings=config.train)
        for name, loader in loaders.items():
            loader.batch_size = _examples_per_step(config.train, training=name == "train")
    counts = {name: dict(count_classes(split, data.spec.classes)) for name, split in splits.items()}
    return Built(config, experiment, loaders, backbone, data.spec, learned, pretrained, counts)


def settled(config: RunConfig, observe: Observer) -> RunConfig:
    """Return the config with the batch size that ``auto`` finds, for several runs that are to be compared."""
    return build(config, observe).config if config.train.batch_size == "auto" else config


def make_experiment(
    config: RunConfig, model: Model, task: Task, backbone: Backbone, loaders: Mapping[str, Loader], *, quick: bool
) -> Experiment:
    """Put together what the engine needs."""
    return Experiment(
        model,
        task,
        loaders["train"],
        loaders["validation"],
        loaders.get("test") if config.train.score_test else None,
        _phases(config, model),
        config.optimizer,
        config.train,
        config.seed,
        backbone.assets(),
        _origin(backbone, loaders),
        QUICK_BATCHES if quick else None,
    )


def _origin(backbone: Backbone, loaders: Mapping[str, Loader]) -> dict[str, str]:
    """Return digests of what a run that goes on must find again: the splits and what was learned from the data."""
    assets = hashlib.sha256()
    for name, text in sorted(backbone.assets().items()):
        assets.update(f"{name}\0{text}\0".encode())
    data = digest({name: loader.split for name, loader in loaders.items()})
    return {"data": data, "vocabulary or assets": assets.hexdigest()}


def read_data(config: RunConfig) -> tuple[Data, dict[str, Split]]:
    """Read the data and complete its splits.

    Raises:
        DataError: Something about the data is not right.
    """
    dataset: Dataset = config.data.make()
    with located(config.data.where):
        data = dataset.load()
        options = config.data_options
        return data, complete(data, validation=options.validation, limit=options.limit)


def make_loader(
    config: RunConfig, split: Split, backbone: Backbone, *, training: bool = False, repeated: bool = False
) -> Loader:
    """Make the batches of a split, as training and every later evaluation of a run does."""
    train = config.train
    batch_size = _examples_per_step(train, training=training)
    return Loader(
        split,
        backbone.fields,
        backbone.preprocessing,
        batch_size=batch_size,
        max_tokens=None if batch_size else train.max_tokens,
        seed=config.seed,
        training=training,
        augment=train.augment,
        bucket=train.bucket,
        workers=train.workers,
        repeated=repeated,
    )


def _examples_per_step(train: TrainConfig, *, training: bool) -> int | None:
    """Return the batch size; None: as ``max_tokens`` says. Until ``auto`` has found one the default stands for it."""
    size = BATCH_SIZE if train.batch_size == "auto" else train.batch_size
    return size if training else train.evaluation_batch_size or (size and 2 * size)


def assemble(backbone: Backbone, head: Component, task: Component, data: DataSpec) -> tuple[Task, Model]:
    """Make the task for this data, and the model of a backbone and a head for this task."""
    the_task: Task = task.make(data)
    return the_task, Model(backbone, head.make(backbone.features, the_task.out_features))


def _fit_together(config: RunConfig, data: DataSpec, backbone: Backbone) -> None:
    """Refuse parts that do not fit, naming the lines of both."""
    where = {section: config.document.where((section,)) for section in ("data", "backbone", "head", "task")}
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
            check_blendable(value, config.train.mix)
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


def _phases(config: RunConfig, model: Model) -> tuple[PhasePlan, ...]:
    plans, problems = [], []
    stages = [name for name, stage in list(model.stages.items())[:-1] if any(True for _ in stage.parameters())]
    for phase in config.phases(stages):
        try:
            with config.at(*phase.key, "freeze"):
                frozen = freezing.resolve(model, phase.freeze, phase.batch_norm)
            own = (*phase.key, "lr")
            with config.at(*own if config.document.wrote(own) else ("train", "optimizer", "lr")):
                groups = scheduler.groups(model, frozen, phase.lr, config.optimizer_options.no_weight_decay)
            plan = PhasePlan(phase.epochs, frozen, groups, phase.scheduler, phase.patience)
            _try_out(config, model, plan, phase.key)
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
            where=config.document.where(("train", "precision")),
            fix="use bf16 or fp32",
        )
    if config.optimizer_options.no_weight_decay and not config.weight_decay:
        raise ConfigError(
            f"no_weight_decay spares parameters from weight decay, and {config.optimizer.name} applies none here",
            where=config.document.where(("train", "optimizer", "no_weight_decay")),
            fix="set weight_decay, or remove no_weight_decay",
        )
    if train.max_tokens is not None and not backbone.preprocessing.encode_once:
        raise ConfigError(
            f"train.max_tokens counts tokens, and what {config.backbone.plugin.name} takes has no length beforehand",
            where=config.document.where(("train", "max_tokens")),
            fix="set train.batch_size instead",
        )
    if train.views is None:
        return
    augments = backbone.preprocessing.augments and train.augment
    reasons = [
        why_not(
            freezing.prefix_length(model, phase.frozen),
            cache=train.cache != "off",
            augments=augments,
            views=train.views,
            mixed=train.mix is not None,
        )
        for phase in phases
    ]
    dead = "nothing is augmented at random" if not augments else None
    if dead is None and all(reasons):
        dead = reasons[0]
    if dead:
        raise ConfigError(
            f"train.views keeps augmented views of each example, and {dead}",
            where=config.document.where(("train", "views")),
            fix="remove train.views",
        )


def _try_out(config: RunConfig, model: Model, plan: PhasePlan, key: Key) -> None:
    """Find what torch would only refuse once the phase began."""
    with config.at("train", "optimizer"):
        optimizer = scheduler.build_optimizer(model, plan.groups, config.optimizer, before=None)
    own = (*key, "scheduler")
    # A scheduler of the phase's own, else the run's; a warm-up that is too long is named there too.
    with config.at(*own if config.document.wrote(own) else ("train", "scheduler")):
        scheduler.Schedule(
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
            where=config.document.where(("train", setting)),
            fix="set a larger train.batch_size, or freeze the stages with batch norm",
        )
