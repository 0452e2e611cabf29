"""From YAML to a RunConfig: every problem found at once, each with file, line and the nearest valid key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field

from transfer.config.option_schema import Block, options_model, validate
from transfer.config.recipes import WITHOUT_PRETRAINED, expand
from transfer.config.train_settings import (
    LEARNING_RATE,
    BatchNorm,
    DataOptions,
    Freeze,
    Named,
    OptimizerOptions,
    Phase,
    TrainConfig,
    one_of,
)
from transfer.config.yaml_document import Document, Key, make_document, read_document
from transfer.errors import ConfigError, PluginError, Problem, UserError, nearest
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind
from transfer.training.scheduler import NOT_OPTIONS, OPTIMIZERS, SCHEDULERS, TorchPart, handed_over

DEFAULT_EPOCHS = 5
"""Where a config lists no phases."""
QUICK_EXAMPLES = 64
"""Examples per class of each split in a quick try."""


class Sections(Block):
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
class Component:
    """A plugin that a config names, and the options it gives.

    Args:
        kind: Its kind.
        plugin: Where it comes from.
        cls: Its class.
        options: Checked options, defaults filled in.
        plain: The whole block as JSON, name included.
        where: File and line of its block.
    """

    kind: Kind
    plugin: entry_points.Plugin
    cls: type[Any]
    options: Mapping[str, Any]
    plain: Mapping[str, Any]
    where: str

    def make(self, *handed_over: Any) -> Any:
        """Build it from what the framework hands over and its options; its mistakes name the line of its block."""
        with located(self.where):
            return self.cls(*handed_over, **self.options)

    def without_pretrained(self) -> Component:
        """Return this backbone as it begins from random weights."""
        with located(self.where):
            changed = self.cls.without_pretrained(self.options)
        return replace(self, options={**self.options, **changed}, plain={**self.plain, **changed})


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase with everything that it inherits from the run filled in; ``key`` is where it stands in the config."""

    epochs: int
    freeze: Freeze
    lr: float | Mapping[str, float]
    scheduler: TorchPart | None
    patience: int | None
    batch_norm: BatchNorm
    key: Key


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
    optimizer: TorchPart
    optimizer_options: OptimizerOptions
    schedulers: tuple[TorchPart | None, ...]
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

    def phases(self, stages: Sequence[str]) -> tuple[ResolvedPhase, ...]:
        """Return the phases for a model.

        Args:
            stages: The backbone's stages that have parameters, for recipes.

        Raises:
            ConfigError: A recipe does not fit.
        """
        recipe, lr = self.train.recipe, self.optimizer_options.lr
        listed = self.train.phases or (Phase(epochs=DEFAULT_EPOCHS),)
        if recipe is not None:
            if self.quick_try:
                recipe = recipe.model_copy(update={"epochs": len(stages) + 2})
            with self.at("train", "recipe"):
                listed = expand(recipe, lr, stages)
        found = []
        for index, phase in enumerate(listed):
            key: Key = ("train", "phases", index) if self.train.phases else ("train", "recipe")
            scheduler = self.schedulers[index if len(self.schedulers) > 1 else 0]
            epochs = 1 if self.quick_try else phase.epochs
            rate = lr if phase.lr is None else phase.lr
            found.append(ResolvedPhase(epochs, phase.freeze, rate, scheduler, phase.patience, phase.batch_norm, key))
        return tuple(found)

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
        return located(self.document.where(key))


@contextmanager
def located(where: str) -> Iterator[None]:
    """Give an error raised inside a place, where it does not know better; a plain ValueError becomes a ConfigError."""
    try:
        yield
    except UserError as error:
        error.problems = tuple(p if p.where else replace(p, where=where) for p in error.problems)
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=where) from error


