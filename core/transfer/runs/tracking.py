"""What trackers are told of a run, each thing once; one that fails is left out, and the run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transfer.config.run_config import RunConfig
from transfer.interfaces import TrackedRun, Tracker
from transfer.storage.run_directory import RunDirectory
from transfer.training.events import EpochEnded, Event, Note, Observer, RunEnded, RunStarted

Scalar = str | bool | int | float | None


class Tracking:
    """An observer that tells a run's trackers, and then another observer, what happens.

    How far each tracker has come is kept in ``trackers.json``: a run that goes on tells it what it missed, and nothing
    twice.

    Args:
        config: Names the trackers.
        directory: Of the run.
        observe: The other observer, which hears of trackers that fail.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, observe: Observer) -> None:
        self._config = config
        self._directory = directory
        self._observe = observe
        self._told = directory.tracked() if config.trackers else {}
        self._trackers: dict[str, Tracker] = {}

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
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
        """Tell the figures of the whole run where it is complete, and how it ended."""

        def finish(name: str, tracker: Tracker) -> None:
            self._catch_up(name, tracker)
            if summary["status"] == "complete":
                final = {"test": summary["test"] or {}, "best_validation": summary["validation"]}
                tracker.record(figures({**final, "best_epoch": summary["best_epoch"]}), summary["epochs"])
            tracker.finish(summary["status"])

        self._each(finish)
        self._trackers = {}

    def _start(self, name: str, tracker: Tracker) -> None:
        known = self._told.get(name, {})
        config = dict(flat({key: value for key, value in self._config.resolved.items() if key != "trackers"}))
        folder = self._directory.path
        identity = tracker.start(TrackedRun(folder, run_name(self._directory), config, known.get("run")))
        self._told[name] = {"run": identity, "epochs": known.get("epochs", 0)}
        self._directory.write_tracked(self._told)

    def _catch_up(self, name: str, tracker: Tracker) -> None:
        told = self._told[name]
        ended = (self._directory.path / "metrics.jsonl").exists()  # an epoch, before the run was stopped
        for record in self._directory.metrics() if ended else ():
            if record["epoch"] > told["epochs"]:
                tracker.record(figures(record), record["epoch"])
                told["epochs"] = record["epoch"]
        self._directory.write_tracked(self._told)

    def _each(self, do: Callable[[str, Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(name, tracker)
            except Exception as error:  # a server that is away, a full disk, a mistake in a plugin
                del self._trackers[name]
                reason = str(error).strip().partition("\n")[0]
                text = f"tracker {name!r} is left out from here on: {type(error).__name__}: {reason}"
                self._observe(Note(text))


def run_name(directory: RunDirectory) -> str:
    """Return what a run is called: its folder, with that around it where the name alone is not one of a kind."""
    path = directory.path.resolve()
    return path.name if re.search(r"-\d{8}-\d{6}", path.name) else f"{path.parent.name}/{path.name}"


def figures(record: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Return the numbers of a record by names with slashes; the epoch, by which they are recorded, is none of them."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{before}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            found[f"{before}{name}"] = value
    return found


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield each value of a config with its key as the command line has it; a list of mere values is one, as JSON."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flat(item, f"{key}.{index}")
    else:
        yield key, json.dumps(value) if isinstance(value, list | Mapping) else value
