"""Methods of contracts that have another name now: a subclass that defines the old name keeps working."""

from __future__ import annotations

import warnings
from collections.abc import Mapping


def adopt_renamed_methods(cls: type, renamed: Mapping[str, str]) -> None:
    """Make a subclass's definition of an old method name count as one of the new name, with a warning.

    Args:
        cls: The subclass.
        renamed: New method name by old method name.
    """
    for old, new in renamed.items():
        if old in vars(cls) and new not in vars(cls):
            warnings.warn(
                f"{cls.__module__}.{cls.__qualname__}.{old} is now called {new}; the old name goes away in version 0.3",
                DeprecationWarning,
                stacklevel=4,
            )
            setattr(cls, new, vars(cls)[old])
