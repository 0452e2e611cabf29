"""The software and hardware environment of a run."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(device: str, distributions: Mapping[str, str], processes: int = 1) -> dict[str, Any]:
    """Return the environment that metrics may depend on, besides config and data.

    Args:
        device: Name of the device.
        distributions: Versions of the plugin distributions by name.
        processes: Number of processes.
    """
    names = ("torch", "torchvision", "numpy", "tokenizers", "safetensors", "torchmetrics")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "folder": str(Path.cwd()),
        "git_revision": _git_revision(),
        "versions": {name: version for name in names if (version := _version(name))} | dict(distributions),
    }


def environment_diff(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference between two environments."""
    old, new = ({"processes": 1, **e, **e.get("versions", {})} for e in (before, now))
    names = [name for name in new if name not in ("versions", "plugins")]
    return [f"{name} {old.get(name)} -> {new[name]}" for name in names if old.get(name) != new[name]]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    try:
        # The revision of the user's project, from the git on their PATH.
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
