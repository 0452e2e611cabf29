"""Comparison of runs: which run is better, and which differences are within noise."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from transfer.errors import RunError, unknown_name
from transfer.experiments.intervals import (
    Difference,
    Spread,
    difference,
    metric_bounds,
    resamples,
    spread,
    standard_error,
)
from transfer.experiments.seeds import Runs, open_runs
from transfer.interfaces import Task
from transfer.models.saved_model import read_task
from transfer.runs.evaluations import read_evaluation
from transfer.runs.summary_html import html_table
from transfer.storage.run_directory import Predictions
from transfer.system.atomic_files import write_atomically
from transfer.system.templates import environment

RESAMPLED_TEST_SPLITS = 200
"""Number of bootstrap resamples of the test split: enough for a standard error (Efron and Tibshirani 1993, 6.4)."""

MIN_RESAMPLES = 50
MAX_RESAMPLED_SCORES = 50_000_000
"""Number of scores in all resamples above which fewer resamples are drawn, but at least ``MIN_RESAMPLES``: the AUROC of
10,000 examples and 100 classes takes 0.7 seconds. Fifty resamples are often enough for a standard error (Efron and
Tibshirani 1993, 6.4)."""

DRAWING_WIDTH = 240
"""Width in pixels of the drawing of a run's values and interval."""

COLUMNS = (
    *("run", "runs", "metric", "split", "mean", "standard_deviation", "low", "high"),
    *("difference", "difference_low", "difference_high", "verdict", "values"),
)
"""Columns of the table as CSV."""

Verdict = Literal["reference", "cannot tell", "within noise", "better", "worse"]


@dataclass(frozen=True)
class Row:
    """One run, or one folder of seeds, in a comparison.

    Args:
        name: Path of the run directory or the folder of seeds.
        spread: Mean, standard deviation and interval of the metric over the runs.
        difference: Difference to the first row; None in the first row.
        verdict: Whether the difference is larger than noise, and its direction.
    """

    name: str
    spread: Spread
    difference: Difference | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Comparison of several runs by one metric.

    Args:
        metric: Name of the metric.
        higher_is_better: Whether higher values of the metric are better.
        split: Split on which the metric was computed.
        rows: Rows in the requested order; all rows are compared to the first one.
        notes: Sources of noise that the intervals cover, and the ones that they do not cover.
    """

    metric: str
    higher_is_better: bool
    split: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def csv(self) -> str:
        """Return the table as CSV with unrounded numbers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            spread, to_first = row.spread, row.difference
            none = (None, None)
            interval = spread.interval or none
            change = (None, *none) if to_first is None else (to_first.mean, *(to_first.interval or none))
            start = (row.name, len(spread.values), self.metric, self.split, spread.mean, spread.standard_deviation)
            writer.writerow((*start, *interval, *change, row.verdict, " ".join(map(str, spread.values))))
        return text.getvalue()

    def html(self) -> str:
        """Return a self-contained page with the table and a drawing of the intervals."""
        best = "higher" if self.higher_is_better else "lower"
        drawn = [value for row in self.rows for value in (*row.spread.values, *(row.spread.interval or ()))]
        low, high = min(drawn), max(drawn)

        def x(value: float) -> float:
            # Six pixels on each side leave room for the dots; equal values share one place.
            return float(round(6 + (DRAWING_WIDTH - 12) * (value - low) / (high - low or 1.0), 1))

        page = environment("transfer.experiments").get_template("comparison.html.j2")
        title = f"{self.metric} on the {self.split} split ({best} is better)"
        return page.render(title=title, rows=self.rows, notes=self.notes, x=x, width=DRAWING_WIDTH)

    def _repr_html_(self) -> str:
        """Return the table, which notebooks show."""
        rows = [(row.name, row.spread, row.difference or "", row.verdict) for row in self.rows]
        header = ("run", "mean ± standard deviation", "difference to the first", "verdict")
        return html_table(f"{self.metric} on the {self.split} split", rows, header)

    def write(self, *, csv: Path | None = None, html: Path | None = None) -> None:
        """Write the table to files.

        Args:
            csv: Path of a CSV file; None writes none.
            html: Path of an HTML page; None writes none.

        Raises:
            RunError: A file cannot be written.
        """
        for path, content in ((csv, self.csv), (html, self.html)):
            if path is not None:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, content())
                except OSError as error:
                    raise RunError(f"the table cannot be written: {error.strerror}", where=str(path)) from error


