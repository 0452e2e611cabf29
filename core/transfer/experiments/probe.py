"""Backbones side by side: simple classifiers on their frozen features, for several numbers of labels.

The features come from the feature cache. Three classifiers are fitted to them: logistic regression, whose solver is
that of ``recipe: feature_extraction``; the nearest class mean; and k nearest neighbors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from transfer.config.run_config import Config, RunConfig
from transfer.data.splits import digest, strata
from transfer.errors import ConfigError, DataError, UserError
from transfer.experiments.comparison import (
    RESAMPLED_TEST_SPLITS,
    Verdict,
    higher_is_better,
    resampled_means,
    verdict,
)
from transfer.experiments.feature_classifiers import LINEAR_NAMES, fitted_classifiers
from transfer.experiments.frozen_features import Examples, features_of, probing_config
from transfer.experiments.intervals import (
    Bounds,
    Difference,
    Spread,
    difference,
    metric_bounds,
    resamples,
    spread,
    standard_error,
)
from transfer.interfaces import Task
from transfer.models.saved_backbone import build_backbone
from transfer.runs.train import run_in
from transfer.storage.run_directory import RunDirectory
from transfer.system.ranks import refuse_several
from transfer.training.build import BuiltExperiment, build
from transfer.training.evaluation import PREDICTIONS, inputs_of_metrics
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import preflight
from transfer.training.solver import reason_not_solved

Shots = int | Literal["full"]
"""Number of labeled examples of each class, or all of them."""
SHOTS: tuple[Shots, ...] = (1, 4, 16, "full")
"""Default numbers of labels."""
ZERO_SHOT = "zero shot"


@dataclass(frozen=True)
class ProbeRow:
    """One classifier on the features of one backbone.

    Args:
        config: Name of the config.
        classifier: Name of the classifier.
        shots: Number of labeled examples of each class, or ``full``.
        labels: Number of labels in words, such as ``16 labels per class``.
        examples: Number of training examples and of validation examples.
        spread: Mean, standard deviation and interval of the metric on the test split over the draws of examples.
        validation: Mean of the metric on the validation examples.
        chosen: Number of neighbors, or strength of the L2 penalty, that was chosen in each draw.
        difference: Difference to the row that is best on the validation examples; None in that row.
        verdict: Whether the difference is larger than noise, and its direction.
    """

    config: str
    classifier: str
    shots: Shots
    labels: str
    examples: tuple[int, int]
    spread: Spread
    validation: float
    chosen: tuple[float, ...]
    difference: Difference | None = None
    verdict: Verdict = "reference"

    def __str__(self) -> str:
        return f"{self.config} with {self.classifier}"


@dataclass(frozen=True)
class Probe:
    """The result of :func:`probe`.

    Args:
        metric: Name of the metric.
        higher_is_better: Whether higher values of the metric are better.
        rows: Rows, by number of labels.
        notes: Sources of noise that the intervals cover, and warnings.
        recommendation: Sentences about the best backbone and the number of labels.
        seconds: Time for the features (with data and weights) and for the classifiers.
        folder: Run directory of the kept model; None if none was kept.
    """

    metric: str
    higher_is_better: bool
    rows: tuple[ProbeRow, ...]
    notes: tuple[str, ...]
    recommendation: tuple[str, ...]
    seconds: Mapping[str, float]
    folder: Path | None = None

    def json(self) -> str:
        """Return the result as JSON."""
        folder = None if self.folder is None else str(self.folder)
        return json.dumps(asdict(self) | {"folder": folder})


def probe(
    configs: Sequence[Config],
    overrides: Sequence[str] = (),
    *,
    shots: Sequence[Shots] | None = None,
    seeds: int = 5,
    keep: bool = False,
    output: str | Path = "runs",
    device: str | None = None,
    observe: Observer = ignore_events,
) -> Probe:
    """Compare the frozen backbones of configs by simple classifiers on their features.

    Heads, tasks' losses aside, and training options of the configs are not used. The number of neighbors and the
    strength of the L2 penalty are chosen on validation examples, at most as many of each class as there are training
    examples. The test split is scored once for each draw of examples.

    Args:
        configs: Paths of YAML files, or configs as mappings, all with the same data.
        overrides: Changes to every config, each ``path.to.key=value``.
        shots: Numbers of labeled examples of each class, or ``full``. For labels and numbers, numbers of examples in
            total. None uses 1, 4, 16 and ``full``, as far as there are enough examples.
        seeds: Number of draws of the examples, the same draws for every backbone.
        keep: Whether to write an ordinary run of the best backbone, with the linear model on all examples as its head.
        output: Folder in which the run directory is created.
        device: Device to compute on. None uses the ``train.device`` of each config.
        observe: Function that is called with notes and the progress of computing features.

    Raises:
        UserError: A config, the data or the weights are wrong, the configs have different data, or there are too few
            examples.
        TrainingError: Features are not finite.
    """
    refuse_several("transfer probe")
    if not configs:
        raise UserError("there is nothing to probe: expected one config or more", fix="give the paths of YAML files")
    if seeds < 1:
        raise UserError(f"the number of seeds is too small: expected 1 or more, got {seeds}", fix="use 5, for example")
    overrides = [*overrides, *([] if device is None else [f"train.device={device}"])]
    checked = [probing_config(config, overrides) for config in configs]
    names = _names(checked)
    for config in checked:  # all of them before the first features: an error should not appear after minutes
        _require_linear_model(config)
    seconds = {"features": 0.0, "classifiers": 0.0}
    results: dict[tuple[Shots, str, str], _Result] = {}
    first: BuiltExperiment | None = None
    notes: list[str] = []
    for number, (name, config) in enumerate(zip(names, checked, strict=True), 1):
        observe(Note(f"{name}, backbone {number} of {len(names)}"))
        started = time.perf_counter()
        # The notes of a run about its weights and its splits would hide the table.
        built = build(config, lambda event: None if isinstance(event, Note) else observe(event))
        first = first or built
        _require_same_data(built, first)
        if not built.pretrained:
            notes.append(f"warning: {name} loads no pretrained weights, so its features are those of random weights")
            observe(Note(notes[-1]))
        levels = _levels(built, shots)
        features = features_of(built, observe)
        seconds["features"] += time.perf_counter() - started
        started = time.perf_counter()
        if (zero_shot := _zero_shot(built, features)) is not None:
            results[0, name, ZERO_SHOT] = zero_shot
        for level in levels:
            for classifier, result in _results(built, features, level, range(config.seed, config.seed + seeds)).items():
                results[level, name, classifier] = result
        seconds["classifiers"] += time.perf_counter() - started
    assert first is not None
    started = time.perf_counter()
    task = first.experiment.task
    levels = [*([0] if any(level == 0 for level, *_ in results) else []), *levels]
    rows = [row for level in levels for row in _rows(level, results, task, first)]
    sign = 1 if task.primary_metric.higher_is_better else -1
    recommendation = _recommendation(rows, results, levels, sign, first)
    seconds["classifiers"] += time.perf_counter() - started
    notes.insert(0, _noise_note(first, seeds, levels))
    folder = None
    if keep:
        linear = [row for row in rows if row.shots == levels[-1] and row.classifier in LINEAR_NAMES.values()]
        best = max(linear, key=lambda row: sign * row.validation)
        config = checked[names.index(best.config)]
        recommendation.append(f"kept: {best.config} with a linear head on all training examples")
        folder = run_in(
            lambda: RunDirectory.create(Path(output), config.name), config, quick=False, observe=observe
        ).folder
    direction = higher_is_better(task, task.primary_metric.name)
    return Probe(task.primary_metric.name, direction, tuple(rows), tuple(notes), tuple(recommendation), seconds, folder)


def parse_shots(texts: Sequence[str]) -> list[Shots]:
    """Return numbers of labels from texts: numbers, ``full``, or several of them separated by commas.

    Raises:
        UserError: A text is neither.
    """
    shots: list[Shots] = []
    for text in ",".join(texts).split(","):
        if text.strip() != "full" and not (text.strip().isdecimal() and int(text)):
            raise UserError(f"--shots is wrong: expected numbers of 1 or more, or full, got {text!r}")
        shots.append("full" if text.strip() == "full" else int(text))
    return shots


# ----------------------------------------------------------------------------------------------- configs and features


def _names(configs: Sequence[RunConfig]) -> list[str]:
    """Return a name of each config: that of its file, with a number if it is not unique."""
    names = [config.name for config in configs]
    return [
        name if names.count(name) == 1 else f"{name} {names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def _require_linear_model(config: RunConfig) -> None:
    with torch.device("meta"):
        layout = build_backbone(config.backbone).features.layout
    if layout != "vector":
        raise ConfigError(
            f"backbone {config.backbone.plugin.name!r} gives a {layout} of features: expected a vector to probe",
            where=config.backbone.where,
            fix="choose a backbone, or an option of it, that pools the sequence to a vector",
        )
    parts = preflight(config)
    _refuse_unsolved(reason_not_solved(config, parts.backbone, parts.model, parts.task, 0), config)


def _refuse_unsolved(reason: str | None, config: RunConfig) -> None:
    if reason is not None:
        raise ConfigError(f"a linear model cannot be fitted to the features: {reason}", where=config.task.where)


def _require_same_data(built: BuiltExperiment, first: BuiltExperiment) -> None:
    """Require the splits that a probe needs, and the same examples as those of the first config."""
    where = built.config.data.where
    if missing := {"validation", "test"} - built.loaders.keys():
        names = " and no ".join(f"{name} split" for name in sorted(missing, reverse=True))
        raise DataError(
            f"the data has no {names}: a probe chooses on the validation split and scores the test split",
            where=where,
            fix="set data.validation to 0.1, for example"
            if missing == {"validation"}
            else "give the data a second split for the test",
        )
    if built.data.classes != first.data.classes or built.data.target != first.data.target:
        classes, others = (", ".join(one.data.classes[:5]) for one in (built, first))
        raise DataError(
            f"the configs have different classes: expected {others}, as in {first.config.data.where}, got {classes}",
            where=where,
            fix="give every config the same data",
        )
    for name, loader in first.loaders.items():
        if digest({name: loader.split}) != digest({name: built.loaders[name].split}):
            raise DataError(
                f"the configs have different {name} examples: {len(built.loaders[name].split):,} instead of the "
                f"{len(loader.split):,} of {first.config.data.where}",
                where=where,
                fix="give every config the same data, for example by an override: data.validation=0.2",
            )
    task, reference = built.experiment.task, first.experiment.task
    if type(task) is not type(reference) or task.primary_metric != reference.primary_metric:
        raise ConfigError(
            f"the configs have different tasks: expected {first.config.task.plugin.name!r}, "
            f"got {built.config.task.plugin.name!r}",
            where=built.config.task.where,
            fix="give every config the same task",
        )
    examples = len(built.loaders["train"].split)
    reason = reason_not_solved(built.config, built.backbone, built.experiment.model, task, examples)
    _refuse_unsolved(reason and f"{reason}; set data.limit", built.config)


def _levels(built: BuiltExperiment, shots: Sequence[Shots] | None) -> list[Shots]:
    """Return the numbers of labels in increasing order; of the default, only those with enough examples."""
    targets = built.loaders["train"].split.targets
    smallest = min(strata(targets), key=len)
    if shots is None:
        return [level for level in SHOTS if level == "full" or level <= len(smallest)]
    levels = sorted(set(shots), key=lambda level: np.inf if level == "full" else level)
    too_many = [level for level in levels if level != "full" and level > len(smallest)]
    if too_many:
        kind = f"class {built.data.classes[int(targets[smallest[0]])]!r}" if built.data.target == "class" else "data"
        raise DataError(
            f"the {kind} has too few training examples for shots {too_many[0]}: expected {too_many[0]} or more, got "
            f"{len(smallest)}",
            where=built.config.data.where,
            fix=f"use --shots {len(smallest)} or fewer, or full",
        )
    return levels


# -------------------------------------------------------------------------------------------------------- classifiers


@dataclass
class _Result:
    """Values of one classifier, one for each draw of examples.

    Args:
        examples: Number of training examples and of validation examples.
        values: Metric on the test split.
        validations: Metric on the validation examples.
        chosen: Number of neighbors, or strength of the L2 penalty.
        inputs: Inputs of the metric for the test split, (N, ...) each, for the bootstrap.
    """

    examples: tuple[int, int]
    values: list[float]
    validations: list[float]
    chosen: list[float]
    inputs: list[Tensor]


def _results(
    built: BuiltExperiment, features: Mapping[str, Examples], level: Shots, seeds: Sequence[int]
) -> dict[str, _Result]:
    """Return the values of each classifier for one number of labels."""
    results: dict[str, _Result] = {}
    primary_metric = built.experiment.task.primary_metric
    metric = built.experiment.task.metrics()[primary_metric.name]  # building a metric takes longer than computing it
    for seed in seeds if level != "full" else seeds[:1]:  # all examples are the same in every draw
        train, validation = (
            features[name].select(_draw(built.loaders[name].split.targets, level, seed))
            for name in ("train", "validation")
        )
        task: Task = built.config.task.make(built.data)
        task.prepare(train.targets.cpu().numpy())  # balanced weights, or the scale of numbers, of these examples
        for classifier, (predict, parameters) in fitted_classifiers(
            built, task, train, validation, level != "full"
        ).items():
            scored = [
                (parameter, *_score(task, metric, outputs, validation.targets), outputs)
                for parameter, outputs in zip(parameters, predict(validation.features, parameters), strict=True)
            ]
            sign = 1 if primary_metric.higher_is_better else -1
            # Few validation examples often have the same accuracy; then the loss decides.
            parameter, value, *_ = max(
                scored, key=lambda one: (sign * one[1], -float(task.loss(one[3], validation.targets).mean()))
            )
            (outputs,) = predict(features["test"].features, [parameter])
            test, inputs = _score(task, metric, outputs, features["test"].targets)
            counts = len(train.targets), len(validation.targets)
            result = results.setdefault(classifier, _Result(counts, [], [], [], []))
            result.values.append(test)
            result.validations.append(value)
            result.chosen.append(parameter)
            result.inputs.append(inputs)
    return results


def _zero_shot(built: BuiltExperiment, features: Mapping[str, Examples]) -> _Result | None:
    """Return the values of the zero-shot classifier; None if the backbone has no text tower."""
    if built.data.target != "class":
        return None
    names = [name.replace("_", " ") for name in built.data.classes]
    if (classifier := built.backbone.zero_shot(names)) is None:
        return None
    task, scores = built.experiment.task, {}
    metric = task.metrics()[task.primary_metric.name]
    for split in ("validation", "test"):
        rows = features[split].features.float()
        outputs = F.linear(rows, *(one.to(rows) for one in classifier))
        scores[split] = _score(task, metric, outputs, features[split].targets)
    value, inputs = scores["test"]
    return _Result((0, 0), [value], [scores["validation"][0]], [0], [inputs])


def _draw(targets: npt.NDArray[Any], level: Shots, seed: int) -> npt.NDArray[np.int64] | None:
    """Return the indices of examples, at most ``level`` of each class; None for all. Larger draws contain smaller."""
    if level == "full":
        return None
    generator = np.random.default_rng((seed, len(targets)))
    return np.sort(np.concatenate([generator.permutation(members)[:level] for members in strata(targets)]))


def _score(task: Task, metric: Metric, outputs: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Return the primary metric, and its input (N, ...) on the CPU."""
    inputs = inputs_of_metrics(task, outputs.cpu())
    values = inputs.get(task.primary_metric.name, inputs[PREDICTIONS])
    metric.reset()
    metric.update(values, targets.cpu())
    return float(metric.compute()), values


