"""Errors about names that do not exist, with the nearest name as the suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from transfer import ConfigError


def unknown_name(message: str, name: str, names: Sequence[str], fix: str) -> ConfigError:
    """Return the error of an unknown name: it suggests the nearest name, and otherwise lists all of them.

    Args:
        message: The message of the error.
        name: The unknown name.
        names: The names that exist.
        fix: The fix if no name is near.
    """
    close = difflib.get_close_matches(name, names, n=3)
    return ConfigError(message, available=close or names, fix=f"did you mean {close[0]!r}?" if close else fix)