def load_component(kind: Kind, block: Mapping[str, Any], source: str) -> Component:
    """Check the block of one component on its own (in a model folder).

    Raises:
        PluginError: The plugin is not installed, or cannot be imported.
        ConfigError: With every problem found.
    """
    section = "data" if kind == "dataset" else kind
    if not isinstance(block, Mapping):
        raise ConfigError(f"{section} is {block!r}: it should be a mapping", where=source)
    if isinstance(name := block.get("name"), str):
        entry_points.load(
            kind, name
        )  # a plugin that is missing is no mistake in the block: the caller knows its package
    check = _Check(make_document({section: block}, source=source))
    component, _ = check.component(kind, check.document.data[section], Named)
    if component is None:
        raise ConfigError.of(check.problems)
    return component


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a config; of the plugins it imports those that the config names, and it reads no data.

    Args:
        source: The path of a YAML file, or the config as plain data.
        overrides: ``path.to.key=value`` each, as on the command line.

    Raises:
        ConfigError: With every problem found.
    """
    if isinstance(source, Mapping):
        return _Check(make_document(source, overrides)).config()
    return _Check(read_document(source, overrides)).config()


class _Check:
    """Checks a document part by part and collects the problems."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def config(self) -> RunConfig:
        top = self.block(Sections, self.document.data, (), "the config")
        # A mistake at the top level must not hide those inside the sections that are there.
        raw = {name: self.document.data.get(name) for name in Sections.model_fields} if top is None else dict(top)
        dataset, data_options = self.component("dataset", raw["data"], DataOptions)
        backbone, _ = self.component("backbone", raw["backbone"], Named)
        head, _ = self.component("head", raw["head"], Named)
        task, _ = self.component("task", raw["task"], Named)
        trackers = self.trackers(raw["trackers"])
        train = self.block(TrainConfig, raw["train"], ("train",), "train") if isinstance(raw["train"], dict) else None
        optimizer, optimizer_options, schedulers = self.training(train) if train else (None, None, ())
        if train is None and isinstance(raw["train"], dict) and isinstance(raw["train"].get("optimizer"), dict):
            self.optimizer(raw["train"]["optimizer"])  # for its problems
        if self.problems:
            # Phases share the run's scheduler: what is wrong with it is said once.
            raise ConfigError.of(list(dict.fromkeys(self.problems)))
        # Every part that is missing has put a problem on the list.
        assert top and dataset and data_options and backbone and head and task and train  # noqa: PT018
        assert optimizer
        assert optimizer_options
        if train.recipe is not None and train.recipe.name in WITHOUT_PRETRAINED:
            backbone = backbone.without_pretrained()
        plain: dict[str, Any] = {"seed": top.seed, "data": dataset.plain}
        plain |= {"backbone": backbone.plain, "head": head.plain, "task": task.plain}
        plain |= {"train": train.model_dump(mode="json")}
        plain["train"]["optimizer"] = {"lr": LEARNING_RATE} | plain["train"]["optimizer"]
        plain["trackers"] = [tracker.plain for tracker in trackers]
        return RunConfig(
            top.seed,
            dataset,
            backbone,
            head,
            task,
            data_options,
            train,
            optimizer,
            optimizer_options,
            schedulers,
            tuple(trackers),
            self.document,
            plain,
        )

    def block(self, model: type[_M], value: Any, key: Key, what: str) -> _M | None:
        checked, problems = validate(model, value, self.document, key, what)
        self.problems += problems
        return checked

    def trackers(self, raw: Any) -> list[Component]:
        found: dict[str, Component] = {}
        for index, block in enumerate(raw if isinstance(raw, list | tuple) else ()):
            block = {"name": block} if isinstance(block, str) else block
            component, _ = self.component("tracker", block, Named, ("trackers", index))
            if component is None:
                continue
            name = component.plugin.name
            if name in found:
                self.problems.append(Problem(f"tracker {name!r} is named twice", component.where, fix="name it once"))
            found[name] = component
        return list(found.values())

    def component(
        self, kind: Kind, raw: Any, base: type[_N], key: Key | None = None
    ) -> tuple[Component | None, _N | None]:
        """Check the block of a component, which stands at ``key``: by default at the section of its kind."""
        key = key or ("data" if kind == "dataset" else kind,)
        section = ".".join(map(str, key))
        if not isinstance(raw, dict):
            return None, None  # already reported
        name = raw.get("name")
        if not isinstance(name, str):
            names = sorted({p.name for p in entry_points.plugins(kind)})
            where = self.document.where(key)
            self.problems.append(Problem(f"{section} needs a name", where, tuple(names), f"add name: ... to {section}"))
            return None, None
        try:
            plugin, cls = entry_points.find(kind, name), entry_points.load(kind, name)
            model = options_model(cls, base)
        except PluginError as error:
            where = self.document.where((*key, "name"))
            # An import error knows the entry point at fault; the config's line still says who asked for it.
            self.problems += (replace(p, where=f"{where} -> {p.where}" if p.where else where) for p in error.problems)
            return None, None
        block = self.block(model, raw, key, f"{kind} {name!r}")
        if block is None:
            return None, None
        options = {field: getattr(block, field) for field in model.model_fields if field not in base.model_fields}
        where = self.document.where(key)
        return Component(kind, plugin, cls, options, block.model_dump(mode="json"), where), block

    def training(
        self, train: TrainConfig
    ) -> tuple[TorchPart | None, OptimizerOptions | None, tuple[TorchPart | None, ...]]:
        optimizer, options = self.optimizer(train.optimizer)
        schedulers = []
        for index, phase in enumerate(train.phases or [None]):
            raw: dict[str, Any] | None = train.scheduler
            key: Key = ("train", "scheduler")
            if phase is not None and phase.scheduler is not None:
                raw, key = phase.scheduler, ("train", "phases", index, "scheduler")
            part = None
            if raw is not None:
                part, _ = self.torch_part(raw, key, "scheduler", SCHEDULERS, Named, handed_over)
            schedulers.append(part)
        return optimizer, options, tuple(schedulers)

    def optimizer(self, raw: dict[str, Any]) -> tuple[TorchPart | None, OptimizerOptions | None]:
        key: Key = ("train", "optimizer")
        return self.torch_part(raw, key, "optimizer", OPTIMIZERS, OptimizerOptions, lambda _: NOT_OPTIONS)

    def torch_part(
        self,
        raw: dict[str, Any],
        key: Key,
        what: str,
        known: Mapping[str, type[Any]],
        base: type[_N],
        no_options: Callable[[type[Any]], set[str]],
    ) -> tuple[TorchPart | None, _N | None]:
        name = raw.get("name")
        if not isinstance(name, str):
            fix = f"add name: ... to {what}"
            self.problems.append(Problem(f"{what} needs a name", self.document.where(key), tuple(sorted(known)), fix))
            return None, None
        if name not in known:
            close = nearest(name, known)
            fix = f"did you mean {close!r}?" if close else f"choose one of torch's {what}s"
            where = self.document.where((*key, "name"))
            self.problems.append(Problem(f"there is no {what} called {name!r}", where, tuple(sorted(known)), fix))
            return None, None
        block = self.block(options_model(known[name], base, skip=no_options(known[name])), raw, key, f"{what} {name!r}")
        if block is None:
            return None, None
        given = {k: getattr(block, k) for k in sorted(block.model_fields_set) if k not in base.model_fields}
        return TorchPart(name, known[name], given), block


_M = TypeVar("_M", bound=BaseModel)
_N = TypeVar("_N", bound=Named)
