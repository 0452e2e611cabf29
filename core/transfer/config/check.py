"""Checking of a config: all problems at once, each with its location."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel

from transfer.config.component import Component
from transfer.config.option_schema import has_option, options_model, validate
from transfer.config.recipes import FINE_TUNING, RECIPE_WARMUP_EPOCHS, WITHOUT_PRETRAINED
from transfer.config.run_config import Config, RunConfig, RunConfigSchema
from transfer.config.torch_classes import (
    OPTIMIZERS,
    RESERVED_OPTIONS,
    SCHEDULERS,
    TorchClass,
    find_class,
    options_set_by_framework,
)
from transfer.config.torch_metrics import (
    RESERVED_OPTIONS as RESERVED_METRIC_OPTIONS,
    TorchMetric,
    find_torch_metric,
    unknown_metric,
)
from transfer.config.train_settings import (
    LEARNING_RATE,
    OPTIMIZER,
    BackboneOptions,
    DataOptions,
    NamedBlock,
    OptimizerOptions,
    PhaseSettings,
    Recipe,
    TaskOptions,
    TrainConfig,
)
from transfer.config.yaml_document import Document, Key, apply_overrides, make_document, read_document
from transfer.errors import ConfigError, PluginError, Problem
from transfer.interfaces import Backbone
from transfer.registry import entry_points
from transfer.registry.entry_points import IN_PROCESS, Kind

_Model = TypeVar("_Model", bound=BaseModel)
_NamedModel = TypeVar("_NamedModel", bound=NamedBlock)


def load_component(kind: Kind, block: Mapping[str, Any], source: str) -> Component:
    """Check the block of one component outside a config, such as in the description of a saved model.

    Args:
        kind: Kind of plugin (``backbone``).
        block: Name and options of the component.
        source: Path of the file that contains the block, for errors.

    Raises:
        PluginError: The plugin is not installed, or cannot be imported.
        ConfigError: The block has problems; the error contains all of them.
    """
    section = "data" if kind == "dataset" else kind
    if not isinstance(block, Mapping):
        raise ConfigError(f"{section} is invalid: expected a mapping, got {block!r}", where=source)
    if isinstance(name := block.get("name"), str):
        # A missing plugin is not a mistake in the block, and the caller can name the package to install: raise a
        # PluginError here, before the checks below turn it into a problem of the block.
        entry_points.load(kind, name)
    validator = _ConfigValidator(make_document({section: block}, source=source))
    component, _ = validator.component(kind, validator.document.data[section], NamedBlock)
    if component is not None and kind == "task":
        component = replace(component, metrics=validator.metrics(component))
    if component is None or validator.problems:
        raise ConfigError.of(validator.problems)
    return component


def load_config(source: Config, overrides: Sequence[str] = (), *, data: Mapping[str, Any] | None = None) -> RunConfig:
    """Read and check a config. Only the plugins that it names are imported, and no data is read.

    Args:
        source: Path of a YAML file, the config as nested dicts, or a checked config.
        overrides: Assignments ``path.to.key=value``, as on the command line.
        data: Dataset that replaces that of the config, as a block of its name and options. The config's options for
            every dataset (``validation``, ``limit``) are kept.

    Raises:
        ConfigError: The config has problems; the error contains all of them.
    """
    if isinstance(source, RunConfig):
        document = make_document(source.resolved, source=source.document.source)
    else:
        document = make_document(source) if isinstance(source, Mapping) else read_document(source)
    if data is not None:
        replace_data(document, data)
    apply_overrides(document, overrides)
    return _ConfigValidator(document).config()


def replace_data(document: Document, data: Mapping[str, Any]) -> None:
    """Replace the dataset of a config, and keep its options for every dataset."""
    old = document.data.get("data")
    kept = set(DataOptions.model_fields) - set(data)
    options = {name: value for name, value in old.items() if name in kept} if isinstance(old, dict) else {}
    document.data["data"] = options | dict(data)
    for key in list(document.locations):
        if key[:1] == ("data",) and key[1:2] not in {(name,) for name in options}:
            del document.locations[key]
    document.locations["data",] = "the data that was passed in Python"


def block_base(kind: Kind, cls: type, base: type[_NamedModel] = NamedBlock) -> type[_NamedModel]:  # type: ignore[assignment]
    """Return the model of the framework's own options in a component's block."""
    if kind == "backbone" and not has_option(cls, "weights"):
        return BackboneOptions  # type: ignore[return-value]
    if kind == "task" and not any(has_option(cls, name) for name in ("metrics", "select_by")):
        return TaskOptions  # type: ignore[return-value]
    return base


def config_of_moved_run(plain: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Check the config of a run whose data may have moved.

    Args:
        plain: Config of the run.
        overrides: Assignments ``data.key=value``.

    Raises:
        ConfigError: The config has problems, or an override changes something else than the data block.
    """
    if other := [text for text in overrides if not text.startswith("data.")]:
        raise ConfigError(
            f"the override {other[0]!r} is invalid here: expected data.key=value, because only the data may have moved",
            fix="start a new run with transfer run to change anything else",
        )
    return load_config(plain, overrides)


