"""The report page: values for its template, computed from the files of a run.

Each function returns the values of one section; ``templates/report.html.j2`` contains all markup.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from transfer.config.component import Component
from transfer.config.run_config import RunConfig
from transfer.config.tracker_variables import mask_trackers
from transfer.config.yaml_document import dump
from transfer.models.saved_model import LoadedModel
from transfer.reports import charts
from transfer.reports.metrics import (
    CALIBRATION_BINS,
    Calibration,
    calibration,
    confusion_matrix,
    most_confused,
    residuals,
)
from transfer.reports.top_losses import Example, Image
from transfer.runs.class_metrics import ClassMetrics, class_metrics, predicts_classes, threshold
from transfer.runs.evaluations import read_evaluations
from transfer.storage.run_directory import Predictions, RunDirectory
from transfer.system.formatting import format_count, format_duration, format_value
from transfer.system.templates import environment
from transfer.training.experiment import Phase
from transfer.training.preflight import describe_preprocessing, treatment
from transfer.training.selection import LAST

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
MAX_DRAWN_CLASSES = 40
"""Number of classes up to which the confusion matrix is drawn; of more, only the most frequent mistakes are listed."""
MAX_LISTED_CLASSES = 60
"""Number of rows of the tables of classes; of more classes, those with the lowest F1 are listed."""
MAX_MISTAKES = 8
MAX_RESIDUAL_PLOTS = 4
MIN_LOG_SCALE_RATIO = 20
"""Ratio of the highest to the lowest learning rate from which their axis is logarithmic."""
FEW_PREDICTIONS = 500
"""Number of predictions below which the page warns that the calibration error is unreliable."""


@dataclass(frozen=True)
class Material:
    """The content of a run directory that a page is made of.

    Args:
        folder: The run directory.
        config: The config of the run.
        phases: The phases of the run.
        trained: The trained model with its preprocessing and task.
        summary: Content of ``summary.json``.
        environment: Content of ``environment.json``.
        metrics: Lines of ``metrics.jsonl``: one for each epoch.
        predictions: Predictions for the test split; None if it was not scored.
        examples: The test examples with the highest loss.
        missing: Reason why there are no examples.
        plots: SVG of each plot on the page, by name; filled by :func:`render`.
    """

    folder: Path
    config: RunConfig
    phases: tuple[Phase, ...]
    trained: LoadedModel
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    predictions: Predictions | None
    examples: Sequence[Example]
    missing: str
    plots: dict[str, str] = field(default_factory=dict)

    def plot(self, name: str, svg: Markup) -> Markup:
        """Record a plot, which also becomes an SVG file, and return it."""
        self.plots[name] = svg
        return svg


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        headings: Headings of the columns.
        rows: Cells of each row.
        text_columns: Number of leading columns that contain text; the others contain numbers and are right-aligned.
        note: A sentence below the table.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A number at the top of the page.

    Args:
        name: Name of the number.
        value: The number.
        note: Explanation in small print.
    """

    name: str
    value: str
    note: str = ""


def render(material: Material) -> tuple[str, dict[str, str]]:
    """Return the page, and the SVG of the plots on it by name."""
    config = material.config
    sections = {
        "Training": _training(material),
        "Test": _test(material),
        "Other data": _other_data(material),
        "Calibration": _calibration(material),
        "Top losses": _top_losses(material),
        "Setup": _setup(material),
        "Data": _data(material),
        "Environment": _environment(material),
    }
    page = environment("transfer.reports").get_template("report.html.j2")
    html = page.render(
        style=Markup(charts.STYLE + STYLE),  # noqa: S704  # files of this package
        model_name=_display_name(config.backbone, "model"),
        data_name=_display_name(config.data, "dataset", "root"),
        run_name=material.folder.resolve().name,
        head=config.head.plugin.name,
        task=config.task.plugin.name,
        seed=config.seed,
        started=material.environment.get("started"),
        quick=bool(material.summary.get("quick")),
        warnings=list(map(str, material.summary.get("warnings") or ())),
        cards=_cards(material),
        sections={title: section for title, section in sections.items() if section is not None},
    )
    return html, material.plots


def _display_name(component: Component, *options: str) -> str:
    """Return the name of a model or dataset: the first of these options that is set, otherwise the plugin's name."""
    names = (component.options.get(option) for option in options)
    name = next((name for name in names if isinstance(name, str)), component.plugin.name)
    return Path(name).name or name


