"""Graceful shutdown on SIGINT and SIGTERM: critical sections are finished first, a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """The process received SIGINT or SIGTERM.

    Args:
        number: Number of the signal.
        at_once: Whether it is the second Ctrl-C: the run ends without writing anything.
    """

    def __init__(self, number: int, *, at_once: bool = False) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 128 + number
        self.at_once = at_once


class Signals:
    """Context in which SIGINT and SIGTERM raise :class:`Interrupted`.

    They raise at once, or at the end of a :meth:`deferred` block. The context does nothing outside the main thread,
    because Python handles signals only there. Signals that are ignored (``nohup``) stay ignored.

    Args:
        distributed: Whether several processes train. Signals are then deferred until all ranks call
            :meth:`raise_if_any_rank_interrupted` after they have exchanged them (:meth:`agree`), so that all stop at
            the same step.
    """

    def __init__(self, *, distributed: bool = False) -> None:
        self._received: int | None = None
        self._agreed = 0
        self._deferring = distributed
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer SIGINT and SIGTERM until the block ends."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before
        if not before and self._received is not None:
            raise Interrupted(self._received)

    @property
    def received(self) -> int:
        """Number of the signal that this process has received; 0 without one."""
        return self._received or 0

    def agree(self, number: int) -> None:
        """Record the largest number of a signal that any rank has received, 0 without one."""
        self._agreed = number

    def raise_if_any_rank_interrupted(self) -> None:
        """Raise on all ranks if any rank has received a signal. Does nothing in a single process."""
        if self._agreed:
            raise Interrupted(self._agreed)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise immediately on a signal inside the block; for long waits in distributed training."""
        before, self._deferring = self._deferring, False
        try:
            if before and self._received is not None:
                raise Interrupted(self._received)
            yield
        finally:
            self._deferring = before

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader process, which Ctrl-C reaches too: it ends when the main process does
        if self._received is not None:
            if number == signal.SIGINT:
                raise Interrupted(number, at_once=True)
            return  # a scheduler may send SIGTERM more than once
        self._received = number
        if not self._deferring:
            raise Interrupted(number)
