"""Files that packages write into the folder of a completed run, through the entry-point group ``transfer.artifacts``.

Training does not import the packages that write them: without ``transfer.reports`` a run ends without a report page.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from transfer.config.run_config import RunConfig
from transfer.interfaces import Split
from transfer.models.saved_model import LoadedModel
from transfer.registry.entry_points import core_first, import_target, plugins
from transfer.storage.run_directory import RunDirectory
from transfer.training.events import Note, Observer
from transfer.training.experiment import Phase

KIND = "artifact"
"""Entries are functions that take a :class:`CompletedRun` and write files into its run directory."""


@dataclass(frozen=True)
class CompletedRun:
    """A completed run with everything that an artifact may need.

    Args:
        directory: The run directory; this process holds its lock.
        config: The config of the run.
        phases: The phases of the run, resolved for its model.
        trained: The trained model with its preprocessing and task.
        test: The raw test split, or None if it is not available.
        missing_reason: Why the test split is not available.
    """

    directory: RunDirectory
    config: RunConfig
    phases: tuple[Phase, ...]
    trained: LoadedModel
    test: Split | None
    missing_reason: str = "the data has no test split"


def write_artifacts(run: CompletedRun, observe: Observer) -> None:
    """Write every registered artifact. A failure is reported as a note: the run stays complete."""
    for name in sorted({plugin.name for plugin in plugins(KIND)}):
        try:
            (plugin, *_) = core_first([plugin for plugin in plugins(KIND) if plugin.name == name])
            import_target(plugin)(run)
        except Exception as error:
            folder = shlex.quote(str(run.directory.path))
            observe(Note(f"the {name} was not written: {error}; to try again: transfer {name} {folder}"))
