"""What a config that a package ships promises."""

from __future__ import annotations

import math
import tempfile

from transfer.runs.check import check
from transfer.runs.train import run
from transfer.testing.cases import ConfigCase, promise, require


@promise("runs.check.check", "quick")
def it_passes_the_check(case: ConfigCase) -> None:
    """``transfer check`` finds nothing wrong with it: no data, no weights."""
    check(case.path)


@promise("runs.train.run", "training")
def it_runs(case: ConfigCase) -> None:
    """``transfer run --quick`` trains, scores and saves it."""
    with tempfile.TemporaryDirectory() as folder:
        summary = run(case.path, output=folder, quick=True).summary
    require(summary["status"] == "complete", f"the run ends {summary['status']}")
    require(math.isfinite(summary["validation"]["loss"]), "the validation loss is not finite")
