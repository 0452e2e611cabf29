"""Build an experiment from a config: check it on the meta device, then read data and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from transfer.config.component import error_location
from transfer.config.run_config import RunConfig
from transfer.config.train_settings import BATCH_SIZE, TrainConfig
from transfer.config.yaml_document import Key
from transfer.data.exclusions import read_exclusions, without
from transfer.data.inspection import DATA_WARNINGS_TITLE, inspect_data
from transfer.data.loader import Loader
from transfer.data.splits import complete, count_classes, digest
from transfer.errors import ConfigError, Problem
from transfer.interfaces import Backbone, Data, Dataset, DataSpec, Split, Task
from transfer.models.assemble import assemble
from transfer.models.model import Model
from transfer.models.saved_backbone import build_backbone, load_pretrained
from transfer.training.auto_batch_size import find_batch_size
from transfer.training.events import EncodingStep, Note, Observer, ignore_events
from transfer.training.experiment import SMOKE_TEST_BATCHES, EngineOptions, Experiment, Phase
from transfer.training.preflight import preflight, resolve_phases, settle_recipe
from transfer.training.selection import FEW_EXAMPLES, LAST

MAX_ADAPTIVE_LR = 3e-4
"""Learning rate of Adam and its variants above which pretrained layers are likely to lose their weights."""
MAX_LR = 0.1
"""The same for other optimizers, such as SGD."""


@dataclass(frozen=True)
class BuiltExperiment:
    """An experiment with the information about it that the run directory records.

    Args:
        config: Checked config, with the batch size that ``auto`` found.
        experiment: Input of the engine.
        loaders: Loader of each split.
        backbone: Backbone with its preprocessing and pretrained weights.
        data: Description of the data: fields, target and classes.
        learned: Summary of the assets that the backbone learned from the training split, for example a vocabulary.
        pretrained: Summary of the pretrained weights that were read.
        classes: Number of examples per class in each split.
        data_warnings: Possible problems of the data, by subject.
    """

    config: RunConfig
    experiment: Experiment
    loaders: dict[str, Loader]
    backbone: Backbone
    data: DataSpec
    learned: dict[str, Any]
    pretrained: dict[str, Any]
    classes: dict[str, dict[str, int]]
    data_warnings: dict[str, str]


def build(config: RunConfig, observe: Observer, *, quick: bool = False) -> BuiltExperiment:
    """Check the config, read the data, build the model and read its pretrained weights.

    Args:
        config: Checked config.
        observe: Function that is called with notes about assets, weights and the batch size.
        quick: Whether to use only a few batches of each split.

    Raises:
        UserError: The config fails :func:`preflight`, or the data or the weights are wrong.
        TrainingError: ``batch_size: auto`` found no batch size that fits into memory.
    """
    checked = preflight(config)
    data, splits = read_data(config)
    _check_validation(config, splits, ignore_events if quick else observe)
    with error_location(config.data.where):
        data_warnings = inspect_data(data, splits, checked.backbone.fields)
    if data_warnings:
        observe(Note(DATA_WARNINGS_TITLE, data_warnings))
    # The names of the classes may be known only now. Options of the task that do not fit them are refused before the
    # backbone downloads its weights.
    config.task.make(data.spec)
    # All initial weights are drawn after this line: every rank and a resumed run start from the same ones.
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone, splits["train"].column(*checked.backbone.fields))
    # Compared after loading: only stages whose weights have changed count as pretrained.
    before = _first_weights(backbone)
    pretrained = load_pretrained(config.backbone, backbone) if config.pretrained else {}
    loaded = {name for name, weight in _first_weights(backbone).items() if not torch.equal(weight, before[name])}
    learned = dict(backbone.learned())
    if learned:
        observe(Note("learned from the training split", learned))
    if pretrained:
        observe(Note("pretrained weights", pretrained))
    if "validation" in splits:
        values = splits["validation"].column(*checked.backbone.fields)
        if (warning := backbone.preprocessing.warning(values)) is not None:
            observe(Note(f"warning about the validation split: {warning}"))
    task, model = assemble(backbone, config.head, config.task, data.spec, config.adapter)
    # Of the training split only: class weights and scaling must not depend on the targets of other splits.
    with error_location(config.head.where):
        model.stages["head"].initialize(backbone, data.spec.classes)  # type: ignore[operator]
    task.prepare(splits["train"].targets)
    model.scale_outputs(task.output_scaling())
    loaders = {
        name: make_loader(
            config,
            split,
            backbone,
            training=name == "train",
            repeated=name != "test",
            progress=encoding_progress(name, observe),
        )
        for name, split in splits.items()
    }
    phases = checked.phases
    config, reason = settle_recipe(config, backbone, model, task, len(splits["train"]))
    if reason:
        observe(Note(f"the head is trained by gradient steps instead of solved: {reason}"))
    if config.train.recipe is not None or [name for name, _ in model.named_parameters()] != [
        name for name, _ in checked.model.named_parameters()
    ]:
        # A head may have parameters per class, and some datasets report their classes only when they are read.
        phases = resolve_phases(config, model)
    experiment = make_experiment(
        config, model, task, backbone, loaders, phases=phases, device=checked.device, quick=quick
    )
    if config.is_fine_tuned_by_default:
        rates = {"head" if group.stage == "head" else "backbone": group.lr for group in phases[0].groups}
        by_part = " and ".join(f"{rate:.2g} ({part})" for part, rate in rates.items())
        observe(Note(f"pretrained layers are fine-tuned by default: {config.optimizer.name} at a rate of {by_part}"))
    if (warning := _high_rate_warning(config, phases, loaded)) is not None:
        observe(Note(f"warning: {warning}"))
        experiment = replace(experiment, warnings=(warning,))
    if config.train.batch_size == "auto":
        # Last of all, because the search makes real steps of the complete experiment.
        config = config.with_batch_size(find_batch_size(experiment, observe, config.train.evaluation_batch_size))
        for name, loader in loaders.items():
            loader.batch_size = _examples_per_step(config.train, training=name == "train")
    counts = {name: dict(count_classes(split, data.spec)) for name, split in splits.items()}
    return BuiltExperiment(config, experiment, loaders, backbone, data.spec, learned, pretrained, counts, data_warnings)


def _first_weights(backbone: Backbone) -> dict[str, Tensor]:
    """Return a copy of the first parameter of each stage, except of those that look rows up (embeddings)."""
    # Vectors of words are tuned at higher rates than layers, because each step changes only a few rows.
    stages = {
        name: next(stage.parameters(), None)
        for name, stage in zip(backbone.stage_names, backbone.stages, strict=True)
        if not getattr(stage, "recompute", False)
    }
    return {name: parameter.detach().clone() for name, parameter in stages.items() if parameter is not None}


def _high_rate_warning(config: RunConfig, phases: Sequence[Phase], pretrained: Collection[str]) -> str | None:
    """Return a warning about learning rates that destroy pretrained weights; None if there are none.

    Args:
        config: Checked config.
        phases: Phases of the run.
        pretrained: Names of the stages with pretrained weights.
    """
    limit = MAX_ADAPTIVE_LR if "adam" in config.optimizer.name else MAX_LR
    groups = [
        group
        for phase in phases
        for group in phase.groups
        if group.lr > limit and any(group.parameters[0].startswith(f"{stage}.") for stage in pretrained)
    ]
    if not groups or config.adapter is not None:  # the pretrained weights under an adapter do not change
        return None
    highest = max(groups, key=lambda group: group.lr)
    return (
        f"the learning rate of the pretrained stage {highest.stage} is {highest.lr:.2g}, far above the usual "
        f"{limit / 10:.0e} to {limit / 3:.0e} of {config.optimizer.name}, which can destroy its weights; set "
        "train.optimizer.lr={head: 1.0e-3, backbone: "
        f"{limit / 15:.0e}}}, or train.recipe={{name: lp_ft, epochs: {max(2, sum(phase.epochs for phase in phases))}}}"
    )


def _check_validation(config: RunConfig, splits: Mapping[str, Split], observe: Observer) -> None:
    """Refuse settings that need a validation split if there is none, and warn if it is very small."""
    train = config.train
    if "validation" in splits:
        count = len(splits["validation"])
        if count < FEW_EXAMPLES and train.select != LAST:
            text = f"the validation split has only {count:,} examples, so the best epoch is selected largely by chance"
            observe(Note(f"{text}: increase data.validation, or keep the last epoch with train.select=last"))
        return
    phases = list(enumerate(train.phases or ()))
    needs_metric = any(one is not None and one.cls is ReduceLROnPlateau for one in config.schedulers)
    keys: list[Key] = [("train", "select")] if train.select not in (None, LAST) else []
    keys += [("train", "phases", index, "patience") for index, phase in phases if phase.patience is not None]
    keys += [("train", "scheduler")] if needs_metric else []
    if keys:
        raise ConfigError.of(
            [
                Problem(
                    f"{'.'.join(map(str, key))} needs a validation split, and data.validation is 0",
                    config.document.location(key),
                    fix="set data.validation to 0.1, for example, or remove this option",
                )
                for key in keys
            ]
        )


def with_found_batch_size(config: RunConfig, observe: Observer) -> RunConfig:
    """Return the config with the batch size that ``auto`` finds, so that several runs use the same one."""
    return build(config, observe).config if config.train.batch_size == "auto" else config


def make_experiment(
    config: RunConfig,
    model: Model,
    task: Task,
    backbone: Backbone,
    loaders: Mapping[str, Loader],
    *,
    phases: tuple[Phase, ...],
    device: torch.device,
    quick: bool,
) -> Experiment:
    """Return the input of the engine."""
    for loader in loaders.values():
        loader.prepare_for(device)
    model.recompute = config.train.recompute
    return Experiment(
        model,
        task,
        loaders["train"],
        loaders.get("validation"),
        loaders.get("test") if config.train.score_test else None,
        phases,
        config.optimizer,
        EngineOptions.from_config(config.train, device, quick=quick),
        config.seed,
        backbone.assets(),
        _origin(backbone, loaders),
        SMOKE_TEST_BATCHES if quick else None,
    )


def _origin(backbone: Backbone, loaders: Mapping[str, Loader]) -> dict[str, str]:
    """Return digests of the splits and the assets, which a resumed run must have unchanged."""
    assets = hashlib.sha256()
    for name, text in sorted(backbone.assets().items()):
        # The separators keep the pairs (ab, c) and (a, bc) apart.
        assets.update(f"{name}\0{text}\0".encode())
    data = digest({name: loader.split for name, loader in loaders.items()})
    return {"data": data, "vocabulary or assets": assets.hexdigest()}


def read_data(config: RunConfig) -> tuple[Data, dict[str, Split]]:
    """Read the data and complete its splits.

    Raises:
        DataError: The data is wrong.
    """
    dataset: Dataset = config.data.make()
    with error_location(config.data.where):
        data = dataset.load()
        options = config.data_options
        splits = complete(
            data,
            validation=options.validation,
            limit=options.limit,
            limits_test=config.quick_try,
            fold=None if options.fold is None else (options.fold.number, options.fold.of, options.fold.repeat),
        )
        if options.exclude is not None:
            splits = without(splits, read_exclusions(Path(options.exclude)), data, options.exclude)
        return data, splits


def encoding_progress(split: str, observe: Observer) -> Callable[[int, int], None]:
    """Return a function that reports the progress of encoding a split to an observer."""
    return lambda step, steps: observe(EncodingStep(split, step, steps))


def make_loader(
    config: RunConfig,
    split: Split,
    backbone: Backbone,
    *,
    training: bool = False,
    repeated: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Loader:
    """Return the loader of a split, for training and for every later evaluation of a run.

    Args:
        config: Checked config.
        split: Split to load.
        backbone: Backbone whose preprocessing is applied.
        training: Whether examples are shuffled and augmented.
        repeated: Whether the split is loaded several times, so that decoded examples are kept in memory.
        progress: Function that is called with the number of encoded values and that of all values. None reports no
            progress.
    """
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
        sampler=config.sampler.make() if config.sampler is not None and training else None,
        progress=progress,
    )


def _examples_per_step(train: TrainConfig, *, training: bool) -> int | None:
    """Return the batch size, or None if ``max_tokens`` determines it. Until ``auto`` finds one, use the default."""
    size = BATCH_SIZE if train.batch_size == "auto" else train.batch_size
    # Evaluation keeps no activations for a backward pass, so that twice as many examples fit.
    return size if training else train.evaluation_batch_size or (size and 2 * size)
