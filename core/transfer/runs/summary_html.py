"""Short HTML tables of results, which notebooks show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from transfer.system.formatting import format_value
from transfer.system.templates import escape

_SHOWN = (
    *("status", "error", "seeds", "examples", "primary_metric", "best_epoch", "validation", "test"),
    *("parameters", "device", "seconds", "warnings"),
)
"""Keys of a summary in the table."""


def html_table(title: object, rows: Sequence[Sequence[object]], header: Sequence[object] = ()) -> str:
    """Return a table with a caption as HTML without script; every value is escaped.

    Args:
        title: Caption.
        rows: Cells of each row.
        header: Names of the columns; none prints no header.
    """
    lines = [_row(header, "th")] if header else []
    lines += [_row(row, "td") for row in rows]
    return str(Markup("<table><caption>{}</caption>\n{}\n</table>").format(escape(title), Markup("\n").join(lines)))


def _row(cells: Sequence[object], tag: str) -> Markup:
    parts = [Markup("<{0}>{1}</{0}>").format(tag, escape(format_value(cell))) for cell in cells]
    return Markup("<tr>{}</tr>").format(Markup("").join(parts))


def run_html(folder: Path, summary: Mapping[str, Any]) -> str:
    """Return the results of a run as a table: examples, best epoch, metrics.

    Args:
        folder: Run directory.
        summary: Content of ``summary.json``.
    """
    rows = [(name.replace("_", " "), summary[name]) for name in _SHOWN if summary.get(name) is not None]
    if (folder / "report.html").is_file():
        rows.append(("report", folder / "report.html"))
    return html_table(f"run {folder}", rows)
