"""The checked config of a run, and its phases for a model."""

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
from transfer.interfaces import Backbone

QUICK_EXAMPLES = 64
"""Maximum number of examples per class of each split in a quick run."""


class RunConfigSchema(Block):
    """Config of one run.

    Args:
        seed: Seed of all random number generators of the run; the splits do not depend on it.
        data: Name and options of the dataset.
        backbone: Name and options of the backbone.
        head: Name and options of the head.
        task: Name and options of the task.
        adapter: Name and options of an adapter, such as lora: small additions to the layers are trained, and the
            backbone's own weights stay fixed. null trains the weights themselves.
        train: Options of training.
        trackers: Experiment trackers that record the run: names, or blocks of a name and options.
    """

    # A seed fits into a signed 64-bit integer, which torch and NumPy accept.
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # Each block is checked later, against the options of the plugin or class that it names.
    data: dict[str, Any]
    backbone: dict[str, Any]
    head: dict[str, Any] = Field(default_factory=lambda: {"name": "linear"})
    task: dict[str, Any] = Field(default_factory=lambda: {"name": "classification"})
    adapter: dict[str, Any] | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    trackers: tuple[
        Annotated[str | dict[str, Any], one_of("the name of a tracker, or a mapping of its name and options")], ...
    ] = ()


@dataclass(frozen=True)
class RunConfig:
    """A checked config.

    Args:
        seed: Seed of all random number generators of the run.
        data: Dataset component.
        backbone: Backbone component.
        head: Head component.
        task: Task component.
        data_options: The framework's own options of the data block.
        train: Options of training.
        optimizer: torch's optimizer class with its options.
        optimizer_options: The framework's own options of the optimizer's block.
        schedulers: Scheduler of each listed phase, or one scheduler for all phases.
        trackers: Tracker components.
        document: Document with the location of every value.
        resolved: Complete config as nested dicts with defaults filled in, the content of ``config.yaml`` in a run.
        adapter: Adapter component; None trains the weights of the backbone.
        sampler: Sampler component; None shuffles the training examples.
        quick_try: Whether this is the config of a quick run (:meth:`quick`).
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
    resolved: dict[str, Any]
    quick_try: bool = False
    adapter: Component | None = None
    sampler: Component | None = None

    @property
    def name(self) -> str:
        """The name of a run of this config: the stem of its file, or ``run``."""
        source = Path(self.document.source)
        return source.stem if source.suffix in (".yaml", ".yml") else "run"

    @property
    def weight_decay(self) -> float:
        """The optimizer's weight decay: the configured value, or torch's default."""
        default = inspect.signature(self.optimizer.cls).parameters.get("weight_decay")
        return float(self.optimizer.options.get("weight_decay", default.default if default else 0.0))

    @property
    def pretrained(self) -> bool:
        """Whether pretrained weights are read: True, except for recipes that start from random weights."""
        return self.train.recipe is None or self.train.recipe.name not in WITHOUT_PRETRAINED

    @property
    def is_fine_tuned_by_default(self) -> bool:
        """Whether the config sets no phases, recipe or learning rate, so that its pretrained layers are fine-tuned."""
        return self.train.recipe is not None and not self.document.is_set(("train", "recipe"))

    def phases(self, stages: Sequence[str]) -> tuple[PhaseSettings, ...]:
        """Return the phases of a model, with the epochs and learning rates that they inherit filled in.

        Args:
            stages: Names of the backbone's stages that have parameters, for recipes.

        Raises:
            ConfigError: The recipe does not fit the model.
        """
        recipe, lr = self.train.recipe, self.optimizer_options.lr
        listed = self.train.phases or (PhaseSettings(epochs=self.train.epochs or Backbone.default_phase["epochs"]),)
        if recipe is not None:
            if self.quick_try:
                # Enough epochs for the recipe with the most phases, one per stage and one more; each is cut to 1 below.
                recipe = recipe.model_copy(update={"epochs": len(stages) + 2})
            with self.at("train", "recipe"):
                listed = expand(recipe, lr, stages, adaptive="adam" in self.optimizer.name)
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
        """Return the same config with another seed; the splits stay the same."""
        return replace(self, seed=seed, resolved=self.resolved | {"seed": seed})

    def with_batch_size(self, size: int) -> RunConfig:
        """Return the same config with the batch size that ``auto`` found."""
        train = self.train.model_copy(update={"batch_size": size})
        return replace(
            self, train=train, resolved=self.resolved | {"train": {**self.resolved["train"], "batch_size": size}}
        )

    def with_recipe(self, settled: Mapping[str, Any]) -> RunConfig:
        """Return the same config with options of the recipe that depend on the model and the data."""
        assert self.train.recipe is not None
        recipe = self.train.recipe.model_copy(update=settled)
        train = {**self.resolved["train"], "recipe": recipe.model_dump(mode="json")}
        return replace(
            self, train=self.train.model_copy(update={"recipe": recipe}), resolved=self.resolved | {"train": train}
        )

    def quick(self) -> RunConfig:
        """Return the config of a quick run: one epoch per phase on a few examples of each class, without trackers."""
        limit = min(self.data_options.limit or QUICK_EXAMPLES, QUICK_EXAMPLES)
        return replace(
            self,
            data_options=self.data_options.model_copy(update={"limit": limit}),
            trackers=(),
            resolved=self.resolved | {"data": {**self.resolved["data"], "limit": limit}, "trackers": []},
            quick_try=True,
        )

    def at(self, *key: str | int) -> AbstractContextManager[None]:
        """Add the location of the value at ``key`` to errors raised in the block that have none."""
        return error_location(self.document.location(key))


Config = str | Path | Mapping[str, Any] | RunConfig
"""Path of a YAML file, the config as nested dicts, or a checked config."""
