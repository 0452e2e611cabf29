"""How much memory there is to use."""

from __future__ import annotations

import os
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60
"""What the first version of control groups writes for no limit is beyond this."""


def available_bytes() -> int:
    """Return how much memory can be used without swapping: of the machine, or of the container this runs in."""
    found = [_machine()]
    for limit, used, inactive in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        most = _number(limit)
        if most is not None and most < _UNLIMITED_BYTES:
            found.append(most - (_number(used) or 0) + _inactive_file(inactive))
    return max(0, min(found))


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux, where nothing so exact is to be had without another library
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _inactive_file(name: str) -> int:
    """Return the bytes of file contents that the kernel would give back."""
    try:
        lines = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
