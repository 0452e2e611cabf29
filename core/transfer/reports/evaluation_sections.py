"""The sections of the report page on evaluation: test split, other data and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from transfer.reports import charts
from transfer.reports.material import MAX_LISTED_CLASSES, Material, Table, decimal
from transfer.reports.metrics import (
    CALIBRATION_BINS,
    Calibration,
    calibration,
    confusion_matrix,
    most_confused,
    residuals,
)
from transfer.runs.class_metrics import ClassMetrics, class_metrics, predicts_classes, threshold
from transfer.runs.evaluations import read_evaluations
from transfer.storage.run_directory import Predictions, RunDirectory

MAX_DRAWN_CLASSES = 40
"""Number of classes up to which the confusion matrix is drawn; of more, only the most frequent mistakes are listed."""
MAX_MISTAKES = 8
MAX_RESIDUAL_PLOTS = 4
FEW_PREDICTIONS = 500
"""Number of predictions below which the page warns that the calibration error is unreliable."""


def test_section(material: Material) -> dict[str, Any]:
    """Return the values of the section on the test split."""
    summary, predictions, data = material.summary, material.predictions, material.trained.data
    if not summary.get("test"):
        reason = "there is no test split" if "test" not in summary["examples"] else "the test split was not scored"
        return {"missing": reason}
    rows = [[name, decimal(summary["validation"].get(name)), decimal(v)] for name, v in summary["test"].items()]
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


def other_data_section(material: Material) -> Table | None:
    """Return the metrics of each evaluation on other data, beside those of the test split; None without evaluations."""
    evaluations = read_evaluations(RunDirectory(material.folder))
    if not evaluations:
        return None
    test = material.summary.get("test") or {}
    metrics = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    rows = [[e.name, f"{e.examples:,}", *(decimal(e.metrics.get(name)) for name in metrics)] for e in evaluations]
    if test:
        rows.insert(0, ["test", f"{material.summary['examples']['test']:,}", *(decimal(test.get(n)) for n in metrics)])
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
        decimals = map(decimal, (one.precision, one.recall, one.f1))
        rows.append([name, *decimals, f"{one.support:,}", f"{one.predicted:,}"])
    return Table([heading, "precision", "recall", "F1", "support", "predicted"], rows, note=note)


def _numbers(material: Material, predictions: Predictions) -> dict[str, Any]:
    names = material.trained.data.classes
    rows = [
        [name, *map(decimal, (one.mean_absolute_error, one.root_mean_squared_error, one.bias, one.r2))]
        for name, one in zip(names, residuals(predictions.predictions, predictions.targets), strict=True)
    ]
    headings = ["number", "mean absolute error", "root mean squared error", "mean of predicted - true", "R²"]
    plots = []
    for index, name in list(enumerate(names))[:MAX_RESIDUAL_PLOTS]:
        columns = [predictions.targets[:, index], predictions.predictions[:, index]]
        points = [(true, predicted) for true, predicted in torch.stack(columns, 1).double().tolist()]
        plots.append(material.plot(f"residuals-{index + 1}", charts.scatter(name, points, "true", "predicted")))
    return {"table": Table(headings, rows), "plots": plots}


def calibration_section(material: Material) -> dict[str, Any] | None:
    """Return the values of the section on calibration; None if the predictions have no probabilities."""
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
