"""The inputs of the engine: model, task, loaders and phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from transfer.config.torch_classes import TorchClass
from transfer.config.train_settings import TrainConfig
from transfer.data.loader import Loader
from transfer.feature_cache.loader import StageInputs, select_stage_inputs
from transfer.feature_cache.prefix import FrozenPrefix
from transfer.feature_cache.store import FeatureCache
from transfer.interfaces import Task
from transfer.models.model import Model
from transfer.training import freezing
from transfer.training.freezing import Frozen
from transfer.training.optimizer import ParameterGroup

SMOKE_TEST_BATCHES = 3
"""Batches of each part in a quick try."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase, worked out for one model.

    Args:
        epochs: Passes over the training split, at most.
        frozen: What does not change.
        groups: What is trained, and how fast.
        scheduler: How the learning rates move, if they do.
        patience: End after so many epochs without a better validation metric.
    """

    epochs: int
    frozen: Frozen
    groups: list[ParameterGroup]
    scheduler: TorchClass | None
    patience: int | None = None


@dataclass(frozen=True)
class Experiment:
    """Everything that the engine needs.

    Args:
        model: With its pretrained weights.
        task: Loss and metrics.
        train, validation, test: The splits' batches; without a test split the validation figures stand alone.
        phases: In order.
        optimizer: Which, with its options.
        settings: How to train.
        device: Device to train on.
        seed: Of everything random during training.
        assets: What the backbone learned from the training split, for the keys of the feature cache.
        origin: Digests of the data and of the assets, which a run that goes on must find again.
        max_batches: No more than so many batches of each part (a quick try).
    """

    model: Model
    task: Task
    train: Loader
    validation: Loader
    test: Loader | None
    phases: tuple[PhasePlan, ...]
    optimizer: TorchClass
    settings: TrainConfig
    device: torch.device
    seed: int
    assets: Mapping[str, str]
    origin: Mapping[str, str]
    max_batches: int | None = None

    def features(self, loader: Loader, stages: int, *, training: bool = False) -> StageInputs:
        """Return a split's batches, from the feature cache where the first ``stages`` stages are frozen."""
        if self.max_batches is not None:
            return StageInputs(
                loader, 0, {"cached": False, "why": "a quick try takes a few batches, not every example"}
            )
        prefix = FrozenPrefix(self.model, stages, self.assets, self.settings.precision)
        cache = None
        if self.settings.cache != "off":
            limit_bytes = int(self.settings.cache_limit_gib * 2**30)
            cache = FeatureCache(limit_bytes, verify=self.settings.cache == "verify")
        mixed = training and self.settings.mix is not None
        return select_stage_inputs(cache, prefix, loader, views=self.settings.views, mixed=mixed)

    def always_frozen(self) -> int:
        """Return how many stages, from the input on, stay frozen through all phases: the test split's prefix."""
        return min(freezing.prefix_length(self.model, phase.frozen) for phase in self.phases)

    def unchanged_stages(self) -> frozenset[str]:
        """Return the stages of which no phase changes anything, buffers included."""
        still = [p.frozen.stages if p.frozen.batch_norm == "frozen" else frozenset() for p in self.phases]
        return frozenset.intersection(*still)
