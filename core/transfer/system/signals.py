"""SIGTERM and Ctrl-C: what must not be left half done is finished first; a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    Args:
        number: Of the signal.
        at_once: It was asked a second time: nothing more is written.
    """

    def __init__(self, number: int, *, at_once: bool = False) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 128 + number
        self.at_once = at_once


class Signals:
    """While entered, SIGINT and SIGTERM raise :class:`Interrupted`: at once, or at the end of what is :meth:`deferred`.

    Outside the main thread, where Python cannot take signals, it does nothing; a signal that is ignored (``nohup``)
    stays ignored.

    Args:
        agree: Where several processes train together: returns the largest of the numbers that they have. They stop at
            the same place then, where all of them :meth:`raise_if_any_rank_interrupted`.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self._agree = agree
        self._received: int | None = None
        self._holding = agree is not None
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
        """Finish what is inside before a signal is heard."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before
        if not before and self._received is not None:
            raise Interrupted(self._received)

    def raise_if_any_rank_interrupted(self) -> None:
        """Where several processes train together: stop, all at the same place, if any of them was asked to."""
        if self._agree is not None:
            number = self._agree(self._received or 0)
            if number:
                raise Interrupted(number)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Hear a signal at once inside: where several processes train, and this one may work or wait for long."""
        before, self._holding = self._holding, False
        try:
            if before and self._received is not None:
                raise Interrupted(self._received)
            yield
        finally:
            self._holding = before

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # Ctrl-C reaches loader processes too: they end when this one does
        if self._received is not None:
            if number == signal.SIGINT:
                raise Interrupted(number, at_once=True)
            return  # a scheduler may send SIGTERM more than once
        self._received = number
        if not self._holding:
            raise Interrupted(number)
