"""Errors about names that do not exist, with the nearest name as the suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from transfer import ConfigError


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
