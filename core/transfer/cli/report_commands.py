"""Commands of the package reports: report, preview."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfer.cli.arguments import ConfigFile, DataOverrides, Overrides, RunFolder


def report(run: RunFolder, overrides: DataOverrides = None) -> None:
    """Write RUN/report.html: setup, curves, top losses, calibration and data of a run on one page."""
    from transfer.reports.report import report as report_run
    from transfer.system.terminal import printable

    print(printable(str(report_run(run, overrides or []))))  # noqa: T201


def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default for images: NAME-batch.png.", show_default=False)
    ] = None,
) -> None:
    """Show a training batch of CONFIG as the model receives it: augmented, with labels."""
    from transfer.reports.preview import preview_batch
    from transfer.system.terminal import printable

    batch = preview_batch(config, overrides or [], output=output)
    if isinstance(batch.content, str):
        print(printable(batch.content))  # noqa: T201
    if batch.path is not None:
        print(batch.path)  # noqa: T201
