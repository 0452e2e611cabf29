"""Values as text for people, in one format for tables, pages, notes and command lines."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def quote_for_shell(argument: str | Path) -> str:
    r"""Return an argument of a command line as a person can paste it into a shell.

    Args:
        argument: Path or text. A leading dash, which would be read as an option, gets ``./`` in front of it. Control
            characters and bytes that are not UTF-8 are written in bash's form ``$'\x1b'``.
    """
    text = str(argument)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    plain = (c if c.isprintable() and c not in "'\\" else _escaped(c) for c in text)
    return f"$'{''.join(plain)}'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def format_value(value: Any, *, digits: int = 4) -> str:
    """Return a value as text: ``0.9021``, ``25,000``, ``true``, ``none``, ``a 1, b 2``.

    Args:
        value: A number, text, boolean or None, or a mapping or list of them.
        digits: Significant digits of a float.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item, digits=digits)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item, digits=digits) for item in value) or "none"
    return str(value)


def format_names(names: Sequence[str], limit: int) -> str:
    """Return the first names of a list, and the number of the others: ``a, b and 3 more``."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def format_count(count: int) -> str:
    """Return a large count in short: ``11.7 M``, ``809 k``."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def format_duration(seconds: float) -> str:
    """Return a duration: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{seconds:.1f} s"
