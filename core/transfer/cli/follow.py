"""Running a function while its events are shown on the console."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from transfer.runs.train import Run
    from transfer.training.events import Observer

_T = TypeVar("_T")


def follow_run(start: Callable[[Observer], Run]) -> None:
    """Show a run as it goes and say what comes next."""
    from transfer.system.ranks import rank_from_environment
    from transfer.system.terminal import Console, printable

    ended = _shown(start)
    if rank_from_environment().index:
        return
    Console().print(
        f"next: transfer predict {ended.folder} INPUT...   or   transfer evaluate {ended.folder}",
        highlight=False,
        soft_wrap=True,
    )
    if (report := ended.folder / "report.html").is_file():
        Console().print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)
    print(printable(str(ended.folder)))  # noqa: T201  # plain, so that a script can take the last line


def follow_seeds(start: Callable[[Observer], Run]) -> None:
    """Show runs as they go, then mean and spread."""
    from transfer.cli.tables import seeds_table
    from transfer.system.terminal import Console, printable

    ended = _shown(start)
    Console().print(seeds_table(ended.summary))
    print(printable(str(ended.folder)))  # noqa: T201  # plain, so that a script can take the last line


def follow_arms(start: Callable[[Observer], Run]) -> None:
    """Show the arms as they go, then what pretraining is worth."""
    from transfer.cli.tables import value_table
    from transfer.system.terminal import Console, printable

    ended = _shown(start)
    Console().print(value_table(ended.summary))
    print(printable(str(ended.folder)))  # noqa: T201  # plain, so that a script can take the last line


def _shown(start: Callable[[Observer], _T]) -> _T:
    """Show training as it goes, or leave with 130 or 143 where it was interrupted."""
    from transfer.cli.progress import RunConsole
    from transfer.system.ranks import rank_from_environment
    from transfer.system.signals import Interrupted
    from transfer.system.terminal import Console

    try:
        with RunConsole(Console(quiet=rank_from_environment().index > 0)) as observe:
            return start(observe)
    except Interrupted as interruption:
        # Typer would make a 1 or 130 of it.
        raise typer.Exit(interruption.exit_status) from interruption
