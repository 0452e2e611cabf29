"""torchmetrics' metrics by name, with the options that a config may set."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from transfer.errors import ConfigError, Problem, unknown_name
from transfer.interfaces import DataSpec, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

    from transfer.config.collected_metrics import CollectedMetric

RESERVED_OPTIONS = {"num_classes", "num_labels", "num_outputs", "multidim_average", "ignore_index", "validate_args"}
"""Options of metrics that a config may not set: the framework passes them, or they have no effect here."""
PLACEHOLDER_CLASSES = 1000
"""Number of classes for metrics before the data is read, so that options such as top_k are not refused too early."""
PROBE_EXAMPLES = 8
"""Number of made-up examples on which a metric is tried out."""

_ALIASES = {"mcc": "matthews_corrcoef"}
# Curves, matrices, pairs and the EER of each class are not one number; the other three compare distributions.
_EXCLUDED = re.compile(r"ConfusionMatrix|StatScores|\w*Curve|ROC|\w+At\w+|EER|Continuous\w+|KLDivergence|Jensen\w+")
_PREFIXES = {"class": "Multiclass", "labels": "Multilabel", "number": ""}


@cache
def torch_metrics(target: str) -> Mapping[str, type[Metric]]:
    """Return torchmetrics' metrics for a kind of target by the names of their functions, such as ``f1_score``."""
    prefix, kind = _PREFIXES[target], "regression" if target == "number" else "classification"
    # Here, because torchmetrics imports torchvision and scipy, which takes longer than to predict.
    module = importlib.import_module(f"torchmetrics.{kind}")
    # The function of MulticlassFBetaScore is multiclass_fbeta_score, for example.
    functions = {
        name.replace("_", ""): name for name in importlib.import_module(f"torchmetrics.functional.{kind}").__all__
    }
    classes = {}
    for name in module.__all__:
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and name.lower() in functions and not _EXCLUDED.fullmatch(short):
            key = functions[name.lower()].removeprefix(f"{prefix.lower()}_" if prefix else "")
            classes[key] = getattr(module, name)
    return classes | {alias: classes[name] for alias, name in _ALIASES.items() if name in classes}


def find_torch_metric(name: str, targets: Collection[str]) -> type[Metric] | None:
    """Return torchmetrics' metric of a name for the first of some kinds of target that has one."""
    return next((metric for target in sorted(targets) if (metric := torch_metrics(target).get(name))), None)


def unknown_metric(name: str, targets: Collection[str], plugins: Iterable[str], where: str | None) -> Problem:
    """Return the problem of a metric that neither a plugin nor torchmetrics has for these kinds of target."""
    available = {*plugins, *(key for target in targets for key in torch_metrics(target))}
    if others := [target for target in _PREFIXES if name in torch_metrics(target)]:
        message = f"metric {name!r} does not fit the task: expected targets of kind {' or '.join(others)}, got "
        return Problem(message + " or ".join(sorted(targets)), where, tuple(sorted(available)), "choose another metric")
    return unknown_name("metric", name, available, where=where)


@dataclass(frozen=True)
class TorchMetric:
    """A metric of torchmetrics that a task's block adds, with the options of the config.

    Args:
        metric: Name of the metric in the config.
        options: Checked options that the config sets. torchmetrics' defaults apply to the others.
        where: Location of the block: file and line, or command-line override.
    """

    metric: str
    options: Mapping[str, Any]
    where: str

    @property
    def name(self) -> str:
        """Name of the metric among those of the task: with the options, such as ``accuracy_top_k_5``."""
        parts = [str(value) if isinstance(value, str) else f"{key}_{value}" for key, value in self.options.items()]
        return re.sub(r"[^\w.-]+", "_", "_".join([self.metric, *parts])).strip("_").lower()

    def make(self, data: DataSpec, task: Task) -> CollectedMetric:
        """Build the metric on the CPU.

        Raises:
            ValueError: torchmetrics refuses an option.
        """
        from torchmetrics.classification import MulticlassAccuracy

        from transfer.config.collected_metrics import collected_metric

        cls = torch_metrics(data.target)[self.metric]
        parameters = torchmetrics_parameters(cls)
        count = PLACEHOLDER_CLASSES if data.placeholders else task.out_features
        options: dict[str, Any] = {key: count for key in ("num_classes", "num_labels") if key in parameters}
        if "num_outputs" in parameters:
            options["num_outputs"] = len(data.classes)
        if cls is MulticlassAccuracy:
            # The mean over examples, as the task's own accuracy; torchmetrics' default is the mean over classes.
            options["average"] = "micro"
        if "threshold" in parameters and (threshold := getattr(task, "threshold", None)) is not None:
            options["threshold"] = threshold
        options |= self.options
        # torchmetrics counts a class without examples, or with all of them, as an AUROC of 0.
        skips_undefined = cls.__name__.endswith(("AUROC", "LogAUC")) and options.get("average", "macro") == "macro"
        if skips_undefined:
            options["average"] = "none"
        # On the CPU: a config is checked on the meta device. torchmetrics warns about the memory of some metrics.
        with torch.device("cpu"), warnings.catch_warnings(action="ignore"):
            metric = cls(**options)
            metric.validate_args = False  # checks of every batch would wait for the device
            return collected_metric(cls)(metric, count if skips_undefined else None)


def torchmetrics_parameters(cls: type[Metric]) -> Collection[str]:
    """Return the names of the parameters of a metric's constructor."""
    return inspect.signature(cls).parameters


def try_metrics(task: Task, metrics: Iterable[TorchMetric], data: DataSpec) -> None:
    """Compute metrics of torchmetrics on made-up outputs of a task.

    Raises:
        ConfigError: A metric does not take the outputs or the targets of the task, or returns more than one number.
    """
    with torch.device("cpu"):
        count = task.out_features
        outputs = torch.linspace(0.1, 1.0, PROBE_EXAMPLES * count).roll(count // 2).reshape(PROBE_EXAMPLES, count)
        examples = torch.arange(PROBE_EXAMPLES)
        labels = (examples[:, None] + torch.arange(len(data.classes))) % 2
        numbers = 1.0 + examples[:, None].expand(-1, len(data.classes))
        targets = {"class": examples % len(data.classes), "labels": labels.float(), "number": numbers}[data.target]
        for metric in metrics:
            built = task.metrics()[metric.name]
            fix = "choose another metric, or other options"
            try:
                built.update(task.metric_inputs(outputs).get(metric.name, task.predictions(outputs)), targets)
                value = built.compute()
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                message = f"metric {metric.metric!r} does not fit the task: {error}"
                raise ConfigError(message, where=metric.where, fix=fix) from error
            if value.numel() != 1:
                message = f"metric {metric.metric!r} returns {value.numel()} values: expected one number"
                raise ConfigError(message, where=metric.where, fix="set the option average, or choose another metric")


def metric_direction(metrics: Mapping[str, Any], name: str) -> bool:
    """Return whether a higher value of one of a task's metrics is better.

    Raises:
        ConfigError: The metric does not declare its direction.
    """
    direction = metrics[name].higher_is_better
    if direction is None:
        raise ConfigError(
            f"metric {name!r} has no direction: expected higher_is_better to be true or false",
            fix="select another metric, or declare higher_is_better in the metric",
        )
    return bool(direction)
