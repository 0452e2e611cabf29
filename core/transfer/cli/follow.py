"""Functions that run training with progress on the console, and print its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from transfer.runs.train import Run
    from transfer.training.events import Observer

_T = TypeVar("_T")


def follow_run(start: Callable[[Observer], Run]) -> None:
    """Train a run with progress on the console, and print the commands to continue with."""
    from transfer.system.formatting import quote_for_shell
    from transfer.system.ranks import rank_from_environment
    from transfer.system.terminal import Console

    run = _with_progress(start)
    # Only rank 0 prints: the ranks of a launch share one terminal.
    if rank_from_environment().index:
        return
    folder = quote_for_shell(run.folder)
    next_line = f"next: transfer predict {folder} INPUT..."
    splits = run.summary["examples"]
    if "test" in splits:
        next_line += f"   or   transfer evaluate {folder}"
    elif "validation" in splits:
        next_line += f"   or   transfer evaluate {folder} --split validation"
    lines = [next_line]
    if (report := run.folder / "report.html").is_file():
        lines.append(f"report: {report}")
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
    _print_folder(run.folder)


def follow_seeds(start: Callable[[Observer], Run]) -> None:
    """Train several seeds with progress on the console, and print mean and standard deviation of the metrics."""
    from transfer.cli.tables import seeds_table

    _follow(start, seeds_table)


def follow_folds(start: Callable[[Observer], Run]) -> None:
    """Train the folds of a cross-validation with progress on the console, and print the metrics over the folds."""
    from transfer.cli.tables import folds_table

    _follow(start, folds_table)


def follow_arms(start: Callable[[Observer], Run]) -> None:
    """Train the arms of a comparison with progress on the console, and print the gain of pretraining."""
    from transfer.cli.tables import pretraining_gain_table

    _follow(start, pretraining_gain_table)


def _follow(start: Callable[[Observer], Run], table: Callable[[Mapping[str, Any]], RenderableType]) -> None:
    from transfer.system.terminal import Console

    run = _with_progress(start)
    Console().print(table(run.summary))
    _print_folder(run.folder)


def _print_folder(folder: Path) -> None:
    """Print a folder as the last line, without style, so that a script can read it."""
    from transfer.system.terminal import printable

    print(printable(str(folder)))  # noqa: T201


def _with_progress(start: Callable[[Observer], _T]) -> _T:
    """Return the result of a function whose events are shown on the console. Exit with 130 or 143 if interrupted."""
    from transfer.cli.progress import RunConsole
    from transfer.system.ranks import rank_from_environment
    from transfer.system.signals import Interrupted
    from transfer.system.terminal import Console

    try:
        with RunConsole(Console(quiet=rank_from_environment().index > 0)) as observe:
            return start(observe)
    except Interrupted as interruption:
        # Typer would convert a KeyboardInterrupt to status 1 or 130, whatever the signal was.
        raise typer.Exit(interruption.exit_status) from interruption
