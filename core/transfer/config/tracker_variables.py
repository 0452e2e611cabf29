"""Environment variables in the options of trackers: a run directory contains ``${NAME}``, and not the value.

The address of a tracking server may contain a password. A resumed run needs it again, but the config of a run directory
may come from somebody else: it could send any variable to any address. Variables are therefore read only for trackers
whose options this user has stored before, in a run that was started on this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transfer.config.yaml_document import VARIABLE, substituted
from transfer.system.user_folders import cache_folder

MIN_SECRET_CHARACTERS = 4
"""Shorter values are left as they are: masking them would change text that only looks the same."""


def mask(text: str) -> str:
    """Replace the values of the environment variables that a config has used by the names of the variables."""
    # Longer values first, because a value may be part of another one.
    for name, value in sorted(substituted.items(), key=lambda item: -len(item[1])):
        if len(value) >= MIN_SECRET_CHARACTERS:
            text = text.replace(value, f"${{{name}}}")
    return text


def mask_trackers(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved config without the values of environment variables in the options of its trackers."""
    return {**plain, "trackers": _map_text(plain["trackers"], mask)} if plain.get("trackers") else dict(plain)


def stored_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved config as a run directory contains it, and record that its trackers may read variables.

    Args:
        plain: Resolved config.
    """
    stored = mask_trackers(plain)
    if stored != plain:
        with suppress(OSError):  # the run can be resumed without its trackers
            record = _record(stored["trackers"])
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()
    return stored


def read_tracker_variables(plain: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a run directory with the variables of its trackers, and the names that were not read.

    Args:
        plain: Config of a run directory, which may come from somebody else.
    """
    trackers, missing = plain.get("trackers"), list[str]()
    if not trackers:
        return dict(plain), missing
    is_known = _record(trackers).exists()

    def read(text: str) -> str:
        names = [match[1] for match in VARIABLE.finditer(text)]
        if not is_known or any(name not in os.environ for name in names):
            missing.extend(names)
            return text
        substituted.update({name: os.environ[name] for name in names})
        return VARIABLE.sub(lambda match: os.environ[match[1]], text)

    return {**plain, "trackers": _map_text(trackers, read)}, missing


def _record(trackers: Any) -> Path:
    """Return the path of the file that exists if this user has stored these trackers."""
    digest = hashlib.sha256(json.dumps(trackers, sort_keys=True).encode()).hexdigest()
    return cache_folder("trackers") / digest


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain data with every text in it changed, except for keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(item, change) for key, item in value.items()}
    return [_map_text(item, change) for item in value] if isinstance(value, list | tuple) else value
