"""Runs beside each other: who is better, and when a difference is no more than noise."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from transfer.errors import RunError
from transfer.experiments.intervals import Difference, Spread, difference, resamples, spread, standard_error
from transfer.experiments.seeds import Runs, open_runs
from transfer.interfaces import Task
from transfer.models.saved_model import read_task
from transfer.system.atomic_files import write_atomically
from transfer.system.templates import environment

RESAMPLED_TEST_SPLITS = 200
"""Enough for a standard error (Efron and Tibshirani 1993, section 6.4)."""

DRAWING_WIDTH = 240
"""Width in pixels of the drawing of a run's values and interval."""

COLUMNS = (
    *("run", "runs", "metric", "split", "mean", "standard_deviation", "low", "high"),
    *("difference", "difference_low", "difference_high", "verdict", "values"),
)
"""Of the table in CSV."""

Verdict = Literal["reference", "cannot tell", "within noise", "better", "worse"]


@dataclass(frozen=True)
class Row:
    """One run, or one folder of seeds.

    Args:
        name: Its folder.
        spread: Of the metric over its runs.
        difference: To the first row; None of the first.
        verdict: Whether that is more than noise.
    """

    name: str
    spread: Spread
    difference: Difference | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Args:
        metric: What is compared.
        higher_is_better: Its direction.
        split: On which it was scored.
        rows: In the order asked for; all are compared to the first.
        notes: What the intervals do and do not hold.
    """

    metric: str
    higher_is_better: bool
    split: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def csv(self) -> str:
        """Return a table with a line per row; numbers are not rounded."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            own, to_first = row.spread, row.difference
            none = (None, None)
            interval = own.interval or none
            of = (None, *none) if to_first is None else (to_first.mean, *(to_first.interval or none))
            start = (row.name, len(own.values), self.metric, self.split, own.mean, own.standard_deviation)
            writer.writerow((*start, *interval, *of, row.verdict, " ".join(map(str, own.values))))
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

    def write(self, *, csv: Path | None = None, html: Path | None = None) -> None:
        """Write the table to files.

        Raises:
            RunError: One cannot be written.
        """
        for path, content in ((csv, self.csv), (html, self.html)):
            if path is not None:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, content())
                except OSError as error:
                    raise RunError(f"the table cannot be written: {error.strerror}", where=str(path)) from error


def compare(paths: Sequence[str | Path], *, metric: str | None = None, different_data: bool = False) -> Comparison:
    """Put runs and folders of seeds beside each other, and compare each to the first.

    A difference has two kinds of noise: another seed would train another model, and another test split would score it
    differently. The first is resampled over seeds (in pairs where both sides have the same), the second over the
    examples of the test split, which are the same for both sides (a paired bootstrap), from the predictions that each
    run stored.

    Args:
        paths: Run directories and folders of seeds.
        metric: Of the test split; by default the task's primary metric.
        different_data: Compare although the examples scored were not the same.

    Raises:
        RunError: A folder is no run or has not ended, the runs were scored on different examples, or there is no such
            metric.
    """
    if not paths:
        raise RunError("there is nothing to compare", fix="give the folders of runs")
    found = [open_runs(path) for path in paths]
    split = "test" if all(summary["test"] for runs in found for summary in runs.summaries) else "validation"
    metric = metric or str(found[0].summaries[0]["primary_metric"])
    _refuse(found, metric, split, different_data)
    task = read_task(found[0].directories[0].model)
    higher = higher_is_better(task, metric)
    same = split == "test" and len({_digest(summary, split) for r in found for summary in r.summaries}) == 1
    resampled = [_resampled(task, metric, runs) if same else None for runs in found]
    values = [[float(summary[split][metric]) for summary in runs.summaries] for runs in found]
    rows = [Row(str(found[0].folder), spread(values[0]), None, "reference")]
    for runs, figures, own in list(zip(found, values, resampled, strict=True))[1:]:
        paired = runs.seeds == found[0].seeds
        of = difference(
            figures, values[0], paired=paired, standard_error_of_examples=_standard_error(own, resampled[0])
        )
        rows.append(Row(str(runs.folder), spread(figures), of, verdict(of, higher_is_better=higher)))
    return Comparison(metric, higher, split, tuple(rows), tuple(_notes(found, resampled, split)))


def higher_is_better(task: Task, metric: str) -> bool:
    """Return the direction of one of a task's metrics, or of the loss.

    Raises:
        RunError: The metric does not say.
    """
    if metric == "loss":
        return False
    if metric == task.primary_metric.name:
        return task.primary_metric.higher_is_better
    direction = getattr(task.metrics().get(metric), "higher_is_better", None)
    if direction is None:
        raise RunError(f"nothing says whether a higher {metric} is better", fix="compare by the task's primary metric")
    return bool(direction)


def verdict(difference: Difference, *, higher_is_better: bool) -> Verdict:
    """Say what a difference means."""
    if difference.interval is None:
        return "cannot tell"
    if difference.within_noise:
        return "within noise"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def _refuse(found: Sequence[Runs], metric: str, split: str, different_data: bool) -> None:
    first = found[0]
    for runs in found:
        for directory, summary in zip(runs.directories, runs.summaries, strict=True):
            where = str(directory.path)
            if summary.get("quick"):
                raise RunError(f"{where} was a quick try: its figures mean nothing", fix="run it without --quick")
            scores = summary[split] or {}
            if metric not in scores:
                raise RunError(f"the run has no {metric!r} on the {split} split", where=where, available=list(scores))
            if not different_data and _digest(summary, split) != _digest(first.summaries[0], split):
                raise RunError(
                    f"{where} and {first.directories[0].path} were not scored on the same {split} examples",
                    fix="run both on the same data, or compare all the same with --different-data",
                )


def _digest(summary: Mapping[str, Any], split: str) -> str | None:
    digest: str | None = summary.get("digests", {}).get(split)
    return digest


def _resampled(task: Task, metric: str, runs: Runs) -> list[float] | None:
    """Return what the mean of a metric over runs is on resampled test splits; None where predictions are missing."""
    measure = task.metrics().get(metric)
    stored = [directory.predictions() for directory in runs.directories]
    known = [scored for scored in stored if scored is not None]
    if len(known) < len(stored):
        return None
    draws = resamples(len(known[0].targets), RESAMPLED_TEST_SPLITS)
    if metric == "loss":
        losses = [scored.losses for scored in known if scored.losses is not None]
        if len(losses) < len(known):
            return None
        of_each = torch.stack(losses).mean(0)
        return [float(of_each[indices].mean()) for indices in map(torch.from_numpy, draws)]
    if measure is None:
        return None
    means = []
    for indices in map(torch.from_numpy, draws):
        total = 0.0
        for scored in known:
            measure.reset()
            measure.update(scored.predictions[indices], scored.targets[indices])
            total += float(measure.compute())
        means.append(total / len(known))
    return means


def _standard_error(own: list[float] | None, reference: list[float] | None) -> float | None:
    """Return the standard error of a difference over the examples; None where it is not known."""
    if own is None or reference is None:
        return None
    return standard_error([one - other for one, other in zip(own, reference, strict=True)])


def _notes(found: Sequence[Runs], resampled: Sequence[list[float] | None], split: str) -> list[str]:
    several = all(len(runs.seeds) > 1 for runs in found)
    examples = all(own is not None for own in resampled)
    sources = ["seeds"] * several + [f"{split} examples"] * examples
    notes = []
    if sources:
        notes.append(f"intervals are of 95 %, over {' and '.join(sources)}: within noise where zero is in them")
    if not several:
        notes.append("a single run does not tell how much a seed changes: `transfer run CONFIG --seeds 5` does")
    if not examples:
        notes.append("the noise of the examples scored is not in them")
    return notes