def compare(
    paths: Sequence[str | Path], *, metric: str | None = None, different_data: bool = False, on: str | None = None
) -> Comparison:
    """Compare runs and folders of seeds to the first one.

    A difference has two kinds of noise: another seed would train another model, and another test split would give it
    another score. The runs are resampled for the first kind, in pairs if both sides have the same seeds. For the second
    kind, the examples of the test split are resampled, which are the same for both sides (a paired bootstrap). This
    uses the predictions that each run stored.

    Args:
        paths: Run directories and folders of seeds.
        metric: Name of a metric of the test split. None selects the task's primary metric.
        different_data: Whether to compare runs that were scored on different examples.
        on: Name of other data that the runs were evaluated on (``transfer evaluate --on``); None uses the test split.

    Raises:
        RunError: A folder is not a run or not complete, the runs were scored on different examples, or the metric is
            unknown.
    """
    if not paths:
        raise RunError("there is nothing to compare: expected one run or more", fix="give the folders of runs")
    sides = [open_runs(path) for path in paths]
    if on is not None:
        sides = [_scored_on(runs, on) for runs in sides]
        split = on
    else:
        split = "test" if all(summary["test"] for runs in sides for summary in runs.summaries) else "validation"
    metric = metric or str(sides[0].summaries[0]["primary_metric"])
    _refuse(sides, metric, split, different_data)
    task = read_task(sides[0].directories[0].model)
    higher, bounds = higher_is_better(task, metric), metric_bounds(task, metric)
    # Only scores on the same test examples can be resampled in pairs.
    same = split in ("test", on) and len({_digest(summary, split) for runs in sides for summary in runs.summaries}) == 1
    resampled = [_resampled(task, metric, runs, on) if same else None for runs in sides]
    values = [[float(summary[split][metric]) for summary in runs.summaries] for runs in sides]
    rows = [Row(str(sides[0].folder), spread(values[0], bounds), None, "reference")]
    for runs, scores, resampled_means in list(zip(sides, values, resampled, strict=True))[1:]:
        to_first = difference(
            scores,
            values[0],
            paired=runs.seeds == sides[0].seeds,
            standard_error_of_examples=_standard_error(resampled_means, resampled[0]),
            bounds=bounds,
        )
        rows.append(Row(str(runs.folder), spread(scores, bounds), to_first, verdict(to_first, higher_is_better=higher)))
    return Comparison(metric, higher, split, tuple(rows), tuple(_notes(sides, resampled, split)))


def higher_is_better(task: Task, metric: str) -> bool:
    """Return whether higher values of a metric of the task, or of the loss, are better.

    Raises:
        RunError: The metric does not declare its direction.
    """
    if metric == "loss":
        return False
    if metric == task.primary_metric.name:
        return task.primary_metric.higher_is_better
    direction = getattr(task.metrics().get(metric), "higher_is_better", None)
    if direction is None:
        fix = "compare by the task's primary metric, or declare higher_is_better in the metric"
        raise RunError(f"metric {metric!r} has no direction: expected higher_is_better to be true or false", fix=fix)
    return bool(direction)


def verdict(difference: Difference, *, higher_is_better: bool) -> Verdict:
    """Return the verdict on a difference."""
    if difference.interval is None:
        return "cannot tell"
    if difference.within_noise:
        return "within noise"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def _refuse(sides: Sequence[Runs], metric: str, split: str, different_data: bool) -> None:
    first = sides[0]
    for runs in sides:
        for directory, summary in zip(runs.directories, runs.summaries, strict=True):
            where = str(directory.path)
            if summary.get("quick"):
                raise RunError(f"{where} is a quick run: its metrics are meaningless", fix="run it without --quick")
            scores = summary[split] or {}
            if metric not in scores:
                raise RunError.of([unknown_name(f"metric of the {split} split", metric, scores, where=where)])
            if not different_data and _digest(summary, split) != _digest(first.summaries[0], split):
                raise RunError(
                    f"{where} and {first.directories[0].path} were not scored on the same {split} examples",
                    fix="run both on the same data, or compare them anyway with --different-data",
                )


def _digest(summary: Mapping[str, Any], split: str) -> str | None:
    digest: str | None = summary.get("digests", {}).get(split)
    return digest


def _scored_on(runs: Runs, on: str) -> Runs:
    """Return runs whose summaries contain their results on other data, like those of a split."""
    summaries = []
    for directory, summary in zip(runs.directories, runs.summaries, strict=True):
        evaluation, _ = read_evaluation(directory, on)
        digests = {**summary.get("digests", {}), on: evaluation.digest}
        summaries.append({**summary, on: evaluation.metrics, "digests": digests})
    return replace(runs, summaries=tuple(summaries))


