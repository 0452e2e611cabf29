"""The inputs of the engine: model, task, loaders, phases and options."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from transfer.config.torch_classes import TorchClass
from transfer.config.train_settings import Checkpoint, Compile, MixupCutmix, Precision, Solver, TrainConfig
from transfer.data.loader import Loader
from transfer.feature_cache.loader import AUTO_VIEWS, StageInputs, select_stage_inputs
from transfer.feature_cache.prefix import FrozenPrefix
from transfer.feature_cache.store import FeatureCache
from transfer.interfaces import SPLITS, Task
from transfer.models.model import Model
from transfer.models.precision import resolve_precision
from transfer.training import freezing
from transfer.training.events import CachingStep, Observer, ignore_events
from transfer.training.freezing import Frozen
from transfer.training.optimizer import ParameterGroup
from transfer.training.selection import LAST, Selection

SMOKE_TEST_BATCHES = 3
"""Number of batches of each split in a quick run."""


@dataclass(frozen=True)
class Phase:
    """A phase of training, resolved for a model.

    Args:
        epochs: Maximum number of passes over the training split.
        frozen: Freeze policy, resolved for the model.
        groups: Parameter groups that are trained, with their learning rates.
        scheduler: Learning-rate scheduler. None keeps the learning rates constant.
        patience: Number of epochs without a better validation metric after which the phase ends. None disables early
            stopping.
        solver: Solver of the phase: steps of the optimizer, or L-BFGS for a linear head.
    """

    epochs: int
    frozen: Frozen
    groups: list[ParameterGroup]
    scheduler: TorchClass | None
    patience: int | None = None
    solver: Solver = "gradient"


@dataclass(frozen=True)
class EngineOptions:
    """The options that the engine reads.

    Args:
        device: Device to train on.
        precision: Precision of the forward and the backward pass.
        deterministic: Whether a GPU uses only kernels that give the same result in every run.
        compile: Whether the model is compiled (``torch.compile``), and CUDA graphs are recorded.
        accumulate: Number of batches per optimizer step.
        clip_norm: Maximum norm of the gradient. None disables clipping.
        warmup_epochs: Length of the linear warm-up of each phase, in epochs.
        ema: Decay per step of the moving average of the weights. None disables the average.
        mix: Options of mixup and CutMix. None disables both.
        checkpoint: Options for when checkpoints are written and how many are kept.
        cache: Mode of the feature cache.
        views: Number of augmented views per training example in the cache, or ``auto`` (:func:`views_of_phase`). None
            does not cache augmented examples.
        cache_limit_gib: Maximum size of the feature cache on disk, in GiB.
        select: Metric that selects the best epoch, ``loss`` or ``last``. None selects the task's primary metric.
        sync_batch_norm: Whether trained batch norm uses the statistics of all ranks.
        max_minutes: Time after which no epoch is started, in minutes. None disables the limit.
    """

    device: torch.device
    precision: Precision
    deterministic: bool
    compile: Compile
    accumulate: int
    clip_norm: float | None
    warmup_epochs: float
    ema: float | None
    mix: MixupCutmix | None
    checkpoint: Checkpoint
    cache: Literal["auto", "off", "verify"]
    views: int | Literal["auto"] | None
    cache_limit_gib: float
    select: str | None = None
    sync_batch_norm: bool = False
    max_minutes: float | None = None

    @classmethod
    def from_config(cls, train: TrainConfig, device: torch.device, *, quick: bool) -> EngineOptions:
        """Return the engine's part of the ``train`` block.

        Args:
            train: The ``train`` block.
            device: Device that ``train.device`` is resolved to.
            quick: Whether only a few batches of each split are used. Disables the warm-up.
        """
        return cls(
            device,
            resolve_precision(train.precision, device),
            train.deterministic,
            train.compile,
            train.accumulate,
            train.clip_norm,
            0.0 if quick else train.warmup_epochs,  # a few batches can be fewer than the warm-up needs
            train.ema,
            train.mix,
            train.checkpoint,
            train.cache,
            train.views,
            train.cache_limit_gib,
            train.select,
            train.sync_batch_norm,
            train.max_minutes,
        )


def views_of_phase(
    views: int | Literal["auto"] | None, epochs: int | None, *, frozen_backbone: bool = False
) -> int | None:
    """Return the number of augmented views to cache for a phase. None caches no augmented examples.

    Args:
        views: The option ``train.views``. ``auto`` caches views only if that saves most of the computation: of the
            complete backbone, in more epochs than there are views.
        epochs: Number of epochs that draw the views; computing more views would be wasted. None for a solved head,
            which uses all views at once, and for which ``auto`` caches none.
        frozen_backbone: Whether the frozen prefix contains all stages of the backbone.
    """
    if views == "auto":
        return AUTO_VIEWS if frozen_backbone and epochs is not None and epochs > AUTO_VIEWS else None
    return views if views is None or epochs is None else min(views, epochs)


@dataclass(frozen=True)
class Experiment:
    """Everything that the engine needs.

    Args:
        model: Model with its pretrained weights.
        task: Task: loss and metrics.
        train, validation, test: Loaders of the splits. Without a test split only validation metrics are computed;
            without a validation split the last epoch is kept.
        phases: Phases in order.
        optimizer: Optimizer class with its options.
        options: Options of the engine.
        seed: Seed of everything random during training.
        assets: Assets that the backbone learned from the training split, for the keys of the feature cache.
        origin: Digests of the data and of the assets. A resumed run must have the same.
        max_batches: Maximum number of batches of each split, for quick runs. None uses all.
        warnings: Warnings about the settings, for the summary.
    """

    model: Model
    task: Task
    train: Loader
    validation: Loader | None
    test: Loader | None
    phases: tuple[Phase, ...]
    optimizer: TorchClass
    options: EngineOptions
    seed: int
    assets: Mapping[str, str]
    origin: Mapping[str, str]
    max_batches: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def selection(self) -> Selection:
        """The rule that selects the best epoch."""
        # Without a validation split, epochs cannot be compared: the last one is kept.
        return Selection.of(self.task, LAST if self.validation is None else self.options.select)

    def batches_for(
        self,
        loader: Loader,
        stages: int,
        *,
        training: bool = False,
        epochs: int | None = None,
        split: str | None = None,
        observe: Observer = ignore_events,
    ) -> StageInputs:
        """Return the batches of a split, from the feature cache if possible.

        Args:
            loader: Loader of the split.
            stages: Number of stages, from the input on, that are frozen.
            training: Whether the batches are trained on: mixup and CutMix prevent caching of these.
            epochs: Number of epochs that use the batches. No more augmented views are cached. None caches all.
            split: Name of the split for the progress. None uses the name of the loader in this experiment.
            observe: Function that is called with the progress of computing features.
        """
        options = self.options
        # Computing the features of every example would take longer than the quick run.
        if self.max_batches is not None:
            return StageInputs(
                loader, 0, {"cached": False, "why": "a quick try takes a few batches, not every example"}
            )
        prefix = FrozenPrefix(self.model, stages, self.assets, options.precision)
        cache = None
        if options.cache != "off":
            # Only the training split has other loaders: of the same examples in another order, or not augmented.
            name = split or next((name for name in SPLITS if getattr(self, name) is loader), "train")
            cache = FeatureCache(
                int(options.cache_limit_gib * 2**30),
                verify=options.cache == "verify",
                progress=lambda step, steps: observe(CachingStep(name, step, steps)),
            )
        mixed = training and options.mix is not None
        # The head is the last stage: a prefix of all other stages leaves nothing of the backbone to compute.
        views = views_of_phase(options.views, epochs, frozen_backbone=stages == len(self.model) - 1)
        return select_stage_inputs(cache, prefix, loader, views=views, mixed=mixed)

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters: ``total``, and ``trainable`` in some phase."""
        # A set, because several phases may train the same parameter.
        trained = {name for phase in self.phases for group in phase.groups for name in group.parameters}
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        return {"total": sum(sizes.values()), "trainable": sum(sizes[name] for name in trained)}

    def batches_per_epoch(self, first: int, epochs: int) -> list[int]:
        """Return the number of training batches of each epoch; with ``max_tokens`` or a sampler they may differ.

        Args:
            first: Number of epochs before the first.
            epochs: Number of epochs.
        """
        return [min(self.train.count(first + i), self.max_batches or sys.maxsize) for i in range(epochs)]

    def trained_before(self, number: int) -> set[str]:
        """Return the names of the parameters that the phase before a phase (counted from 1) trains."""
        return {name for phase in self.phases[: number - 1][-1:] for group in phase.groups for name in group.parameters}

    def frozen_prefix_length(self) -> int:
        """Return the number of stages, from the input on, that are frozen in all phases: the test split's prefix."""
        return min(freezing.prefix_length(self.model, phase.frozen) for phase in self.phases)

    def unchanged_stages(self) -> frozenset[str]:
        """Return the stages that no phase changes, including their buffers."""
        # With `batch_norm: train`, the running statistics of frozen stages follow the data, so these stages change too.
        frozen = [p.frozen.stages if p.frozen.batch_norm != "train" else frozenset() for p in self.phases]
        return frozenset.intersection(*frozen)
