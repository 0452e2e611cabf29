"""The contract of an experiment tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# ------------------------------------------------------------------------------------------------------------ tracker


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run that begins or goes on.

    Args:
        folder: The run directory.
        name: What the run is called; no other has that name.
        config: The resolved config by the keys of the command line (``train.optimizer.lr``).
        known: What :meth:`Tracker.start` returned when the run began; None if it begins now.
    """

    folder: Path
    name: str
    config: Mapping[str, str | bool | int | float | None]
    known: str | None = None


class Tracker(ABC):
    """Tells another program what happens in a run. It sees figures and cannot change the run.

    The constructor takes options alone, imports nothing large and contacts nobody, so that a config can be checked.
    What a tracker raises costs a run nothing but the tracker: it is told once, and the tracker is left out from there
    on. An epoch is recorded once, also in a run that was killed and goes on.
    """

    @abstractmethod
    def start(self, run: TrackedRun) -> str | None:
        """Begin to track a run, or go on with one that is known.

        Returns:
            What identifies the run there, if it can be gone on with; it is kept in the run directory.
        """

    @abstractmethod
    def record(self, figures: Mapping[str, float], epoch: int) -> None:
        """Take the figures of an epoch, by names such as ``validation/accuracy`` and ``lr/head``.

        After the last epoch of a complete run come those of the whole run (``test/accuracy``), with its number.
        """

    @abstractmethod
    def finish(self, status: Literal["complete", "interrupted", "stopped", "failed"]) -> None:
        """End. A run that is not complete may go on later, perhaps in another process."""
