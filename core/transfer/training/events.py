"""Events of a run. Observers (console, tests, trackers) receive them and cannot change the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Note:
    """A line of information.

    Args:
        text: Text of the note.
        details: Names and values, shown as a table. None shows no table.
    """

    text: str
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunStarted:
    """The start of training, after data and weights have been loaded.

    Args:
        folder: Run directory.
        facts: Names and values that describe data, model and training, for a table.
        epochs: Number of epochs over all phases.
        primary_metric: Name of the metric that selects the best epoch.
    """

    folder: Path
    facts: Mapping[str, Any]
    epochs: int
    primary_metric: str


@dataclass(frozen=True)
class EncodingStep:
    """Progress of encoding the values of a split, such as its texts.

    Args:
        split: Name of the split.
        step: Number of encoded values.
        steps: Number of values of the split.
    """

    split: str
    step: int
    steps: int


@dataclass(frozen=True)
class CachingStep:
    """A batch of the features that are computed for the feature cache.

    Args:
        split: Name of the split.
        step: Number of the batch, from 1.
        steps: Number of batches of the split, in all augmented views.
    """

    split: str
    step: int
    steps: int


@dataclass(frozen=True)
class EpochStarted:
    """The start of an epoch.

    Args:
        epoch: Number of the epoch in the run, from 1.
        epochs: Number of epochs over all phases.
        phase: Number of the phase, from 1.
        phases: Number of phases.
        steps: Number of batches of the epoch.
    """

    epoch: int
    epochs: int
    phase: int
    phases: int
    steps: int


@dataclass(frozen=True)
class StepEnded:
    """The end of a training step.

    Args:
        step: Number of the batch in the epoch, from 1.
        loss: Mean loss over the epoch so far.
        metric: Name and value of the primary metric over the epoch so far.
        examples_per_second: Throughput over the epoch so far.
    """

    step: int
    loss: float
    metric: tuple[str, float]
    examples_per_second: float


@dataclass(frozen=True)
class EvaluationStarted:
    """The start of the evaluation of a split.

    Args:
        split: Name of the split.
        steps: Number of batches.
    """

    split: str
    steps: int


@dataclass(frozen=True)
class EvaluationStep:
    """The end of an evaluation step.

    Args:
        step: Number of the batch, from 1.
    """

    step: int


@dataclass(frozen=True)
class EpochEnded:
    """The end of an epoch, after its validation.

    Args:
        record: Line of ``metrics.jsonl``.
        best: Whether the epoch is the best one so far.
    """

    record: Mapping[str, Any]
    best: bool


@dataclass(frozen=True)
class RunEnded:
    """The end of a complete run.

    Args:
        folder: Run directory.
        summary: Content of ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]


Event = (
    Note
    | EncodingStep
    | RunStarted
    | CachingStep
    | EpochStarted
    | StepEnded
    | EvaluationStarted
    | EvaluationStep
    | EpochEnded
    | RunEnded
)
Observer = Callable[[Event], None]


def ignore_events(_: object) -> None:
    """Observe nothing."""
    return
