"""Arguments of the commands that read inputs for a model: texts, files, folders, tables, standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from transfer.errors import UserError

if TYPE_CHECKING:
    from transfer.interfaces import Preprocessing
    from transfer.runs.inputs import Input
    from transfer.training.events import Event

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Path of a file or folder, pattern of paths, text, or - for lines on standard input: each is a text, "
        "or the path of an image.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        "--column", show_default=False, help="Column with the inputs: every file is a table, and each row an input."
    ),
]
Keep = Annotated[
    list[str],
    typer.Option("--keep", show_default=False, help="Column of the table to repeat in the answers. Repeatable."),
]
OnErrorOption = Annotated[
    Literal["fail", "skip"],
    typer.Option(
        "--on-error",
        help="Whether to stop at the first input that cannot be read (fail), or to predict the others and list "
        "it (skip). The exit status is 2 in both cases.",
    ),
]


def refuse_keep_without_column(keep: Sequence[str], column: str | None) -> None:
    """Refuse columns to keep without a table.

    Raises:
        UserError: There are columns to keep and no column with the inputs.
    """
    if keep and column is None:
        raise UserError("--keep needs a table: name the column with the inputs by --column", where="--keep")


def read_inputs(
    arguments: Sequence[str], preprocessing: Preprocessing, column: str | None = None, keep: Sequence[str] = ()
) -> Iterator[Input]:
    """Yield the inputs that the arguments of a command name."""
    from transfer.runs.inputs import argument_inputs, line_inputs

    for argument in arguments:
        if argument == "-":
            yield from line_inputs(_standard_input(), preprocessing)
        else:
            yield from argument_inputs(argument, preprocessing, column, keep)


def location_columns(arguments: Sequence[str], column: str | None) -> list[str]:
    """Return the keys of the location that the inputs of a command have."""
    return (["file"] if column is not None else []) + (["line"] if column is not None or "-" in arguments else [])


def print_note(event: Event) -> None:
    """Print a note on standard error, because standard output contains the predictions."""
    from transfer.system.terminal import Console
    from transfer.training.events import Note

    if isinstance(event, Note):
        Console(stderr=True).print(event.text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _standard_input() -> Iterable[str]:
    """Return the lines of standard input, decoded as UTF-8 like command-line arguments, whatever the locale is."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin
