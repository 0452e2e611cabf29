"""From YAML to a RunConfig: every problem found at once, each with file, line and the nearest valid key."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from transfer.config.component import Component, error_location
from transfer.config.option_schema import Block
from transfer.config.recipes import WITHOUT_PRETRAINED, expand
from transfer.config.torch_classes import TorchClass
from transfer.config.train_settings import (
    DataOptions,
    OptimizerOptions,
    PhaseSettings,
    TrainConfig,
    one_of,
)
from transfer.config.yaml_document import Document, Key

Config = str | Path | Mapping[str, Any]

DEFAULT_EPOCHS = 5
"""Where a config lists no phases."""
QUICK_EXAMPLES = 64
"""Examples per class of each split in a quick try."""


class RunConfigSchema(Block):
    """What one run does.

    Args:
        seed: Of everything that is random.
        data: A dataset by its name, and its options.
        backbone: A backbone by its name, and its options.
        head: A head by its name, and its options.
        task: A task by its name, and its options.
        train: How the model is trained.
        trackers: Programs that are told of the run: each a name, or a name with options.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: dict[str, Any]
    backbone: dict[str, Any]
    head: dict[str, Any] = Field(default_factory=lambda: {"name": "linear"})
    task: dict[str, Any] = Field(default_factory=lambda: {"name": "classification"})
    train: dict[str, Any] = Field(default_factory=dict)
    trackers: tuple[Annotated[str | dict[str, Any], one_of("the name of a tracker, or its name and options")], ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """A checked config.

    Args:
        seed: Of everything that is random.
        data, backbone, head, task: The components.
        data_options: Core's own options of the data block.
        train: How the model is trained.
        optimizer, optimizer_options: Torch's part of the optimizer's block, and core's.
        schedulers: That of each phase that the config lists, or one for all.
        trackers: What is told of the run.
        document: Where each value was written.
        plain: The whole config as plain data, defaults filled in: what ``config.yaml`` of a run holds.
    """

    seed: int
    data: Component
    backbone: Component
    head: Component
    task: Component
    data_options: DataOptions
    train: TrainConfig
    optimizer: TorchClass
    optimizer_options: OptimizerOptions
    schedulers: tuple[TorchClass | None, ...]
    trackers: tuple[Component, ...]
    document: Document
    plain: dict[str, Any]
    quick_try: bool = False

    @property
    def name(self) -> str:
        """What a run of this config is called."""
        source = Path(self.document.source)
        return source.stem if source.suffix in (".yaml", ".yml") else "run"

    @property
    def weight_decay(self) -> float:
        """The optimizer's weight decay, torch's default filled in."""
        default = inspect.signature(self.optimizer.cls).parameters.get("weight_decay")
        return float(self.optimizer.options.get("weight_decay", default.default if default else 0.0))

    @property
    def pretrained(self) -> bool:
        """Pretrained weights are read: always but for the recipes that ask what they are worth."""
        return self.train.recipe is None or self.train.recipe.name not in WITHOUT_PRETRAINED

    def phases(self, stages: Sequence[str]) -> tuple[PhaseSettings, ...]:
        """Return the phases of a model, with the epochs and learning rates that they inherit filled in.

        Args:
            stages: Names of the backbone's stages that have parameters, for recipes.

        Raises:
            ConfigError: The recipe does not fit the model.
        """
        recipe, lr = self.train.recipe, self.optimizer_options.lr
        listed = self.train.phases or (PhaseSettings(epochs=DEFAULT_EPOCHS),)
        if recipe is not None:
            if self.quick_try:
                recipe = recipe.model_copy(update={"epochs": len(stages) + 2})
            with self.at("train", "recipe"):
                listed = expand(recipe, lr, stages)
        return tuple(
            phase.model_copy(
                update={
                    "epochs": 1 if self.quick_try else phase.epochs,
                    "lr": lr if phase.lr is None else phase.lr,
                }
            )
            for phase in listed
        )

    def phase_key(self, index: int) -> Key:
        """Return the key of the config block that defines a phase, counted from 0."""
        return ("train", "phases", index) if self.train.phases else ("train", "recipe")

    def phase_scheduler(self, index: int) -> TorchClass | None:
        """Return the scheduler of a phase, counted from 0: its own, otherwise the run's."""
        return self.schedulers[index if len(self.schedulers) > 1 else 0]

    def with_seed(self, seed: int) -> RunConfig:
        """Return the same config with another seed; the splits stay as they are."""
        return replace(self, seed=seed, plain=self.plain | {"seed": seed})

    def with_batch_size(self, size: int) -> RunConfig:
        """Return the same config with the batch size that ``auto`` found."""
        train = self.train.model_copy(update={"batch_size": size})
        return replace(self, train=train, plain=self.plain | {"train": {**self.plain["train"], "batch_size": size}})

    def quick(self) -> RunConfig:
        """Return the config of a quick try: one epoch per phase over a few examples of each class, not tracked."""
        limit = min(self.data_options.limit or QUICK_EXAMPLES, QUICK_EXAMPLES)
        return replace(
            self,
            data_options=self.data_options.model_copy(update={"limit": limit}),
            trackers=(),
            plain=self.plain | {"data": {**self.plain["data"], "limit": limit}, "trackers": []},
            quick_try=True,
        )

    def at(self, *key: str | int) -> AbstractContextManager[None]:
        """Give an error raised inside the file and line of the value at ``key``, where it does not know better."""
        return error_location(self.document.location(key))
