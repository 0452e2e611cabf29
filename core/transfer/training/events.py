"""What happens during a run, told to whoever observes it (console, tests, trackers) and cannot change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Note:
    """Something worth knowing, in one line; ``details`` make a table of their own."""

    text: str
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunStarted:
    """Everything is loaded and training begins.

    Args:
        folder: The run directory.
        facts: What is trained, on what, for how long: names and values for a table.
        epochs: Over all phases.
        primary_metric: The metric that picks the best epoch.
    """

    folder: Path
    facts: Mapping[str, Any]
    epochs: int
    primary_metric: str


@dataclass(frozen=True)
class EpochStarted:
    """An epoch begins; counts begin at 1."""

    epoch: int
    epochs: int
    phase: int
    phases: int
    steps: int


@dataclass(frozen=True)
class StepEnded:
    """A training step ended.

    Args:
        step: Within the epoch, from 1.
        loss: Mean over the epoch so far.
        metric: The primary metric's name and value over the epoch so far.
        examples_per_second: Over the epoch so far.
    """

    step: int
    loss: float
    metric: tuple[str, float]
    examples_per_second: float


@dataclass(frozen=True)
class EvaluationStarted:
    """A split is about to be scored."""

    split: str
    steps: int


@dataclass(frozen=True)
class EvaluationStep:
    """A batch was scored."""

    step: int


@dataclass(frozen=True)
class EpochEnded:
    """An epoch was validated and recorded.

    Args:
        record: The line of ``metrics.jsonl``.
        best: It is the best epoch so far.
    """

    record: Mapping[str, Any]
    best: bool


@dataclass(frozen=True)
class RunEnded:
    """The run is complete.

    Args:
        folder: The run directory.
        summary: As in ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]


Event = Note | RunStarted | EpochStarted | StepEnded | EvaluationStarted | EvaluationStep | EpochEnded | RunEnded
Observer = Callable[[Event], None]


def ignore_events(_: object) -> None:
    """Observe nothing."""
    return
