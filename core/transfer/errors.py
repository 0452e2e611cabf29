"""What a user is told when something is wrong: what was asked, where, what exists, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeVar

_E = TypeVar("_E", bound="TransferError")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        message: What was asked and why it cannot be.
        where: File and line, command-line override, or path of the input at fault.
        available: What exists instead (names of plugins, keys, stages, files).
        fix: What to do about it, in one sentence.
    """

    message: str
    where: str | None = None
    available: tuple[str, ...] = ()
    fix: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.available:
            lines.append(f"  available: {', '.join(self.available)}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class TransferError(Exception):
    """Base of every error that this framework raises on purpose; the run failed (exit status 1)."""

    exit_status = 1
    shown_elsewhere = False
    """Another process of the same run shows what is wrong; this one ends with the same status and says nothing."""

    def __init__(
        self, message: str, *, where: str | None = None, available: Iterable[str] = (), fix: str | None = None
    ) -> None:
        self.problems: tuple[Problem, ...] = (Problem(message, where, tuple(available), fix),)
        super().__init__(message)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """Return one error that holds every problem found."""
        return _rebuild(cls, tuple(problems))

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    # Errors cross process boundaries (loader workers), and Exception's own pickling drops keyword arguments.
    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problems))


class UserError(TransferError):
    """The user's input is wrong (exit status 2): shown as a panel, never as a traceback."""

    exit_status = 2


class ConfigError(UserError):
    """One or more problems in a config, all found before anything was loaded."""


class PluginError(UserError):
    """A plugin is unknown, ambiguous, cannot be imported or does not keep its contract."""


class DataError(UserError):
    """Data is missing, empty, unreadable or not what the dataset says it is."""


class WeightsError(UserError):
    """Pretrained weights or vectors are missing or do not fit the model."""


class RunError(UserError):
    """A run directory is missing, incomplete or not made by this framework."""


class ExportError(UserError):
    """A model cannot be exported as asked, or what was exported does not give the model's own results."""


class TrainingError(TransferError):
    """Training cannot go on: a loss that is not finite, memory that ran out."""


class MemoryRanOut(TrainingError):  # noqa: N818  # it says what happened
    """Memory ran out on a batch."""


class StoppedByObserver(TransferError):  # noqa: N818  # nothing went wrong
    """An observer ends a run after an epoch: what it reached stays, and it can be resumed."""


def _rebuild(cls: type[_E], problems: tuple[Problem, ...]) -> _E:
    error = cls.__new__(cls)
    error.problems = problems
    error.args = (problems[0].message,)
    return error


@contextmanager
def damaged(what: str, where: str, fix: str) -> Iterator[None]:
    """Refuse content that somebody may have edited or damaged, whatever it is that working with it raises.

    Args:
        what: What cannot be done with it.
        where: The file or folder.
        fix: What to do about it.

    Raises:
        RunError: Anything but this framework's own errors was raised, which is kept as the cause.
    """
    try:
        yield
    except TransferError:
        raise
    except Exception as error:
        raise RunError(f"{what}: {type(error).__name__}: {error}", where=where, fix=fix) from error


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that ``name`` was most likely meant to be, or None."""
    matches = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(what: str, name: str, names: Iterable[str], *, where: str | None = None, fix: str = "") -> Problem:
    """Return the problem of a name that does not exist: it lists the names that do and suggests the nearest.

    Args:
        what: What the name should name, in the singular (``stage``, ``backbone``).
        name: The unknown name.
        names: The names that exist.
        where: The config line or file that contains the name.
        fix: The fix if no name is near.
    """
    names = sorted(names)
    close = nearest(name, names)
    suggestion = f"did you mean {close!r}?" if close else fix or None
    return Problem(f"unknown {what} {name!r}", where, tuple(names), suggestion)