def _cards(material: Material) -> list[Card]:
    summary, primary = material.summary, str(material.summary["primary_metric"])
    metric = primary.replace("_", " ")
    cards = []
    if summary.get("test"):
        cards.append(Card(f"test {metric}", f"{summary['test'][primary]:.4f}", _sampling_error(material, primary)))
    validation = summary["validation"]
    if validation:
        cards.append(Card(f"validation {metric}", f"{validation[primary]:.4f}", f"loss {validation['loss']:.4f}"))
    rule = {None: f"by validation {metric}", LAST: "the last one"}
    select = material.config.train.select if validation else LAST
    note = f"of {len(material.metrics)}, {rule.get(select) or f'by validation {select}'.replace('_', ' ')}"
    cards.append(Card("best epoch", f"{summary['best_epoch']}", note))
    total, trainable = summary["parameters"]["total"], summary["parameters"]["trainable"]
    fraction = f"of {format_count(total)}, {trainable / total:.1%}"
    cards.append(Card("trainable parameters", format_count(trainable), fraction))
    speed = f"{summary['examples_per_second']:,.0f} training examples/s"
    cards.append(Card("duration", format_duration(summary["seconds"]), speed))
    cards.append(Card("peak memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    return cards


def _sampling_error(material: Material, metric: str) -> str:
    """Return the standard error of the accuracy that is due to the number of test examples, as text."""
    count = material.summary["examples"]["test"]
    if metric != "accuracy" or material.trained.data.target != "class":
        return f"{count:,} examples"
    # The standard error of a fraction of independent examples; other metrics have no such simple one.
    value = material.summary["test"][metric]
    return f"± {math.sqrt(value * (1 - value) / count):.4f} (one standard error, {count:,} examples)"


# ----------------------------------------------------------------------------------------------------------- training


def _training(material: Material) -> dict[str, Any] | None:
    records = material.metrics
    if not records:
        return None
    marks = {float(material.summary["best_epoch"]): "best"}
    for before, after in itertools.pairwise(records):
        if before["phase"] != after["phase"]:
            # A phase starts between two epochs.
            marks[(before["epoch"] + after["epoch"]) / 2] = f"phase {after['phase']}"
    plots = []
    for metric in records[0]["validation"] or records[0]["train"]:
        series = {
            split: [
                (float(record["epoch"]), float(record[split][metric])) for record in records if metric in record[split]
            ]
            for split in ("train", "validation")
        }
        drawn = {split: points for split, points in series.items() if points}
        plots.append(material.plot(metric, charts.lines(metric.replace("_", " "), drawn, marks=marks)))
    plots.append(material.plot("learning_rate", _learning_rates(records, marks)))
    plots.append(material.plot("time", charts.stacked_bar("time by activity", _times(material), "s")))
    return {"plots": plots, "epochs": _epochs(records)}


def _learning_rates(records: Sequence[Mapping[str, Any]], marks: Mapping[float, str]) -> Markup:
    """Draw the learning rate of every stage at the start of each epoch; stages with equal rates share one line."""
    stages = list(dict.fromkeys(stage for record in records for stage in record["lr"]))
    # Many stages have the same learning rates: one line for all of them keeps the chart readable.
    stages_by_rates: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for stage in stages:
        points = [(float(r["epoch"]), float(r["lr"][stage])) for r in records if stage in r["lr"]]
        stages_by_rates.setdefault(tuple(points), []).append(stage)
    series = {_join_stages(names, stages): points for points, names in stages_by_rates.items()}
    rates = [rate for points in stages_by_rates for _, rate in points]
    log = min(rates) > 0 and max(rates) / min(rates) > MIN_LOG_SCALE_RATIO
    return charts.lines("learning rate at the start of the epoch", series, marks=marks, log_y=log)


def _join_stages(names: Sequence[str], stages: Sequence[str]) -> str:
    if len(names) == len(stages) > 1:
        return "all stages"
    return ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"


def _times(material: Material) -> dict[str, float]:
    """Return the seconds that the run spent on each activity."""
    summary, examples = material.summary, material.summary["examples"]["train"]
    training = waiting = validation = 0.0
    for record in material.metrics:
        # The recorded speed covers only training: the rest of an epoch is validation.
        epoch_seconds = min(examples / record["examples_per_second"], record["seconds"])
        training += epoch_seconds * (1 - record["waiting_for_data"])
        waiting += epoch_seconds * record["waiting_for_data"]
        validation += record["seconds"] - epoch_seconds
    rest = max(0.0, summary["seconds"] - training - waiting - validation)
    return {
        "training steps": training,
        "waiting for training data": waiting,
        "validation": validation,
        "caches, checkpoints, test split": rest,
    }


def _epochs(records: Sequence[Mapping[str, Any]]) -> Table:
    metrics = list(records[0]["validation"] or records[0]["train"])
    headings = ["epoch", "phase", *(f"{split} {m}" for split in ("train", "validation") for m in metrics), "seconds"]
    rows = [
        [
            format_value(record["epoch"]),
            format_value(record["phase"]),
            *(_decimal(record[split].get(metric)) for split in ("train", "validation") for metric in metrics),
            format_value(record["seconds"]),
        ]
        for record in records
    ]
    return Table(headings, rows)


# --------------------------------------------------------------------------------------------------------------- test


def _test(material: Material) -> dict[str, Any]:
    summary, predictions, data = material.summary, material.predictions, material.trained.data
    if not summary.get("test"):
        reason = "there is no test split" if "test" not in summary["examples"] else "the test split was not scored"
        return {"missing": reason}
    rows = [[name, _decimal(summary["validation"].get(name)), _decimal(v)] for name, v in summary["test"].items()]
    section: dict[str, Any] = {"metrics": Table(["metric", "validation", "test"], rows)}
    if predictions is None:
        return section
    if _predicts_classes(material):
        return section | {"classes": _classes(material, predictions)}
    if predictions.predictions.shape != predictions.targets.shape:
        return section
    if data.target == "labels":
        metrics = class_metrics(data, material.trained.task, predictions)
        return section | {"labels": _class_table(metrics, "label"), "threshold": threshold(material.trained.task)}
    if data.target == "number":
        return section | {"numbers": _numbers(material, predictions)}
    return section


def _other_data(material: Material) -> Table | None:
    """Return the metrics of each evaluation on other data, beside those of the test split; None without evaluations."""
    evaluations = read_evaluations(RunDirectory(material.folder))
    if not evaluations:
        return None
    test = material.summary.get("test") or {}
    metrics = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    rows = [[e.name, f"{e.examples:,}", *(_decimal(e.metrics.get(name)) for name in metrics)] for e in evaluations]
    if test:
        rows.insert(0, ["test", f"{material.summary['examples']['test']:,}", *(_decimal(test.get(n)) for n in metrics)])
    missing = [f"{e.name} has no example of {', '.join(e.missing[:5])}" for e in evaluations if e.missing]
    return Table(["data", "examples", *metrics], rows, note="; ".join(missing))


def _predicts_classes(material: Material) -> bool:
    """Whether each test example has one class, and the predictions are classes too."""
    return material.predictions is not None and predicts_classes(material.trained.data, material.predictions)


def _classes(material: Material, scored: Predictions) -> dict[str, Any]:
    predictions, targets = scored.predictions.long(), scored.targets.long()
    metrics = class_metrics(material.trained.data, material.trained.task, scored)
    names = list(metrics)
    matrix = confusion_matrix(predictions, targets, len(names))
    plot = None
    if len(names) <= MAX_DRAWN_CLASSES:
        drawn = charts.confusion_matrix("confusion matrix", matrix.tolist(), names)
        plot = material.plot("confusion", drawn)
    mistakes = None
    if len(names) > 2:  # the mistakes of two classes are the two cells of the matrix
        rows = [
            [names[true], names[predicted], f"{count:,}"]
            for true, predicted, count in most_confused(matrix, MAX_MISTAKES)
        ]
        mistakes = Table(["true", "predicted", "examples"], rows, text_columns=2)
    return {"matrix": plot, "table": _class_table(metrics, "class"), "mistakes": mistakes}


def _class_table(metrics: Mapping[str, ClassMetrics], heading: str) -> Table:
    order = list(metrics)
    note = ""
    if len(metrics) > MAX_LISTED_CLASSES:
        # A class without examples and predictions has no F1; it comes first.
        order = sorted(order, key=lambda name: -1.0 if (f1 := metrics[name].f1) is None else f1)[:MAX_LISTED_CLASSES]
        note = f"The {MAX_LISTED_CLASSES} with the lowest F1 of {len(metrics):,}."
    rows = []
    for name in order:
        one = metrics[name]
        decimals = map(_decimal, (one.precision, one.recall, one.f1))
        rows.append([name, *decimals, f"{one.support:,}", f"{one.predicted:,}"])
    return Table([heading, "precision", "recall", "F1", "support", "predicted"], rows, note=note)


def _numbers(material: Material, predictions: Predictions) -> dict[str, Any]:
    names = material.trained.data.classes
    rows = [
        [name, *map(_decimal, (one.mean_absolute_error, one.root_mean_squared_error, one.bias, one.r2))]
        for name, one in zip(names, residuals(predictions.predictions, predictions.targets), strict=True)
    ]
    headings = ["number", "mean absolute error", "root mean squared error", "mean of predicted - true", "R²"]
    plots = []
    for index, name in list(enumerate(names))[:MAX_RESIDUAL_PLOTS]:
        columns = [predictions.targets[:, index], predictions.predictions[:, index]]
        points = [(true, predicted) for true, predicted in torch.stack(columns, 1).double().tolist()]
        plots.append(material.plot(f"residuals-{index + 1}", charts.scatter(name, points, "true", "predicted")))
    return {"table": Table(headings, rows), "plots": plots}


# -------------------------------------------------------------------------------------------------------- calibration


def _calibration(material: Material) -> dict[str, Any] | None:
    calibrated = _calibrated(material)
    if calibrated is None:
        return None
    count = sum(one.count for one in calibrated.bins)
    gap, accuracy = calibrated.confidence - calibrated.accuracy, calibrated.accuracy
    # Of the accuracy, by the number of predictions: a smaller gap may be chance.
    standard_error = math.sqrt(accuracy * (1 - accuracy) / count)
    verdict = "well calibrated on average"
    if abs(gap) > 2 * standard_error:
        verdict = "overconfident" if gap > 0 else "underconfident"
    subject, measure = "predictions", "accuracy"
    if not _predicts_classes(material):
        subject, measure = "label probabilities", "fraction of true labels"
    return {
        "plot": material.plot("calibration", charts.reliability("reliability diagram", calibrated, measure)),
        "error": f"{calibrated.error:.4f}",
        "confidence": f"{calibrated.confidence:.4f}",
        "accuracy": f"{calibrated.accuracy:.4f}",
        "verdict": verdict,
        "subject": subject,
        "measure": measure,
        "filled_bins": len(calibrated.bins),
        "bins": CALIBRATION_BINS,
        "few": f"{count:,}" if count < FEW_PREDICTIONS else None,
    }


def _calibrated(material: Material) -> Calibration | None:
    """Return the calibration of the test predictions; None if they have no probabilities."""
    scored = material.predictions
    if scored is None:
        return None
    if _predicts_classes(material) and scored.confidences is not None:
        probabilities, correct = scored.confidences, scored.predictions == scored.targets
    elif material.trained.data.target == "labels" and scored.predictions.shape == scored.targets.shape:
        probabilities, correct = scored.predictions.flatten(), scored.targets.flatten() > 0.5
    else:
        return None
    # A task may have scores that are no probabilities.
    in_range = bool(((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all())
    return calibration(probabilities, correct) if in_range else None


# --------------------------------------------------------------------------------------------------------- top losses


def _top_losses(material: Material) -> dict[str, Any]:
    if not material.examples:
        return {"missing": material.missing}
    examples = material.examples
    with_image = [any(isinstance(part, Image) for part in example.content) for example in examples]
    return {
        "examples": examples,
        "explains": material.trained.backbone.preprocessing.explains,
        "unit": "piece" if any(example.has_other_pieces for example in examples) else "word",
        "all_explained": all(example.explained for example in examples),
        "layout": "images" if all(with_image) else "texts",
        # The last two parts of a path identify a file: class folder and file name.
        "short_names": {example.name: "/".join(Path(example.name).parts[-2:]) for example in examples},
    }


# -------------------------------------------------------------------------------------------------------------- setup


def _setup(material: Material) -> dict[str, Any]:
    config, model = material.config, material.trained.model
    stages = [
        {
            "name": name,
            "parameters": f"{sum(parameter.numel() for parameter in module.parameters()):,}",
            "phases": [treatment(config, model, phase, name) for phase in material.phases],
        }
        for name, module in model.stages.items()
    ]
    train = config.train
    # One line for each setting; defaults that change nothing are left out.
    optimizer = ", ".join([config.optimizer.name, *(f"{k} {v}" for k, v in config.optimizer.options.items())])
    schedulers = [phase.scheduler.name if phase.scheduler else "none" for phase in material.phases]
    facts = {
        "optimizer": f"{optimizer}, {train.step}",
        "scheduler": ", then ".join(dict.fromkeys(schedulers)),
        **({"recipe": train.recipe.name} if train.recipe else {}),
        **({"warm-up": f"{train.warmup_epochs:g} epochs"} if train.warmup_epochs else {}),
        **({"precision": precision} if (precision := material.summary.get("precision", "fp32")) != "fp32" else {}),
        **({"mix": train.mix.model_dump(exclude_none=True)} if train.mix else {}),
        "preprocessing": describe_preprocessing(config, material.trained.backbone),
        **_caches(material.summary),
    }
    return {"phases": list(map(_phase_length, material.phases)), "stages": stages, "facts": facts}


def _phase_length(phase: Phase) -> str:
    patience = f", patience {phase.patience}" if phase.patience else ""
    return f"{phase.epochs} epoch{'s' * (phase.epochs > 1)}{patience}"


def _caches(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return for every split whether its features came from the cache; one entry if all are the same."""
    entries = {}
    for entry in summary.get("cache") or ():
        phase = f"phase {entry['phase']}, " if "phase" in entry else ""
        details = {name: value for name, value in entry.items() if name not in ("phase", "split", "cached", "why")}
        text = format_value(details) if entry["cached"] else f"none: {entry.get('why')}"
        entries[f"cache, {phase}{entry['split']}"] = text
    distinct = set(entries.values())
    return {"cache": distinct.pop()} if len(distinct) == 1 else entries


# --------------------------------------------------------------------------------------------------------------- data


def _data(material: Material) -> dict[str, Any]:
    summary = material.summary
    by_class: Mapping[str, Mapping[str, int]] = summary["data"]
    sizes: Mapping[str, int] = summary["examples"]
    names = list(dict.fromkeys(name for counts in by_class.values() for name in counts))
    listed, note = names, ""
    if len(names) > MAX_LISTED_CLASSES:
        ranked = sorted(names, key=lambda name: by_class["train"].get(name, 0))
        extremes = {*ranked[: MAX_LISTED_CLASSES // 2], *ranked[-MAX_LISTED_CLASSES // 2 :]}
        # Imbalance shows at both ends; the classes between them are left out.
        listed, note = [name for name in names if name in extremes], f"The smallest and largest of {len(names):,}."
    # A class without an example has a count of 0 of a split that may be empty too.
    classes = {
        name: [(count := by_class[split].get(name, 0), count / max(size, 1)) for split, size in sizes.items()]
        for name in listed
    }
    lengths = None
    if by_split := summary.get("lengths"):
        statistics = list(next(iter(by_split.values())))
        rows = [[split, *(f"{values[name]:,}" for name in statistics)] for split, values in by_split.items()]
        lengths = Table(["split", *statistics], rows)
    return {
        "sizes": {split: f"{size:,}" for split, size in sizes.items()},
        "classes": classes,
        "note": note,
        "warnings": summary.get("data_warnings"),
        "lengths": lengths,
        "options": {name: value for name, value in material.config.data.resolved.items() if value is not None},
        "learned": summary.get("learned"),
        "pretrained": summary.get("pretrained"),
    }


# -------------------------------------------------------------------------------------------------------- environment


def _environment(material: Material) -> dict[str, Any]:
    # Versions come last because they are long; `format` and `quick` concern only this package.
    hidden = ("format", "quick", "resumed", "versions")
    facts = {name: value for name, value in material.environment.items() if name not in hidden}
    return {
        "facts": {**facts, "versions": material.environment.get("versions", {})},
        "resumed": [format_value(entry) for entry in material.environment.get("resumed", [])],
        "config": dump(mask_trackers(material.config.resolved)),
    }


def _decimal(value: float | None) -> str:
    """Return a number with four decimals, so that the numbers of a column align; a hyphen for None."""
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.3g}"
