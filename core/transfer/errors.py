"""Errors with the problem, its location, the available alternatives, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeVar

_E = TypeVar("_E", bound="TransferError")


@dataclass(frozen=True)
class Problem:
    """One problem in the user's input, a plugin or a run.

    Args:
        message: The wrong value or action, and the reason.
        where: Location of the problem: file and line, command-line override, or path of the input.
        available: Valid alternatives (names of plugins, keys, stages, files).
        fix: Instruction that solves the problem, in one sentence.
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
    """Base class of all errors that this framework raises; the run failed (exit status 1)."""

    exit_status = 1
    shown_elsewhere = False
    """Whether another rank of the same run shows this error; this process then exits with the same status silently."""

    def __init__(
        self, message: str, *, where: str | None = None, available: Iterable[str] = (), fix: str | None = None
    ) -> None:
        self.problems: tuple[Problem, ...] = (Problem(message, where, tuple(available), fix),)
        super().__init__(message)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """Return one error that contains several problems."""
        return _rebuild(cls, tuple(problems))

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    # Loader workers and ranks send errors between processes, and Exception's own pickling drops keyword arguments.
    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problems))


class UserError(TransferError):
    """The user's input is wrong (exit status 2). It is shown as a panel, never as a traceback."""

    exit_status = 2


class ConfigError(UserError):
    """A config has one or more problems, all found before data or weights were loaded."""


class PluginError(UserError):
    """A plugin is unknown, ambiguous, cannot be imported or violates its contract."""


class DataError(UserError):
    """Data is missing, empty, unreadable or malformed."""


class WeightsError(UserError):
    """Pretrained weights or vectors are missing or do not fit the model."""


class RunError(UserError):
    """A run directory is missing, incomplete or was not written by this framework."""


class ExportError(UserError):
    """A model cannot be exported as requested, or the export does not reproduce the model's outputs."""


class TrainingError(TransferError):
    """Training cannot continue: the loss is not finite, or memory ran out."""


class MemoryRanOut(TrainingError):  # noqa: N818  # the name states the event
    """A batch did not fit into memory."""


class StoppedByObserver(TransferError):  # noqa: N818  # stopping is not a failure
    """An observer stopped the run after an epoch; its checkpoints stay, and it can be resumed."""


def _rebuild(cls: type[_E], problems: tuple[Problem, ...]) -> _E:
    # Not through __init__, which takes the parts of a single problem.
    error = cls.__new__(cls)
    error.problems = problems
    error.args = (problems[0].message,)
    return error


@contextmanager
def damaged(what: str, where: str, fix: str) -> Iterator[None]:
    """Convert any error inside the block to a RunError: the content may have been edited or damaged.

    Args:
        what: Failed operation, for the message (``the checkpoint cannot be read``).
        where: Path of the file or folder.
        fix: Instruction that solves the problem.

    Raises:
        RunError: The block raised an error that is not a TransferError; that error is the cause.
    """
    try:
        yield
    except TransferError:
        raise  # it names the problem better than the general message
    except Exception as error:  # parsing damaged content may raise anything
        raise RunError(f"{what}: {type(error).__name__}: {error}", where=where, fix=fix) from error


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most similar to a misspelled one, or None if none is similar."""
    # Names of plugins and options are lower-case; difflib compares case-sensitively.
    matches = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(
    what: str,
    name: str,
    names: Iterable[str],
    *,
    owner: str | None = None,
    where: str | None = None,
    fix: str | None = None,
) -> Problem:
    """Return the problem of an unknown name, with all valid names and the most similar one.

    Args:
        what: Kind of thing that is named, in the singular (``stage``, ``backbone``, ``option``).
        name: Unknown name.
        names: Valid names.
        owner: Thing that the names belong to (``backbone 'textcnn'``); None omits it from the message.
        where: Location of the unknown name: config line or file.
        fix: Instruction to show if no valid name is similar.
    """
    names = sorted(names)
    close = nearest(name, names)
    of_owner = f" of {owner}" if owner else ""
    return Problem(
        f"unknown {what} {name!r}{of_owner}", where, tuple(names), f"did you mean {close!r}?" if close else fix or None
    )
