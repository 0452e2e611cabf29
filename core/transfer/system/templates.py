"""Jinja2 environments for the pages and documents that this package writes."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from transfer.system.formatting import format_value
from transfer.system.terminal import printable


def escape(text: object) -> Markup:
    """Return a text as markup for HTML and SVG, with control characters replaced by their escape sequences."""
    return Markup.escape(_finalize(text))


@cache
def environment(package: str) -> Environment:
    """Return the environment of a package's ``templates`` folder.

    Templates of HTML (``.html.j2``) escape every value; those of Markdown (``.md.j2``) do not, and use the filters
    ``cell`` for values in tables and ``code`` for names. A name that the template gets no value for is an error.

    Args:
        package: Import name of the package that contains the folder ``templates``.
    """
    made = Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["value"] = format_value
    made.filters["cell"] = _markdown_cell
    made.filters["code"] = _markdown_code
    return made


def _finalize(value: Any) -> Any:
    """Replace control characters in every value that a template prints; markup was escaped when it was made."""
    return value if isinstance(value, Markup) else printable(str(value))


def _markdown_cell(value: object) -> str:
    """Return a text that cannot end a cell or a row of a Markdown table."""
    return " ".join(format_value(value).replace("|", "\\|").split())


def _markdown_code(value: object) -> str:
    """Return a text as inline code of Markdown, in which nothing is markup."""
    text = " ".join(str(value).split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"