class _ConfigValidator:
    """Checks a document block by block and collects the problems.

    Args:
        document: Config with the location of every value.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def config(self) -> RunConfig:
        """Check the complete config.

        Raises:
            ConfigError: The config has problems.
        """
        top = self.block(RunConfigSchema, self.document.data, (), "the config")
        # A mistake at the top level must not hide those inside the sections that are there.
        raw = (
            {name: self.document.data.get(name) for name in RunConfigSchema.model_fields} if top is None else dict(top)
        )
        dataset, data_options = self.component("dataset", raw["data"], DataOptions)
        backbone, _ = self.component("backbone", raw["backbone"], NamedBlock)
        if backbone is not None and "head" not in self.document.data:
            raw["head"] = dict(backbone.cls.default_head)
        head, _ = self.component("head", raw["head"], NamedBlock)
        task, _ = self.component("task", raw["task"], NamedBlock)
        adapter = None
        if raw["adapter"] is not None:
            adapter, _ = self.component("adapter", raw["adapter"], NamedBlock)
        trackers = self.trackers(raw["trackers"])
        if task is not None:
            task = replace(task, metrics=self.metrics(task))
        train = self.block(TrainConfig, raw["train"], ("train",), "train") if isinstance(raw["train"], dict) else None
        # Not for an explicit null, which is part of every config that an earlier version wrote for a run.
        if train is not None and backbone is not None and not {"phases", "recipe"} & train.model_fields_set:
            train = self._default_phases(train, backbone, data_options, adapted=raw["adapter"] is not None)
        # An explicit null keeps the rates constant, as in the configs of runs of earlier versions.
        tunes = train is not None and train.recipe is not None and train.recipe.name in FINE_TUNING
        if train is not None and tunes and "scheduler" not in train.model_fields_set:
            warmup = {} if "warmup_epochs" in train.model_fields_set else {"warmup_epochs": RECIPE_WARMUP_EPOCHS}
            train = train.model_copy(update={"scheduler": {"name": "cosine"}, **warmup})
        optimizer, optimizer_options, schedulers = self.training(train) if train else (None, None, ())
        sampler = None
        if train and train.sampler is not None:
            sampler, _ = self.component("sampler", train.sampler, NamedBlock, ("train", "sampler"))
        if train is None and isinstance(raw["train"], dict) and isinstance(raw["train"].get("optimizer"), dict):
            self.optimizer({"name": OPTIMIZER} | raw["train"]["optimizer"])  # only to collect its problems too
        if self.problems:
            # Phases share the run's scheduler, and each of them has reported its problems: keep one of each.
            raise ConfigError.of(list(dict.fromkeys(self.problems)))
        # Every block that is None has added a problem, so none is None here.
        assert top and dataset and data_options and backbone and head and task and train  # noqa: PT018
        assert optimizer
        assert optimizer_options
        if train.recipe is not None and train.recipe.name in WITHOUT_PRETRAINED:
            backbone = backbone.without_pretrained()
        resolved: dict[str, Any] = {"seed": top.seed, "data": dataset.resolved}
        resolved |= {"backbone": backbone.resolved, "head": head.resolved, "task": task.resolved}
        if adapter is not None:  # configs of runs without it stay readable by older versions
            resolved["adapter"] = adapter.resolved
        resolved |= {"train": train.model_dump(mode="json")}
        # torch's defaults for the other options are not written out: they belong to the installed version of torch.
        resolved["train"]["optimizer"] = {"lr": LEARNING_RATE} | resolved["train"]["optimizer"]
        resolved["train"]["sampler"] = sampler and dict(sampler.resolved)
        resolved["trackers"] = [tracker.resolved for tracker in trackers]
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
            resolved,
            adapter=adapter,
            sampler=sampler,
        )

    def _default_phases(
        self, train: TrainConfig, backbone: Component, data: DataOptions | None, *, adapted: bool
    ) -> TrainConfig:
        """Return the options of training with the phases or the recipe that a config without them gets."""
        cls: type[Backbone] = backbone.cls
        settings = {**cls.default_phase, **({"epochs": train.epochs} if train.epochs else {})}
        sets_rate = "optimizer" in train.model_fields_set and "lr" in train.optimizer
        if sets_rate or adapted or not cls.is_pretrained(backbone.options):
            if data is not None and not data.validation:
                settings["patience"] = None  # there may be no validation split to stop by
            return train.model_copy(update={"phases": (PhaseSettings(**settings),), "epochs": None})
        # The default rate of new layers would destroy pretrained ones.
        optimizer, rated = train.optimizer, cls.fine_tuning_optimizer
        if rated and "optimizer" not in train.model_fields_set:
            optimizer = dict(rated)
        elif rated.get("name") == optimizer.get("name"):
            optimizer = {**optimizer, "lr": rated["lr"]}
        recipe = Recipe(name="fine_tune", epochs=settings["epochs"])
        return train.model_copy(update={"recipe": recipe, "epochs": None, "optimizer": optimizer})

    def block(self, model: type[_Model], value: Any, key: Key, what: str) -> _Model | None:
        """Return a block as an instance of its model, or None after adding its problems."""
        checked, problems = validate(model, value, self.document, key, what)
        self.problems += problems
        return checked

    def trackers(self, raw: Any) -> list[Component]:
        """Check the list of trackers, in which a name without options may be written as a string."""
        components: dict[str, Component] = {}
        for index, block in enumerate(raw if isinstance(raw, list | tuple) else ()):
            block = {"name": block} if isinstance(block, str) else block
            component, _ = self.component("tracker", block, NamedBlock, ("trackers", index))
            if component is None:
                continue
            name = component.plugin.name
            if name in components:
                problem = Problem(f"tracker {name!r} is listed twice", component.where, fix="list it once")
                self.problems.append(problem)
            components[name] = component
        return list(components.values())

    def metrics(self, task: Component) -> tuple[Component | TorchMetric, ...]:
        """Check the metrics that the task's block adds, each a name or a block."""
        metrics: list[Component | TorchMetric | None] = []
        for index, block in enumerate(task.resolved.get("metrics") or () if task.adds_metrics else ()):
            block = {"name": block} if isinstance(block, str) else block
            metrics.append(self.metric(block, task.cls.targets, ("task", "metrics", index)))
        return tuple(metric for metric in metrics if metric is not None)

    def metric(self, raw: dict[str, Any], targets: Collection[str], key: Key) -> Component | TorchMetric | None:
        """Check a metric of torchmetrics, or of a plugin.

        Args:
            raw: Block as plain data.
            targets: Kinds of target of the task.
            key: Path of the block in the document.
        """
        name, plugins = raw.get("name"), entry_points.plugins("metric")
        registered = any(plugin.name == name and plugin.distribution == IN_PROCESS for plugin in plugins)
        cls = find_torch_metric(name, targets) if isinstance(name, str) and not registered else None
        if not isinstance(name, str) or (cls is None and any(name in (p.name, p.qualified_name) for p in plugins)):
            return self.component("metric", raw, NamedBlock, key)[0]
        if cls is None:
            where = self.document.location((*key, "name") if self.document.is_set((*key, "name")) else key)
            self.problems.append(unknown_metric(name, targets, {plugin.name for plugin in plugins}, where))
            return None
        block = self.block(options_model(cls, NamedBlock, skip=RESERVED_METRIC_OPTIONS), raw, key, f"metric {name!r}")
        if block is None:
            return None
        given = {option: getattr(block, option) for option in block.model_fields_set if option != "name"}
        # In the order of the config, which is the order of the options in the metric's name.
        return TorchMetric(name, {key: given[key] for key in raw if key in given}, self.document.location(key))

    def component(
        self, kind: Kind, raw: Any, base: type[_NamedModel], key: Key | None = None
    ) -> tuple[Component | None, _NamedModel | None]:
        """Check the block of a component.

        Args:
            kind: Kind of plugin.
            raw: Block as plain data.
            base: Model of the framework's own options in the block.
            key: Path of the block in the document; None: the section of the kind.

        Returns:
            The component and its checked block, or None twice after adding the problems.
        """
        key = key or ("data" if kind == "dataset" else kind,)
        section = ".".join(map(str, key))
        if not isinstance(raw, dict):
            return None, None  # the check of the top level has reported it
        name = raw.get("name")
        if not isinstance(name, str):
            self._require_name(section, key, {plugin.name for plugin in entry_points.plugins(kind)})
            return None, None
        try:
            plugin, cls = entry_points.find(kind, name), entry_points.load(kind, name)
            model = options_model(cls, block_base(kind, cls, base))
        except PluginError as error:
            where = self.document.location((*key, "name"))
            # An import error names the entry point; the config line that requested the plugin is added in front.
            self.problems += (replace(p, where=f"{where} -> {p.where}" if p.where else where) for p in error.problems)
            return None, None
        block = self.block(model, raw, key, f"{kind} {name!r}")
        if block is None:
            return None, None
        framework = block_base(kind, cls, base).model_fields
        is_task = kind == "task" and "metrics" in framework
        options = {field: getattr(block, field) for field in model.model_fields if field not in framework}
        resolved = block.model_dump(mode="json")
        weights = resolved["weights"] if "weights" in framework else None
        for name in ("weights", "metrics", "select_by"):  # configs of runs without them stay readable by older versions
            if name in framework and not resolved[name]:
                del resolved[name]
        where = self.document.location(key)
        select_by = block.select_by if isinstance(block, TaskOptions) else None
        return (
            Component(kind, plugin, cls, options, resolved, where, weights, adds_metrics=is_task, select_by=select_by),
            block,
        )

    def training(
        self, train: TrainConfig
    ) -> tuple[TorchClass | None, OptimizerOptions | None, tuple[TorchClass | None, ...]]:
        """Check the optimizer, and the scheduler of each phase (one scheduler if no phases are listed)."""
        optimizer, options = self.optimizer(train.optimizer)
        # A recipe's phases are not known before the model, and share the run's scheduler: one entry stands for all.
        schedulers = []
        for index, phase in enumerate(train.phases or [None]):
            raw: dict[str, Any] | None = train.scheduler
            key: Key = ("train", "scheduler")
            if phase is not None and phase.scheduler is not None:
                raw, key = phase.scheduler, ("train", "phases", index, "scheduler")
            scheduler = None
            if raw is not None:
                scheduler, _ = self.torch_class(raw, key, "scheduler", NamedBlock, options_set_by_framework)
            schedulers.append(scheduler)
        return optimizer, options, tuple(schedulers)

    def optimizer(self, raw: dict[str, Any]) -> tuple[TorchClass | None, OptimizerOptions | None]:
        """Check the optimizer's block."""
        key: Key = ("train", "optimizer")
        return self.torch_class(raw, key, "optimizer", OptimizerOptions, lambda _: RESERVED_OPTIONS)

    def torch_class(
        self,
        raw: dict[str, Any],
        key: Key,
        what: Kind,
        base: type[_NamedModel],
        reserved: Callable[[type[Any]], set[str]],
    ) -> tuple[TorchClass | None, _NamedModel | None]:
        """Check the block of one of torch's classes, or of a plugin of the same kind.

        Args:
            raw: Block as plain data.
            key: Path of the block in the document.
            what: Kind of class (``optimizer``).
            base: Model of the framework's own options in the block.
            reserved: Function from a class to the parameters that a config may not set.
        """
        name = raw.get("name")
        if not isinstance(name, str):
            classes = OPTIMIZERS if what == "optimizer" else SCHEDULERS
            self._require_name(what, key, {*classes, *(plugin.name for plugin in entry_points.plugins(what))})
            return None, None
        try:
            cls = find_class(what, name)
            model = options_model(cls, base, skip=reserved(cls))
        except PluginError as error:
            where = self.document.location((*key, "name"))
            self.problems += (replace(p, where=f"{where} -> {p.where}" if p.where else where) for p in error.problems)
            return None, None
        block = self.block(model, raw, key, f"{what} {name!r}")
        if block is None:
            return None, None
        # Only the options that the config sets: torch's defaults apply to the others.
        given = {k: getattr(block, k) for k in sorted(block.model_fields_set) if k not in base.model_fields}
        return TorchClass(name, cls, given), block

    def _require_name(self, what: str, key: Key, names: Iterable[str]) -> None:
        where, fix = self.document.location(key), f"add name: ... to {what}"
        self.problems.append(Problem(f"{what} has no name", where, tuple(sorted(names)), fix))
