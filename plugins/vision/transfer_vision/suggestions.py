"""Names in errors: the nearest one as a suggestion, and long lists of them in short."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from transfer import ConfigError

MAX_NAMES = 6
"""Maximum number of names that an error lists."""


def unknown_name(
    message: str, name: str, names: Sequence[str], fix: str, *, available: Sequence[str] = ()
) -> ConfigError:
    """Return the error of an unknown name, which suggests the nearest one.

    Args:
        message: The message of the error.
        name: The unknown name.
        names: The names that exist.
        fix: The fix if no name is near.
        available: The names that are listed. Default: the near names, or all names if none is near.
    """
    close = difflib.get_close_matches(name, names, n=3)
    return ConfigError(
        message, available=available or close or names, fix=f"did you mean {close[0]!r}?" if close else fix
    )


def abbreviated(names: Sequence[str]) -> str:
    """Return the first names of a list, and the number of the others: ``a, b and 3 more``."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")