# ------------------------------------------------------------------------------------------------- rows and sentences


def _rows(
    level: Shots, results: Mapping[tuple[Shots, str, str], _Result], task: Task, first: BuiltExperiment
) -> list[ProbeRow]:
    """Return the rows of one number of labels, compared to the one that is best on the validation examples."""
    bounds = metric_bounds(task, task.primary_metric.name)
    sign = 1 if task.primary_metric.higher_is_better else -1
    targets = torch.as_tensor(first.loaders["test"].split.targets)
    rows, resampled = [], []
    for (shots, config, classifier), result in results.items():
        if shots != level:
            continue
        resampled.append(means := _resampled(task, result, targets))
        error = None if means is None else standard_error(means)
        row_spread = spread(result.values, bounds, error)
        validation = float(np.mean(result.validations))
        labels = _labels(level, result.examples[0], first.data.target)
        rows.append(
            ProbeRow(config, classifier, level, labels, result.examples, row_spread, validation, tuple(result.chosen))
        )
    best = max(range(len(rows)), key=lambda index: sign * rows[index].validation)
    return [
        row if index == best else _compared(row, rows[best], resampled[index], resampled[best], task, bounds)
        for index, row in enumerate(rows)
    ]


def _compared(
    row: ProbeRow,
    reference: ProbeRow,
    resampled: Sequence[float] | None,
    reference_resampled: Sequence[float] | None,
    task: Task,
    bounds: Bounds,
) -> ProbeRow:
    """Return a row with its difference to another one, over the same draws and test examples."""
    error = None
    if resampled is not None and reference_resampled is not None:
        error = standard_error([one - other for one, other in zip(resampled, reference_resampled, strict=True)])
    ours, theirs = row.spread.values, reference.spread.values
    if len(ours) != len(theirs):  # one of them has all examples, which are the same in every draw
        count = max(len(ours), len(theirs))
        ours, theirs = (values if len(values) == count else values * count for values in (ours, theirs))
    to_reference = difference(ours, theirs, paired=True, standard_error_of_examples=error, bounds=bounds)
    judged = verdict(to_reference, higher_is_better=task.primary_metric.higher_is_better)
    return replace(row, difference=to_reference, verdict=judged)


