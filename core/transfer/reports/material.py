"""Material of the report page: the content of a run directory, and the tables of its sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from transfer.config.run_config import RunConfig
from transfer.models.saved_model import LoadedModel
from transfer.reports.top_losses import Example
from transfer.storage.run_directory import Predictions
from transfer.training.experiment import Phase

MAX_LISTED_CLASSES = 60
"""Number of rows of the tables of classes; of more classes, those with the lowest F1 are listed."""


@dataclass(frozen=True)
class Material:
    """The content of a run directory that a page is made of.

    Args:
        folder: The run directory.
        config: The config of the run.
        phases: The phases of the run.
        trained: The trained model with its preprocessing and task.
        summary: Content of ``summary.json``.
        environment: Content of ``environment.json``.
        metrics: Lines of ``metrics.jsonl``: one for each epoch.
        predictions: Predictions for the test split; None if it was not scored.
        examples: The test examples with the highest loss.
        missing: Reason why there are no examples.
        plots: SVG of each plot on the page, by name; filled by :func:`render`.
    """

    folder: Path
    config: RunConfig
    phases: tuple[Phase, ...]
    trained: LoadedModel
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    predictions: Predictions | None
    examples: Sequence[Example]
    missing: str
    plots: dict[str, str] = field(default_factory=dict)

    def plot(self, name: str, svg: Markup) -> Markup:
        """Record a plot, which also becomes an SVG file, and return it."""
        self.plots[name] = svg
        return svg


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        headings: Headings of the columns.
        rows: Cells of each row.
        text_columns: Number of leading columns that contain text; the others contain numbers and are right-aligned.
        note: A sentence below the table.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    note: str = ""


def decimal(value: float | None) -> str:
    """Return a number with four decimals, so that the numbers of a column align; a hyphen for None."""
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.3g}"