def _resampled(task: Task, metric: str, runs: Runs, on: str | None) -> list[float] | None:
    """Return the mean of a metric over runs on each resample of the examples; None if predictions are missing."""
    measure = task.metrics().get(metric)
    predictions = [
        directory.predictions() if on is None else read_evaluation(directory, on)[1] for directory in runs.directories
    ]
    stored = [scored for scored in predictions if scored is not None]
    if len(stored) < len(predictions):
        return None
    # Every run is scored on the same resamples, so that their differences are paired by example.
    draws = resamples(len(stored[0].targets), RESAMPLED_TEST_SPLITS)
    if metric == "loss":
        losses = [scored.losses for scored in stored if scored.losses is not None]
        if len(losses) < len(stored):
            return None
        mean_losses = torch.stack(losses).mean(0)  # (runs, N) -> (N,)
        return [float(mean_losses[indices].mean()) for indices in map(torch.from_numpy, draws)]
    inputs = [values for scored in stored if (values := metric_input(task, metric, scored)) is not None]
    if measure is None or len(inputs) < len(stored):
        return None
    if metric in task.metric_inputs(torch.zeros(1, task.out_features)):
        # A function of the task and the split, so that all runs get the same resamples.
        draws = draws[: max(MIN_RESAMPLES, MAX_RESAMPLED_SCORES // (task.out_features * len(inputs[0])))]
    return resampled_means(measure, inputs, [scored.targets for scored in stored], draws)


def resampled_means(
    measure: Metric, inputs: Sequence[Tensor], targets: Sequence[Tensor], draws: Sequence[npt.NDArray[np.int64]]
) -> list[float] | None:
    """Return the mean of a metric over runs on each resample; None if it is not defined on some resample.

    Args:
        measure: Metric; its state is reset.
        inputs: Input of the metric in each run, (N, ...) each.
        targets: Targets in each run, (N, ...) each.
        draws: Indices of the examples in each resample, (N,) each.
    """
    means = []
    try:
        with warnings.catch_warnings(action="ignore"):  # a metric may warn that a resample lacks a class
            for indices in map(torch.from_numpy, draws):
                total = 0.0
                for values, expected in zip(inputs, targets, strict=True):
                    measure.reset()
                    measure.update(values[indices], expected[indices])
                    total += float(measure.compute())
                means.append(total / len(inputs))
    except (ValueError, RuntimeError):  # the metric is not defined on some resample
        return None
    return means if all(map(math.isfinite, means)) else None


def metric_input(task: Task, metric: str, scored: Predictions) -> Tensor | None:
    """Return the stored input of a metric, (N, ...): predictions or scores; None if it was not stored.

    Args:
        task: Task of the runs.
        metric: Name of the metric.
        scored: Stored predictions of a run.
    """
    # The input of a metric is a function of the outputs, which are not stored. Made-up outputs show which one it is.
    outputs = torch.randn(4, task.out_features, generator=torch.Generator().manual_seed(0))
    inputs, scores = task.metric_inputs(outputs).get(metric), task.scores(outputs)
    if inputs is None:
        return scored.predictions
    if inputs.shape != scores.shape or not torch.allclose(inputs, scores):
        return None
    if scored.scores is not None:
        return scored.scores
    # Scores that are equal to the predictions are not stored a second time.
    predictions = task.predictions(outputs)
    return scored.predictions if predictions.shape == scores.shape and torch.allclose(predictions, scores) else None


def _standard_error(resampled: list[float] | None, reference: list[float] | None) -> float | None:
    """Return the standard error of a difference over the examples; None if it is unknown."""
    if resampled is None or reference is None:
        return None
    return standard_error([one - other for one, other in zip(resampled, reference, strict=True)])


def _notes(sides: Sequence[Runs], resampled: Sequence[list[float] | None], split: str) -> list[str]:
    several = all(len(runs.seeds) > 1 for runs in sides)
    examples = all(means is not None for means in resampled)
    sources = ["seeds"] * several + [f"{split} examples"] * examples
    notes = []
    if sources:
        notes.append(
            f"95 % confidence intervals over {' and '.join(sources)}; a difference is within noise if its interval "
            "contains zero"
        )
    if not several:
        notes.append("a single run does not show the effect of the seed: use `transfer run CONFIG --seeds 5`")
    if not examples:
        notes.append("the intervals do not cover the noise of the scored examples")
    return notes
