"""Contracts of the config files of a package."""

from __future__ import annotations

import math
import tempfile

from transfer.runs.check import check
from transfer.runs.train import run
from transfer.testing.cases import ConfigCase, promise, require


@promise("runs.check.check", "quick")
def it_passes_the_check(case: ConfigCase) -> None:
    """``transfer check`` reports no problem: neither data nor weights are needed."""
    check(case.path)


@promise("runs.train.run", "training")
def it_runs(case: ConfigCase) -> None:
    """``transfer run --quick`` trains, evaluates and saves the model."""
    with tempfile.TemporaryDirectory() as folder:
        summary = run(case.path, output=folder, quick=True).summary
    require(summary["status"] == "complete", f"the status of the run is {summary['status']!r}, not 'complete'")
    require(math.isfinite(summary["validation"]["loss"]), "the validation loss is not finite")
