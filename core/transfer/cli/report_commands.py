"""Commands of the package reports: report, preview."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfer.cli.arguments import ConfigFile, Overrides, RunFolder


def report(run: RunFolder) -> None:
    """Write RUN/report.html: one page with the plan, curves, mistakes, calibration and data of a run."""
    from transfer.reports.report import report as report_run
    from transfer.system.terminal import printable

    print(printable(str(report_run(run))))  # noqa: T201


def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write it; by default a picture goes to NAME-batch.png.")
    ] = None,
) -> None:
    """Show a training batch of CONFIG as the model sees it: augmented, with labels."""
    from transfer.reports.preview import preview_batch
    from transfer.system.terminal import printable

    seen = preview_batch(config, overrides or [], output=output)
    if isinstance(seen.content, str):
        print(printable(seen.content))  # noqa: T201
    if seen.path is not None:
        print(seen.path)  # noqa: T201
