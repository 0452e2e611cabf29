"""Support for renamed methods of contracts: a subclass that defines the old name keeps working."""

from __future__ import annotations

import warnings
from collections.abc import Mapping


def adopt_renamed_methods(cls: type, renamed: Mapping[str, str]) -> None:
    """Use a subclass's method under an old name as the method under the new name, with a warning.

    Args:
        cls: Subclass of a contract.
        renamed: New method name by old method name.
    """
    for old, new in renamed.items():
        if old in vars(cls) and new not in vars(cls):
            warnings.warn(
                f"{cls.__module__}.{cls.__qualname__}.{old} is now called {new}; version 0.3 removes the old name",
                DeprecationWarning,
                stacklevel=4,  # the class statement: above this function, __init_subclass__ and the metaclass
            )
            setattr(cls, new, vars(cls)[old])