def _resampled(task: Task, result: _Result, targets: Tensor) -> list[float] | None:
    """Return the mean metric over the draws on each bootstrap resample of the test split; None if it is undefined."""
    draws = resamples(len(targets), RESAMPLED_TEST_SPLITS)
    if all(values.shape == targets.shape for values in result.inputs):
        # A metric that is a mean over examples, such as accuracy and mean absolute error: no metric object is updated
        # for each resample, which takes a hundred times as long.
        hits_or_errors = [
            (values == targets).double() if values.dim() == 1 else (values - targets).abs().double().mean(1)
            for values in result.inputs
        ]
        if np.allclose([float(one.mean()) for one in hits_or_errors], result.values, atol=1e-6):
            mean = torch.stack(hits_or_errors).mean(0).numpy()
            return [float(mean[indices].mean()) for indices in draws]
    metric = task.metrics()[task.primary_metric.name]
    return resampled_means(metric, result.inputs, [targets] * len(result.inputs), draws)


def _labels(level: Shots, examples: int, target: str) -> str:
    """Return a number of labels in words."""
    if level == "full":
        return f"all {examples:,} labels"
    if level == 0:
        return "no labels"
    return f"{level} label{'s' * (level > 1)}" + (" per class" if target == "class" else "")


def _number(row: ProbeRow) -> str:
    interval = row.spread.interval
    return f"{row.spread.mean:.4f}" + ("" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})")


