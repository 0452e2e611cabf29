"""One component of a config: a plugin with its options."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import transfer.errors
from transfer.config.torch_metrics import TorchMetric, metric_direction, try_metrics
from transfer.errors import ConfigError, PluginError, UserError, unknown_name
from transfer.interfaces import Backbone, DataSpec, FeatureSpec, Preprocessing, PrimaryMetric
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind


@dataclass(frozen=True)
class Component:
    """A plugin that a config names, with its options.

    Args:
        kind: Kind of plugin (``backbone``).
        plugin: Name, distribution and version of the plugin.
        cls: Class of the plugin.
        options: Checked options, with defaults filled in.
        resolved: Complete block as JSON values: the name, and the options with defaults filled in.
        where: Location of the block: file and line, or command-line override.
        weights: Earlier run whose weights a backbone starts from, if the framework reads them and not the plugin.
        metrics: Metrics of plugins and of torchmetrics that are added to those of a task.
        adds_metrics: Whether the option metrics of the block is the framework's, and not the task's.
        select_by: Metric that is the primary metric of a task. None keeps the task's own.
    """

    kind: Kind
    plugin: entry_points.Plugin
    cls: type[Any]
    options: Mapping[str, Any]
    resolved: Mapping[str, Any]
    where: str
    weights: str | None = None
    metrics: tuple[Component | TorchMetric, ...] = ()
    adds_metrics: bool = False
    select_by: str | None = None

    def make(self, *options_set_by_framework: Any) -> Any:
        """Build the component from the framework's arguments and the options; its errors name the block's location.

        Raises:
            UserError: An option is refused.
            PluginError: The constructor raises another exception, or does not set what its kind requires.
        """
        with error_location(self.where), plugin_errors(f"{self.kind} {self.plugin.name!r} cannot be built"):
            component = self.cls(*options_set_by_framework, **self.options)
            require_complete(self, component)
            if self.metrics:
                _add_metrics(component, self.metrics, *options_set_by_framework)
            if self.select_by is not None:
                component.primary_metric = _primary_metric(component.metrics(), self.select_by)
            return component

    def without_pretrained(self) -> Component:
        """Return this backbone with the options that start it from random weights."""
        with error_location(self.where):
            changed = self.cls.without_pretrained(self.options)
        options, resolved = {**self.options, **changed}, {**self.resolved, **changed}
        if self.weights is not None:
            del resolved["weights"]
        return replace(self, options=options, resolved=resolved, weights=None)


def _add_metrics(task: Any, added: tuple[Component | TorchMetric, ...], data: DataSpec) -> None:
    """Let a task's ``metrics`` return the metrics of plugins and of torchmetrics, too.

    Raises:
        ConfigError: A name occurs twice, or a metric does not fit the task.
    """
    metrics_of_task, inputs_of_task = task.metrics, task.metric_inputs
    by_name = {_metric_name(metric): metric for metric in added}
    names = [*metrics_of_task(), *map(_metric_name, added)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"task.metrics adds {twice[0]!r}, which exists already", fix="remove it")
    # Classes are predicted as indices, which have no ranking; numbers are their own scores.
    of_scores = [name for name, metric in by_name.items() if _takes_scores(metric, data)]

    def metrics() -> dict[str, Any]:
        made = {}
        for name, metric in by_name.items():
            with error_location(metric.where):
                made[name] = metric.make(data, task) if isinstance(metric, TorchMetric) else metric.make(data)
        return {**metrics_of_task(), **made}

    def metric_inputs(outputs: torch.Tensor) -> Mapping[str, torch.Tensor]:
        inputs = inputs_of_task(outputs)
        return {**inputs, **dict.fromkeys(of_scores, task.scores(outputs))} if of_scores else inputs

    metrics()  # the constructors may refuse their options
    task.metrics, task.metric_inputs = metrics, metric_inputs
    if not data.placeholders:
        try_metrics(task, [metric for metric in added if isinstance(metric, TorchMetric)], data)


def _metric_name(metric: Component | TorchMetric) -> str:
    return metric.name if isinstance(metric, TorchMetric) else metric.plugin.name


def _takes_scores(metric: Component | TorchMetric, data: DataSpec) -> bool:
    if isinstance(metric, TorchMetric):
        return data.target in ("class", "labels")
    return bool(getattr(metric.cls, "takes_scores", False))


def _primary_metric(metrics: Mapping[str, Any], name: str) -> PrimaryMetric:
    """Return the metric that ``task.select_by`` names.

    Raises:
        ConfigError: The task has no such metric, or it does not declare its direction.
    """
    if name not in metrics:
        fix = "set train.select: loss instead" if name == "loss" else "choose one, or add it to task.metrics"
        problem = unknown_name("metric", name, metrics, fix=fix)
        raise ConfigError.of([replace(problem, message=f"task.select_by is wrong: {problem.message}")])
    return PrimaryMetric(name, metric_direction(metrics, name))


@contextmanager
def error_location(where: str) -> Iterator[None]:
    """Add a location to errors raised in the block that have none; a ValueError or TypeError becomes a ConfigError."""
    try:
        yield
    except UserError as error:
        error.problems = tuple(p if p.where else replace(p, where=where) for p in error.problems)
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=where) from error


@contextmanager
def plugin_errors(what: str) -> Iterator[None]:
    """Convert an exception of a plugin's code inside the block to a PluginError with the line that raised it.

    ValueError and TypeError are not converted: a plugin raises them to refuse the value of an option.

    Args:
        what: Failed operation, for the message (``backbone 'mine' cannot be built``).
    """
    try:
        yield
    except (UserError, ValueError, TypeError):
        raise
    except Exception as error:  # a plugin's code may raise anything
        fix = next((fix for text, fix in _KNOWN_CAUSES.items() if text in str(error)), _DEBUG)
        raise PluginError(f"{what}: {type(error).__name__}: {error}{_line_of(error)}", fix=fix) from error


_DEBUG = "correct the plugin; `transfer --debug` shows the traceback"
_KNOWN_CAUSES = {
    "before Module.__init__() call": "call super().__init__ before modules are assigned to attributes",
    "on the expected device meta": "register constant tensors as buffers, which move with the module (register_buffer)",
    "cannot be called on meta tensors": "compute numbers without torch: a constructor runs on the meta device, too",
}
"""Fixes by a part of torch's message."""


