"""Writing the report of a run, at its end or later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer.config.check import load_config
from transfer.config.run_config import RunConfig
from transfer.data.splits import digest
from transfer.errors import RunError, UserError, damaged
from transfer.interfaces import Split
from transfer.models.saved_model import read_model
from transfer.reports.charts import alone
from transfer.reports.page import Material, render
from transfer.reports.top_losses import Example, hardest
from transfer.runs.artifacts import CompletedRun
from transfer.storage.run_directory import Predictions, RunDirectory
from transfer.system.atomic_files import write_atomically
from transfer.system.downloads import no_downloads
from transfer.training.build import read_data
from transfer.training.preflight import resolve_phases

REPORT = "report.html"
PLOTS = "plots"
MAX_EXPLANATION_SECONDS = 0.2
"""CPU time for explanations in the report at the end of a run; ``transfer report`` has no limit."""


def report(run: str | Path) -> Path:
    """Write the report of a run: ``RUN/report.html``, and its plots to ``RUN/plots/``.

    The page needs nothing beside itself. Where the run's data is not at hand, it lacks the examples themselves.

    Args:
        run: The directory of a run that is complete.

    Returns:
        The page.

    Raises:
        UserError: The run has not ended, is damaged, or needs a plugin that is not installed.
    """
    directory = RunDirectory.open(run)
    summary = directory.summary()
    if summary.get("status") != "complete":
        raise RunError(
            f"the run has not ended: {summary.get('error') or summary.get('status')}",
            where=str(directory.path),
            fix=f"go on with: {directory.resume_command}",
        )
    config = load_config(directory.config())
    config = config.quick() if summary.get("quick") else config
    trained = read_model(directory.model)
    with directory.locked():
        test, missing_reason = _test_split(config, summary)
        return write_report(
            CompletedRun(directory, config, resolve_phases(config, trained.model), trained, test, missing_reason)
        )


def write_report_of(run: CompletedRun) -> None:
    """Write the report at the end of a run, with a limit on the time spent on explanations."""
    write_report(run, MAX_EXPLANATION_SECONDS)


def write_report(subject: CompletedRun, most_seconds: float | None = None) -> Path:
    """Write the report of a run that this process holds the lock of.

    Args:
        subject: The run.
        most_seconds: Spend no more seconds of the processor on explaining examples; None: as many as it takes.

    Returns:
        The page.

    Raises:
        RunError: The run's files are damaged, or nothing can be written there.
    """
    directory = subject.directory
    scored = directory.predictions()
    fix = "bring back the run's own files"
    with damaged("the report cannot be made of this run", str(directory.path), fix):
        examples, missing = _examples(subject, scored, most_seconds)
        material = Material(
            directory.path,
            subject.config,
            subject.phases,
            subject.trained,
            directory.summary(),
            directory.environment(),
            directory.metrics(),
            scored,
            examples,
            missing,
        )
        page, plots = render(material)
    try:
        folder = directory.path / PLOTS
        folder.mkdir(exist_ok=True)
        for name, plot in plots.items():
            # Not flushed, as the page is: they can be drawn again.
            (folder / f"{name}.svg").write_text(alone(plot), encoding="utf-8")
        write_atomically(directory.path / REPORT, page)
    except OSError as error:
        raise RunError(f"the report cannot be written: {error.strerror}", where=str(directory.path)) from error
    return directory.path / REPORT


def _test_split(config: RunConfig, summary: Mapping[str, Any]) -> tuple[Split | None, str]:
    """Return the test split of a run, or why it is not at hand."""
    try:
        with no_downloads():
            _, splits = read_data(config)
    except UserError as error:
        return None, f"the data is not here: {error.problems[0].message}"
    if "test" not in splits:
        return None, "the data has no test split"
    known: Any = summary.get("digests")
    if isinstance(known, Mapping) and known.get("test") != digest({"test": splits["test"]}):
        return None, "the data is not what it was when the run was scored"
    return splits["test"], ""


def _examples(
    subject: CompletedRun, scored: Predictions | None, most_seconds: float | None
) -> tuple[Sequence[Example], str]:
    """Return the examples with the highest loss, or none and why."""
    if scored is None:
        return (), "the test split was not scored"
    if scored.losses is None:
        return (), "the run is of a version that did not keep the losses"
    if subject.test is None:
        return (), subject.missing_reason
    return hardest(subject.trained, subject.test, scored, scored.losses, most_seconds), ""
