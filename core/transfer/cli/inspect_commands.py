"""Commands that use a trained model: evaluate, predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Annotated

import typer

from transfer.cli.arguments import AsJSON, RunFolder
from transfer.errors import DataError


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw predictions that are right, wrong and least sure.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Score a split with a run's model."""
    from transfer.cli.progress import RunConsole
    from transfer.cli.tables import facts_table
    from transfer.runs.evaluate import evaluate as evaluate_run
    from transfer.system.terminal import Console

    with RunConsole(Console(stderr=as_json)) as observe:
        metrics = evaluate_run(run, split, observe=observe)
    if as_json:
        print(json.dumps({split: metrics}))  # noqa: T201
    else:
        Console().print(facts_table({"split": split, **{name: repr(value) for name, value in metrics.items()}}))
    if pictures:
        from transfer.reports.preview import preview_predictions

        Console(stderr=as_json).print(
            f"predictions: {preview_predictions(run, split).path}", highlight=False, soft_wrap=True
        )


def predict(
    run: RunFolder,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="A path, a pattern, a text, or - for lines on standard input."),
    ],
    as_json: AsJSON = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show which words moved the score, by leaving out one at a time.")
    ] = False,
) -> None:
    """Say what a run's model makes of some inputs."""
    from rich.table import Table
    from rich.text import Text

    from transfer.cli.tables import explanation_text, facts_table
    from transfer.runs.predict import predict as predict_with
    from transfer.system.terminal import Console

    if as_json:
        for answer in predict_with(run, _lines(inputs), explain=explain):
            print(json.dumps(answer, ensure_ascii=False), flush=True)  # noqa: T201
        return
    if explain:
        for answer in predict_with(run, _lines(inputs), explain=True):
            explanation = answer.pop("explanation")
            Console().print(facts_table({name: _cell(value) for name, value in answer.items()}))
            Console().print(explanation_text(explanation))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, answer in enumerate(predict_with(run, _lines(inputs))):
        if not number:
            for name in answer:
                table.add_column(name, overflow="fold")
        table.add_row(*(Text(_cell(value)) for value in answer.values()))
    Console().print(table)


def _lines(inputs: list[str]) -> Iterator[str]:
    for source in inputs:
        if source == "-":
            if isinstance(sys.stdin, TextIOWrapper):  # read as arguments are, whatever the locale says
                sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
            for number, line in enumerate(sys.stdin, 1):
                if any("\udc80" <= character <= "\udcff" for character in line):  # how a byte that is none is read
                    where = f"standard input, line {number}"
                    raise DataError("this line is not UTF-8", where=where, fix="give lines in UTF-8")
                if line.strip():
                    yield line.rstrip("\n")
        else:
            yield source


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return "  ".join(f"{name} {_cell(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
