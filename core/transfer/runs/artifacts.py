"""Files that packages write into the run directory of a completed run, through entry points in ``transfer.artifacts``.

Training does not import the packages that write them: without ``transfer.reports``, a run has no report page.
"""

from __future__ import annotations

from dataclasses import dataclass

from transfer.config.run_config import RunConfig
from transfer.errors import PluginError
from transfer.interfaces import Split
from transfer.models.saved_model import LoadedModel
from transfer.registry.entry_points import core_first, import_target, plugins
from transfer.storage.run_directory import RunDirectory
from transfer.system.formatting import quote_for_shell
from transfer.training.events import Note, Observer
from transfer.training.experiment import Phase

KIND = "artifact"
"""Entries are functions that take a :class:`CompletedRun` and write files into its run directory."""


@dataclass(frozen=True)
class CompletedRun:
    """Completed run with the objects that artifacts are made from.

    Args:
        directory: Run directory, locked by this process.
        config: Config of the run.
        phases: Phases of the run, resolved for its model.
        trained: Trained model with its preprocessing and task.
        test: Raw test split; None if it is not available.
        missing_reason: Reason why the test split is not available.
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
        (plugin, *_) = core_first([plugin for plugin in plugins(KIND) if plugin.name == name])
        try:
            write = import_target(plugin)
        except PluginError as error:
            observe(Note(f"the {name} was not written: {error.problems[0].message}"))
            continue
        try:
            write(run)
        except Exception as error:  # an artifact is code of a plugin, which may raise anything
            folder = quote_for_shell(run.directory.path)
            observe(Note(f"the {name} was not written: {error}; try again with: transfer {name} {folder}"))