def _line_of(error: Exception) -> str:
    """Return the file and line of the plugin's code that raised, in parentheses; empty if there is none."""
    # The innermost frames are often torch's, and the outermost ones are the framework's.
    frames = traceback.extract_tb(error.__traceback__)
    plugin = [f for f in frames if not f.filename.startswith((_TORCH, _CORE, "<"))]
    return f" ({plugin[-1].filename}:{plugin[-1].lineno})" if plugin else ""


_TORCH, _CORE = (f"{Path(file).parent}{os.sep}" for file in (str(torch.__file__), str(transfer.errors.__file__)))


def require_complete(block: Component, component: Any) -> None:
    """Require that a built component has the attributes of its kind.

    Raises:
        PluginError: An attribute is missing, or has a wrong type.
    """
    if (problem := _violation(block.kind, component)) is not None:
        fix = f"correct the class {block.cls.__qualname__} of {block.plugin.distribution}"
        raise PluginError(f"{block.kind} {block.plugin.name!r} is incomplete: {problem}", fix=fix)


def _violation(kind: Kind, component: Any) -> str | None:
    """Return the first attribute that a built component lacks, or that has a wrong type; None if there is none."""
    if kind in ("backbone", "head") and not isinstance(getattr(component, "_modules", None), dict):
        return "its constructor does not call super().__init__"
    match kind:
        case "dataset" if not isinstance(spec := component.spec, DataSpec):
            return f"spec is {spec!r}: expected a transfer.DataSpec"
        case "head" if type(component).forward is nn.Module.forward:
            return "it does not define forward"
        case "task":
            if not hasattr(component, "out_features"):
                return "its constructor does not set out_features, the number of outputs of the model"
            if not isinstance(metric := getattr(component, "primary_metric", None), PrimaryMetric):
                return f"primary_metric is {metric!r}: expected a transfer.PrimaryMetric"
        case "backbone":
            return _backbone_violation(component)
    return None


def _backbone_violation(backbone: Any) -> str | None:
    if "stages" not in backbone._modules:
        return "its constructor does not call super().__init__ with the stages"
    # Not backbone.fields: torch replaces the AttributeError of a property by one that names the property.
    if type(backbone).fields is Backbone.fields and not isinstance(field := getattr(backbone, "field", None), str):
        return f"the class attribute field is {field!r}: expected the name of a field, such as 'image'"
    if not isinstance(features := backbone.features, FeatureSpec):
        return f"features is {features!r}: expected a transfer.FeatureSpec"
    if not isinstance(preprocessing := backbone.preprocessing, Preprocessing):
        return f"preprocessing is {preprocessing!r}: expected a transfer.Preprocessing"
    stages = dict(zip(backbone.stage_names, backbone.stages, strict=True))
    uses = Counter(parameter for stage in stages.values() for parameter in set(stage.parameters()))
    shared = next((parameter for parameter, count in uses.items() if count > 1), None)
    if shared is not None:
        # Freezing and checkpoints refer to a parameter by its stage, which would be ambiguous.
        names = [name for name, stage in stages.items() if any(p is shared for p in stage.parameters())]
        return f"the stages {' and '.join(map(repr, names))} share a parameter: expected it in one of them"
    return None
