"""Checking a config: every problem at once, each with its location."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from transfer.config.component import Component
from transfer.config.option_schema import options_model, validate
from transfer.config.recipes import WITHOUT_PRETRAINED
from transfer.config.run_config import RunConfig, RunConfigSchema
from transfer.config.torch_classes import OPTIMIZERS, RESERVED_OPTIONS, SCHEDULERS, TorchClass, options_set_by_framework
from transfer.config.train_settings import (
    LEARNING_RATE,
    DataOptions,
    NamedBlock,
    OptimizerOptions,
    TrainConfig,
)
from transfer.config.yaml_document import Document, Key, make_document, read_document
from transfer.errors import ConfigError, PluginError, Problem, nearest
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind


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
    component, _ = check.component(kind, check.document.data[section], NamedBlock)
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
        top = self.block(RunConfigSchema, self.document.data, (), "the config")
        # A mistake at the top level must not hide those inside the sections that are there.
        raw = (
            {name: self.document.data.get(name) for name in RunConfigSchema.model_fields} if top is None else dict(top)
        )
        dataset, data_options = self.component("dataset", raw["data"], DataOptions)
        backbone, _ = self.component("backbone", raw["backbone"], NamedBlock)
        head, _ = self.component("head", raw["head"], NamedBlock)
        task, _ = self.component("task", raw["task"], NamedBlock)
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
        resolved: dict[str, Any] = {"seed": top.seed, "data": dataset.resolved}
        resolved |= {"backbone": backbone.resolved, "head": head.resolved, "task": task.resolved}
        resolved |= {"train": train.model_dump(mode="json")}
        resolved["train"]["optimizer"] = {"lr": LEARNING_RATE} | resolved["train"]["optimizer"]
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
        )

    def block(self, model: type[_M], value: Any, key: Key, what: str) -> _M | None:
        checked, problems = validate(model, value, self.document, key, what)
        self.problems += problems
        return checked

    def trackers(self, raw: Any) -> list[Component]:
        found: dict[str, Component] = {}
        for index, block in enumerate(raw if isinstance(raw, list | tuple) else ()):
            block = {"name": block} if isinstance(block, str) else block
            component, _ = self.component("tracker", block, NamedBlock, ("trackers", index))
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
            where = self.document.location(key)
            self.problems.append(Problem(f"{section} needs a name", where, tuple(names), f"add name: ... to {section}"))
            return None, None
        try:
            plugin, cls = entry_points.find(kind, name), entry_points.load(kind, name)
            model = options_model(cls, base)
        except PluginError as error:
            where = self.document.location((*key, "name"))
            # An import error knows the entry point at fault; the config's line still says who asked for it.
            self.problems += (replace(p, where=f"{where} -> {p.where}" if p.where else where) for p in error.problems)
            return None, None
        block = self.block(model, raw, key, f"{kind} {name!r}")
        if block is None:
            return None, None
        options = {field: getattr(block, field) for field in model.model_fields if field not in base.model_fields}
        where = self.document.location(key)
        return Component(kind, plugin, cls, options, block.model_dump(mode="json"), where), block

    def training(
        self, train: TrainConfig
    ) -> tuple[TorchClass | None, OptimizerOptions | None, tuple[TorchClass | None, ...]]:
        optimizer, options = self.optimizer(train.optimizer)
        schedulers = []
        for index, phase in enumerate(train.phases or [None]):
            raw: dict[str, Any] | None = train.scheduler
            key: Key = ("train", "scheduler")
            if phase is not None and phase.scheduler is not None:
                raw, key = phase.scheduler, ("train", "phases", index, "scheduler")
            part = None
            if raw is not None:
                part, _ = self.torch_part(raw, key, "scheduler", SCHEDULERS, NamedBlock, options_set_by_framework)
            schedulers.append(part)
        return optimizer, options, tuple(schedulers)

    def optimizer(self, raw: dict[str, Any]) -> tuple[TorchClass | None, OptimizerOptions | None]:
        key: Key = ("train", "optimizer")
        return self.torch_part(raw, key, "optimizer", OPTIMIZERS, OptimizerOptions, lambda _: RESERVED_OPTIONS)

    def torch_part(
        self,
        raw: dict[str, Any],
        key: Key,
        what: str,
        known: Mapping[str, type[Any]],
        base: type[_N],
        no_options: Callable[[type[Any]], set[str]],
    ) -> tuple[TorchClass | None, _N | None]:
        name = raw.get("name")
        if not isinstance(name, str):
            fix = f"add name: ... to {what}"
            self.problems.append(
                Problem(f"{what} needs a name", self.document.location(key), tuple(sorted(known)), fix)
            )
            return None, None
        if name not in known:
            close = nearest(name, known)
            fix = f"did you mean {close!r}?" if close else f"choose one of torch's {what}s"
            where = self.document.location((*key, "name"))
            self.problems.append(Problem(f"there is no {what} called {name!r}", where, tuple(sorted(known)), fix))
            return None, None
        block = self.block(options_model(known[name], base, skip=no_options(known[name])), raw, key, f"{what} {name!r}")
        if block is None:
            return None, None
        given = {k: getattr(block, k) for k in sorted(block.model_fields_set) if k not in base.model_fields}
        return TorchClass(name, known[name], given), block


_M = TypeVar("_M", bound=BaseModel)
_N = TypeVar("_N", bound=NamedBlock)
