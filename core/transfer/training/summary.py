"""The summary of a trained run, with warnings about results that are easily misread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from transfer.system.memory import peak_memory_bytes
from transfer.training.experiment import Experiment
from transfer.training.selection import Record, Selection
from transfer.training.state import Progress


def summarize(
    experiment: Experiment,
    progress: Progress,
    best: Mapping[str, Any],
    test: Mapping[str, float] | None,
    predictions: Tensor | None,
    *,
    caches: Sequence[Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Return the part of ``summary.json`` that the engine writes.

    Args:
        experiment: Trained experiment.
        progress: Counts and results of the run.
        best: Number and validation metrics of the best epoch.
        test: Metrics of the test split; None if it was not scored.
        predictions: Predictions for the test split; None if they were not collected.
        caches: Reports of the feature cache.
        seconds: Duration of the run in seconds.
    """
    return {
        "best_epoch": best["epoch"],
        "epochs": progress.epochs,
        "validation": best["validation"],
        "test": test,
        "primary_metric": experiment.task.primary_metric.name,
        "parameters": experiment.parameter_counts(),
        "examples_per_second": round(progress.trained_examples / progress.trained_seconds, 2),
        "waiting_for_data": round(progress.waiting_seconds / progress.trained_seconds, 4),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(experiment.options.device),
        "cache": caches,
        "device": str(experiment.options.device),
        "precision": experiment.options.precision,
        "warnings": [
            *experiment.warnings,
            *_dropped_phases(experiment.selection, progress.records, best["epoch"]),
            *_constant_prediction(experiment, progress.records, best["epoch"], predictions),
        ],
    }


def _dropped_phases(selection: Selection, records: Sequence[Record], best_epoch: int) -> Iterator[str]:
    """Warn if the weights of complete phases are not used, because the best epoch is before them."""
    phase_of_best = next((record["phase"] for record in records if record["epoch"] == best_epoch), None)
    later = [record for record in records if phase_of_best is not None and record["phase"] > phase_of_best]
    if not later or selection.keeps_last:
        return
    phases = sorted({record["phase"] for record in later})
    names = f"phase {phases[0]}" if len(phases) == 1 else f"phases {phases[0]} to {phases[-1]}"
    highest = max(later, key=selection.value)
    best = next(record for record in records if record["epoch"] == best_epoch)
    error = f" (standard error {best['standard_error']:.4f})" if best.get("standard_error") else ""
    yield (
        f"the weights of {names} are not used: the best epoch is {best_epoch}, in phase {phase_of_best}, with a "
        f"validation {selection.metric} of {best['validation'][selection.metric]:.4f}{error} and a loss of "
        f"{best['validation']['loss']:.4f}; the best of {names} is epoch {highest['epoch']} with "
        f"{highest['validation'][selection.metric]:.4f} and {highest['validation']['loss']:.4f}. "
        "train.select: last keeps the last epoch"
    )


def _constant_prediction(
    experiment: Experiment, records: Sequence[Record], best_epoch: int, predictions: Tensor | None
) -> Iterator[str]:
    """Warn if all examples have the same prediction, which a high accuracy hides if one class is frequent."""
    best = next((record for record in records if record["epoch"] == best_epoch), {})
    prediction, split = best.get("constant_prediction"), "validation"
    # The test split is checked completely, so it takes precedence over the validation split.
    if predictions is not None and len(predictions) > 1 and bool((predictions == predictions[0]).all()):
        prediction, split = predictions[0].tolist(), "test"
    if prediction is None:
        return
    classes: Sequence[str] = getattr(experiment.task, "classes", ())
    if isinstance(prediction, int) and not isinstance(prediction, bool) and 0 <= prediction < len(classes):
        yield (
            f"the model predicts only the class {classes[prediction]!r} on the {split} split, so its accuracy is the "
            "frequency of that class; try task.class_weights=balanced, more epochs, or another learning rate"
        )
    else:
        yield f"the model predicts the same for all examples of the {split} split"
