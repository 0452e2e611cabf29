"""The contract of an experiment tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrackedRun:
    """A run that starts or resumes, as passed to a tracker.

    Args:
        folder: Path of the run directory.
        name: Unique name of the run.
        config: Resolved config, by the keys of the command line (``train.optimizer.lr``).
        known: Identifier that :meth:`Tracker.start` returned when the run started; None if it starts now.
    """

    folder: Path
    name: str
    config: Mapping[str, str | bool | int | float | None]
    known: str | None = None


class Tracker(ABC):
    """Records the metrics of a run in another program. A tracker cannot change the run.

    The constructor takes only options, imports no large package and opens no connection, so that a config can be
    checked. An error in a tracker does not stop the run: it is reported once, and the tracker is disabled from then on.
    Each epoch is recorded once, even if the run is killed and resumed.
    """

    @abstractmethod
    def start(self, run: TrackedRun) -> str | None:
        """Start to track a run, or continue if ``run.known`` identifies it.

        Returns:
            Identifier with which tracking can continue after a resume, or None. It is saved in the run directory.
        """

    @abstractmethod
    def record(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Record the metrics of an epoch.

        Args:
            metrics: Values by name, such as ``validation/accuracy`` and ``lr/head``. A complete run ends with one more
                call for the metrics of the run (``test/accuracy``).
            epoch: Number of the epoch; in the last call, that of the last epoch.
        """

    @abstractmethod
    def finish(self, status: Literal["complete", "interrupted", "stopped", "failed"]) -> None:
        """Finish tracking. A run that is not complete may be resumed later, in another process."""
