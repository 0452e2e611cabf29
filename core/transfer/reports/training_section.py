"""The section of the report page on training: curves, learning rates, time and epochs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from transfer.reports import charts
from transfer.reports.material import Material, Table, decimal
from transfer.system.formatting import format_value

MIN_LOG_SCALE_RATIO = 20
"""Ratio of the highest to the lowest learning rate from which their axis is logarithmic."""


def training_section(material: Material) -> dict[str, Any] | None:
    """Return the values of the section; None without epochs."""
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
    if any(record["lr"] for record in records):  # a solved head has no learning rate
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
    # Rounded durations of epochs may add up to more than that of the run.
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
            *(decimal(record[split].get(metric)) for split in ("train", "validation") for metric in metrics),
            format_value(record["seconds"]),
        ]
        for record in records
    ]
    return Table(headings, rows)
