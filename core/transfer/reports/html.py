"""HTML in which nothing from outside can be markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transfer.system.terminal import printable


def escape(text: object) -> str:
    """Return a text as HTML or XML may have it; control characters stand as their escapes."""
    return html.escape(printable(str(text)))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Return a table.

    Args:
        headings: Text.
        rows: Cells of HTML.
        words: So many columns hold words, the rest numbers, which stand at the right.
    """
    sides = [""] * words + [' class="number"'] * (len(headings) - words)
    head = "".join(f"<th{side}>{escape(heading)}</th>" for heading, side in zip(headings, sides, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{side}>{cell}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Return names and values, which may be nested, as a list of definitions."""
    rows = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(said(v))}</dd>" for name, v in values.items())
    return f"<dl>{rows}</dl>"


def said(value: Any) -> str:
    """Return a value as a person writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {said(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    return str(value)
