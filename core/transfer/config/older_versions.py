"""Options that configs of older versions lack, with the values that those versions used."""

from __future__ import annotations

from typing import Any


def add_missing_options(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved config, as a run or a folder of runs contains it, after adding options it was stored without.

    Args:
        plain: Resolved config. It contains every option of its version, so a missing one did not exist then.
    """
    task = plain.get("task")
    if isinstance(task, dict) and str(task.get("name")).rpartition(":")[2] == "regression":
        task.setdefault("standardize", False)
    return plain