def _recommendation(
    rows: Sequence[ProbeRow],
    results: Mapping[tuple[Shots, str, str], _Result],
    levels: Sequence[Shots],
    sign: int,
    first: BuiltExperiment,
) -> list[str]:
    """Return sentences about the best backbone with the most labels, and about the number of labels that it needs."""
    task = first.experiment.task
    last = [row for row in rows if row.shots == levels[-1]]
    best = next(row for row in last if row.verdict == "reference")
    metric = task.primary_metric.name.replace("_", " ")
    sentences = [f"best on validation with {best.labels}: {best}, test {metric} {_number(best)}"]
    for judged in ("better", "within noise", "worse"):
        others = [row for row in last if row.verdict == judged]
        if others and judged == "worse" and len(others) == len(last) - 1:
            sentences.append("every other row is worse by more than noise")
        elif others and judged != "worse":
            listed = ", ".join(f"{row} {row.spread.mean:.4f}" for row in others)
            sentences.append(f"{judged} on the test split: {listed}")
    if len(levels) < 2:
        return sentences
    targets = torch.as_tensor(first.loaders["test"].split.targets)
    bounds = metric_bounds(task, task.primary_metric.name)
    reference = _resampled(task, results[best.shots, best.config, best.classifier], targets)
    for level in levels[:-1]:
        candidates = [row for row in rows if row.shots == level and row.config == best.config]
        if not candidates:  # only some backbones have a text tower
            continue
        row = max(candidates, key=lambda one: sign * one.validation)
        resampled = _resampled(task, results[level, row.config, row.classifier], targets)
        if _compared(row, best, resampled, reference, task, bounds).verdict != "worse":
            sentences.append(f"fewest labels within noise of {best.labels}: {row.labels}, {_number(row)}")
            return sentences
    sentences.append(f"{row.labels} are worse than {best.labels}: {_number(row)}; more labels may help further")
    return sentences


def _noise_note(first: BuiltExperiment, seeds: int, levels: Sequence[Shots]) -> str:
    draws = f" and {seeds} draws of labeled examples" if seeds > 1 and levels != ["full"] else ""
    return f"95 % confidence intervals over {len(first.loaders['test'].split):,} test examples{draws}"
