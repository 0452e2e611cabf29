"""Commands that use a trained model: evaluate, predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transfer.cli.arguments import AsJSON, DataOverrides, Device, RunFolder
from transfer.errors import DataError

if TYPE_CHECKING:
    from transfer.training.events import Event

DIGITS = 6
"""Significant digits of predicted numbers: a regression may predict large values."""


def evaluate(
    run: RunFolder,
    overrides: DataOverrides = None,
    split: Annotated[str, typer.Option(help="Split to evaluate: train, validation or test.")] = "test",
    device: Device = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="Draw the most confident right and wrong predictions, and the least confident."),
    ] = False,
    old_images: Annotated[bool, typer.Option("--pictures", hidden=True)] = False,  # codespell:ignore
    as_json: AsJSON = False,
) -> None:
    """Print the metrics of a run's model on a split."""
    from transfer.cli.progress import RunConsole
    from transfer.cli.tables import facts_table
    from transfer.runs.evaluate import evaluate as evaluate_run
    from transfer.system.terminal import Console

    with RunConsole(Console(stderr=as_json)) as observe:
        metrics = evaluate_run(run, split, overrides or [], device=device, observe=observe)
    if as_json:
        print(json.dumps({split: metrics}))  # noqa: T201
    else:
        Console().print(facts_table({"split": split, **{name: repr(value) for name, value in metrics.items()}}))
    if images or old_images:
        from transfer.reports.preview import preview_predictions

        path = preview_predictions(run, split, device=device or "auto").path
        Console(stderr=as_json).print(f"predictions: {path}", markup=False, highlight=False, soft_wrap=True)


def predict(
    run: RunFolder,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Path, pattern of paths, text, or - for lines on standard input."),
    ],
    device: Device = None,
    as_json: AsJSON = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the effect of each word on the score, by leaving it out.")
    ] = False,
) -> None:
    """Predict inputs with a run's model."""
    from transfer.runs.predict import predict as predict_with

    predictions = predict_with(run, _lines(inputs), explain=explain, device=device, observe=_print_note)
    if as_json:
        for prediction in predictions:
            print(json.dumps(prediction, ensure_ascii=False), flush=True)  # noqa: T201
    elif explain:
        _print_explained(predictions)
    else:
        _print_table(predictions)


def _print_explained(predictions: Iterable[dict[str, Any]]) -> None:
    from transfer.cli.tables import explanation_text, facts_table
    from transfer.system.terminal import Console

    for prediction in predictions:
        explanation = prediction.pop("explanation")
        Console().print(facts_table(prediction, digits=DIGITS))
        Console().print(explanation_text(explanation))


def _print_table(predictions: Iterable[Mapping[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from transfer.system.formatting import format_value
    from transfer.system.terminal import Console

    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, prediction in enumerate(predictions):
        if not number:
            for name in prediction:
                table.add_column(name, overflow="fold")
        table.add_row(*(Text(format_value(value, digits=DIGITS)) for value in prediction.values()))
    Console().print(table)


def _print_note(event: Event) -> None:
    """Print a note on standard error, because standard output contains the predictions."""
    from transfer.system.terminal import Console
    from transfer.training.events import Note

    if isinstance(event, Note):
        Console(stderr=True).print(event.text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _lines(inputs: list[str]) -> Iterator[str]:
    """Yield the inputs, with ``-`` replaced by the lines of standard input that are not empty.

    Raises:
        DataError: A line is not UTF-8.
    """
    for source in inputs:
        if source != "-":
            yield source
            continue
        if isinstance(sys.stdin, TextIOWrapper):  # always UTF-8, like command-line arguments, whatever the locale is
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        for number, line in enumerate(sys.stdin, 1):
            # The error handler surrogateescape decodes an invalid byte to a character of this range.
            if any("\udc80" <= character <= "\udcff" for character in line):
                where = f"standard input, line {number}"
                raise DataError("the line is not UTF-8", where=where, fix="convert the input to UTF-8")
            if line.strip():
                yield line.rstrip("\n")
