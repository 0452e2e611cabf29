"""Logging of a run to its trackers. Every record is logged once; a tracker that fails is disabled for the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transfer.config.run_config import RunConfig
from transfer.config.tracker_variables import mask
from transfer.interfaces import TrackedRun, Tracker
from transfer.storage.run_directory import RunDirectory
from transfer.training.events import EpochEnded, Event, Note, Observer, RunEnded, RunStarted

Scalar = str | bool | int | float | None


class Tracking:
    """Observer that forwards events to another observer and logs the metrics of a run to its trackers.

    ``trackers.json`` contains the last epoch that each tracker has logged. A resumed run therefore logs the missing
    epochs, and no epoch twice.

    Args:
        config: Config of the run, with its trackers.
        directory: Run directory.
        observe: Observer that receives all events, and notes on trackers that fail.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, observe: Observer) -> None:
        self._config = config
        self._directory = directory
        self._observe = observe
        self._logged = directory.tracked() if config.trackers else {}
        self._trackers: dict[str, Tracker] = {}

    def __call__(self, event: Event) -> None:
        """Forward an event, and log it."""
        self._observe(event)
        match event:
            case RunStarted():
                self._trackers = {tracker.plugin.name: tracker.make() for tracker in self._config.trackers}
                self._each(self._start)
            case EpochEnded():
                self._each(self._catch_up)
            case RunEnded(summary=summary):
                self.end(summary)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Log the final metrics if the run is complete, and the status of the run."""

        def finish(name: str, tracker: Tracker) -> None:
            self._catch_up(name, tracker)
            if summary["status"] == "complete":
                final = {"test": summary["test"] or {}, "best_validation": summary["validation"]}
                tracker.record(scalars({**final, "best_epoch": summary["best_epoch"]}), summary["epochs"])
            tracker.finish(summary["status"])

        self._each(finish)
        self._trackers = {}

    def _start(self, name: str, tracker: Tracker) -> None:
        previous = self._logged.get(name, {})
        # Trackers are not hyperparameters of the run.
        config = dict(flat({key: value for key, value in self._config.resolved.items() if key != "trackers"}))
        folder = self._directory.path
        identity = tracker.start(TrackedRun(folder, run_name(self._directory), config, previous.get("run")))
        # Written before the first epoch: a killed run resumes this record instead of starting a second one.
        self._logged[name] = {"run": identity, "epochs": previous.get("epochs", 0)}
        self._directory.write_tracked(self._logged)

    def _catch_up(self, name: str, tracker: Tracker) -> None:
        logged = self._logged[name]
        # The file does not exist if the run was stopped before the end of its first epoch.
        has_metrics = (self._directory.path / "metrics.jsonl").exists()
        # From the file instead of the event, so that epochs which a killed process has not logged are included.
        for record in self._directory.metrics() if has_metrics else ():
            if record["epoch"] > logged["epochs"]:
                tracker.record(scalars(record), record["epoch"])
                logged["epochs"] = record["epoch"]
        self._directory.write_tracked(self._logged)

    def _each(self, do: Callable[[str, Tracker], None]) -> None:
        """Call a function with each tracker, and disable the trackers that raise."""
        for name, tracker in list(self._trackers.items()):  # a copy: failing trackers are removed from the mapping
            try:
                do(name, tracker)
            except Exception as error:  # an unreachable server, a full disk, a bug in a plugin
                del self._trackers[name]
                reason = mask(str(error).strip().partition("\n")[0])
                text = f"tracker {name!r} failed and is disabled for this run: {type(error).__name__}: {reason}"
                self._observe(Note(text))


def run_name(directory: RunDirectory) -> str:
    """Return the name of a run for trackers: its folder, with the parent folder if the name has no date and time."""
    path = directory.path.resolve()
    return path.name if re.search(r"-\d{8}-\d{6}", path.name) else f"{path.parent.name}/{path.name}"


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record by names with slashes, such as ``test/accuracy``.

    The epoch is left out, because it is the step at which trackers log the numbers.
    """
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            numbers[f"{prefix}{name}"] = value
    return numbers


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield each value of a config with its key as in overrides. A list without mappings is one value, as JSON."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flat(item, f"{key}.{index}")
    else:
        yield key, json.dumps(value) if isinstance(value, list | Mapping) else value
