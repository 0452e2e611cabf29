"""Commands for a complete run: evaluate, predict, clean."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from transfer.cli.arguments import AsJSON, DataOverrides, Device, RunFolder
from transfer.cli.input_arguments import (
    Column,
    Inputs,
    Keep,
    OnErrorOption,
    location_columns,
    print_note,
    read_inputs,
    refuse_keep_without_column,
)
from transfer.errors import Problem, UserError


def evaluate(
    run: RunFolder,
    overrides: DataOverrides = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split to evaluate: train, validation or test. Default: test, or all examples of data without splits.",
            show_default=False,
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="DATA",
            show_default=False,
            help="Other labeled data: a table, a folder, or a block such as 'data: {name: text_csv, train: new.csv}'.",
        ),
    ] = None,
    device: Device = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="Draw the most confident right and wrong predictions, and the least confident."),
    ] = False,
    old_images: Annotated[bool, typer.Option("--pictures", hidden=True)] = False,  # codespell:ignore
    as_json: AsJSON = False,
) -> None:
    """Print the metrics of a run's model on a split of its data, or on other labeled data."""
    from transfer.cli.progress import RunConsole
    from transfer.cli.tables import facts_table
    from transfer.runs.evaluate import evaluate as evaluate_run
    from transfer.system.terminal import Console

    if on is not None and (images or old_images):
        raise UserError("--on and --images exclude each other: predictions are drawn for the data of the run")
    with RunConsole(Console(stderr=as_json)) as observe:
        metrics = evaluate_run(run, split, overrides or [], on=on, device=device, observe=observe)
    scored = {"split": split or "test"} if on is None else {"data": on}
    if as_json:
        print(json.dumps({next(iter(scored.values())): metrics}))  # noqa: T201
    else:
        Console().print(facts_table({**scored, **{name: repr(value) for name, value in metrics.items()}}))
    if images or old_images:
        from transfer.reports.preview import preview_predictions

        path = preview_predictions(run, split or "test", device=device or "auto").path
        Console(stderr=as_json).print(f"predictions: {path}", markup=False, highlight=False, soft_wrap=True)


def predict(
    run: RunFolder,
    inputs: Inputs,
    column: Column = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            show_default=False,
            help="File to write instead of a table: .csv, .jsonl or .parquet, with the probability of every class.",
        ),
    ] = None,
    keep: Keep = [],  # noqa: B006  # typer copies it
    on_error: OnErrorOption = "skip",
    device: Device = None,
    as_json: AsJSON = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the effect of each word on the score, by leaving it out.")
    ] = False,
) -> None:
    """Predict inputs with a run's model."""
    from transfer.cli.tables import unanswered_text, unknown_text
    from transfer.runs.prediction_files import check_output, write_predictions
    from transfer.runs.predictor import load
    from transfer.system.terminal import Console

    refuse_keep_without_column(keep, column)
    if output is not None and as_json:
        raise UserError("--output and --json exclude each other", fix="write a .jsonl file by --output, without --json")
    if output is not None:
        check_output(output)
    predictor = load(run, device=device, observe=print_note)
    read = read_inputs(inputs, predictor.preprocessing, column, keep)
    unanswered: list[dict[str, Any]] = []
    partly_unknown: list[dict[str, Any]] = []
    total = 0

    def count(answers: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        nonlocal total
        for answer in answers:
            total += 1
            if "error" in answer or "note" in answer:
                unanswered.append(answer)
            elif "unknown_fraction" in answer:
                partly_unknown.append(answer)
            yield answer

    answers = count(predictor.answers(read, explain=explain, on_error=on_error, all_probabilities=output is not None))
    if output is not None:
        columns = predictor.columns(keep, location_columns(inputs, column)) + (["explanation"] if explain else [])
        started = time.perf_counter()
        write_predictions(output, answers, columns)
        rate = total / max(time.perf_counter() - started, 1e-9)
        failed = sum("error" in answer for answer in unanswered)
        line = f"{output}: {total:,} predictions, {failed:,} failed, {rate:,.0f} per second"
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    elif as_json:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False), flush=True)  # noqa: T201
    elif explain:
        _print_explained(answers)
    else:
        _print_table(answers)
    if partly_unknown and not as_json:
        Console(stderr=True).print(unknown_text(partly_unknown, total), soft_wrap=True)
    if unanswered:
        Console(stderr=True).print(unanswered_text(unanswered, total), soft_wrap=True)
    if any("error" in answer for answer in unanswered):
        raise typer.Exit(2)


def _print_explained(answers: Iterable[dict[str, Any]]) -> None:
    from transfer.cli.tables import NOT_IN_TABLE, explanation_text, facts_table, prediction_cell
    from transfer.system.terminal import Console

    for answer in answers:
        explanation = answer.pop("explanation", None)
        shown = {name: prediction_cell(name, value) for name, value in answer.items() if name not in NOT_IN_TABLE}
        Console().print(facts_table(shown))
        Console().print("" if explanation is None else explanation_text(explanation))


def _print_table(answers: Iterator[dict[str, Any]]) -> None:
    from transfer.cli.tables import predictions_table
    from transfer.system.terminal import Console

    complete: list[dict[str, Any]] = []
    try:
        complete.extend(answers)
    finally:
        # With --on-error fail, the predictions before the error are printed too.
        if any("error" not in answer for answer in complete):
            Console().print(predictions_table(complete))


def clean(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories of complete runs.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sizes of the checkpoints without removing them.")
    ] = False,
) -> None:
    """Remove the checkpoints of complete runs. Their models and results stay."""
    from transfer.runs.clean import clean as clean_run
    from transfer.system.terminal import Console

    problems: list[Problem] = []
    for run in runs:
        try:
            megabytes = clean_run(run, dry_run=dry_run) / 1e6
        except UserError as error:
            problems += error.problems
            continue
        line = f"{run}: {'would free' if dry_run else 'freed'} {megabytes:,.1f} MB"
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise UserError.of(problems)
