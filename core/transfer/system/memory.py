"""Available memory, and the peak memory of the process."""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path
from typing import Self

import torch

MEMORY_POLL_SECONDS = 0.002
_UNLIMITED_BYTES = 1 << 60
"""Control groups of version 1 write a number above this if there is no limit."""


def available_bytes() -> int:
    """Return the bytes of memory available without swapping, on the machine or in the container of this process."""
    available = [_machine()]
    for limit, used, inactive in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit_bytes = _number(limit)
        if limit_bytes is not None and limit_bytes < _UNLIMITED_BYTES:
            # The page cache of files counts as used, but the kernel frees it on demand.
            available.append(limit_bytes - (_number(used) or 0) + _inactive_file(inactive))
    return max(0, min(available))


def free_shared_memory_bytes() -> int:
    """Return the free bytes of shared memory. Containers often have 64 MiB; 0 if there is none that can be written."""
    if sys.platform != "linux":
        return sys.maxsize  # shared memory has no file system of its own
    try:
        status = os.statvfs("/dev/shm")  # noqa: S108
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize if os.access("/dev/shm", os.W_OK) else 0  # noqa: S108


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux: half of the memory is a cautious estimate
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _inactive_file(name: str) -> int:
    """Return the bytes of cached file contents that the kernel can free."""
    try:
        lines = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


class PeakResident:
    """Peak resident memory of this process during a ``with`` block, sampled every two milliseconds.

    The kernel's own peak cannot be used: resetting it would lose the peak of the run.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> int:
        """Return the resident memory of the process in bytes."""
        import psutil

        return int(psutil.Process().memory_info().rss)

    def __enter__(self) -> Self:
        self.bytes = self.now()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = max(self.bytes, self.now())

    def _watch(self) -> None:
        while not self._ended.wait(MEMORY_POLL_SECONDS):
            self.bytes = max(self.bytes, self.now())


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory use so far, in bytes: of the device on CUDA, otherwise of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux reports KiB, macOS bytes
