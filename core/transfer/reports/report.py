"""The report of a run, written when the run ends or by ``transfer report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transfer.config.check import config_of_moved_run
from transfer.config.run_config import RunConfig
from transfer.errors import RunError, UserError, damaged
from transfer.interfaces import DataSpec, Split
from transfer.models.recorded_plugins import run_config
from transfer.models.saved_model import read_model
from transfer.reports.charts import standalone
from transfer.reports.material import Material
from transfer.reports.page import render
from transfer.reports.top_losses import Example, top_losses
from transfer.runs.artifacts import CompletedRun
from transfer.runs.data import changed_split, read_splits
from transfer.storage.run_directory import Predictions, RunDirectory
from transfer.system.atomic_files import write_atomically
from transfer.system.downloads import no_downloads
from transfer.training.preflight import resolve_phases

REPORT = "report.html"
PLOTS = "plots"
MAX_EXPLANATION_SECONDS = 0.2
"""CPU time for explanations in the report that a run ends with; ``transfer report`` has no limit."""


def report(run: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write the report of a run: ``RUN/report.html``, and its plots to ``RUN/plots/``.

    The page is self-contained. If the data of the run is not available, the page lacks the top losses.

    Args:
        run: Run directory of a complete run.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved.

    Returns:
        The path of the page.

    Raises:
        UserError: The run is not complete, is damaged, or needs a plugin that is not installed.
    """
    directory = RunDirectory.open(run)
    summary = directory.summary()
    if summary.get("status") != "complete":
        raise RunError(
            f"the run is not complete: {summary.get('error') or summary.get('status')}",
            where=str(directory.path),
            fix=f"resume it with: {directory.resume_command}",
        )
    config = config_of_moved_run(run_config(directory), overrides)
    config = config.quick() if summary.get("quick") else config
    trained = read_model(directory.model)
    # A process that resumes the run would rewrite the files that the page is made of.
    with directory.locked():
        test, missing_reason = _test_split(config, directory, trained.data)
        return write_report(
            CompletedRun(directory, config, resolve_phases(config, trained.model), trained, test, missing_reason)
        )


def write_report_of(run: CompletedRun) -> None:
    """Write the report that a run ends with; the time for explanations is limited."""
    write_report(run, MAX_EXPLANATION_SECONDS)


def write_report(run: CompletedRun, max_seconds: float | None = None) -> Path:
    """Write the report of a run that is locked by this process.

    Args:
        run: The run.
        max_seconds: Limit on the CPU time for explanations of examples; None explains all.

    Returns:
        The path of the page.

    Raises:
        RunError: The files of the run are damaged, or the report cannot be written.
    """
    directory = run.directory
    predictions = directory.predictions()
    fix = "restore the original files of the run"
    with damaged("the report cannot be created from this run", str(directory.path), fix):
        examples, missing = _examples(run, predictions, max_seconds)
        material = Material(
            directory.path,
            run.config,
            run.phases,
            run.trained,
            directory.summary(),
            directory.environment(),
            directory.metrics(),
            predictions,
            examples,
            missing,
        )
        page, plots = render(material)
    try:
        folder = directory.path / PLOTS
        folder.mkdir(exist_ok=True)
        for name, plot in plots.items():
            # Plots are not flushed to the disk: `transfer report` can draw them again.
            (folder / f"{name}.svg").write_text(standalone(plot), encoding="utf-8")
        write_atomically(directory.path / REPORT, page)
    except OSError as error:
        raise RunError(f"the report cannot be written: {error.strerror}", where=str(directory.path)) from error
    return directory.path / REPORT


def _test_split(config: RunConfig, run: RunDirectory, trained: DataSpec) -> tuple[Split | None, str]:
    """Return the test split of a run, or None and the reason why it is not available."""
    try:
        # A report is written from files; a download would take longer than drawing the page.
        with no_downloads():
            splits = read_splits(config, trained, run.path)
    except UserError as error:
        return None, f"the data is not available: {error.problems[0].message}"
    if "test" not in splits:
        return None, "the data has no test split"
    if changed_split(run.summary(), "test", splits["test"]) is not None:
        return None, "the data has changed since the run was scored"
    return splits["test"], ""


def _examples(
    run: CompletedRun, predictions: Predictions | None, max_seconds: float | None
) -> tuple[Sequence[Example], str]:
    """Return the examples with the highest loss, or none and the reason."""
    if predictions is None:
        return (), "the test split was not scored"
    if predictions.losses is None:
        return (), "the run was trained by a version that did not store the losses"
    if run.test is None:
        return (), run.missing_reason
    return top_losses(run.trained, run.test, predictions, predictions.losses, max_seconds), ""
