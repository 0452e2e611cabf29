"""Commands for the features of a model: embed, neighbors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from transfer.cli.arguments import AsJSON, Device, RunFolder
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


def embed(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run directory, or a config (.yaml) for its pretrained backbone.")
    ],
    inputs: Inputs,
    output: Annotated[
        Path,
        typer.Option("--output", show_default=False, help="File to write: .parquet, .safetensors or .npy."),
    ],
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage", show_default=False, help="Stage whose output to write. Default: the features before the head."
        ),
    ] = None,
    column: Column = None,
    keep: Keep = [],  # noqa: B006  # typer copies it
    on_error: OnErrorOption = "skip",
    device: Device = None,
) -> None:
    """Write a vector for each input: the features of a run's model, or of a pretrained backbone."""
    from transfer.cli.tables import unanswered_text
    from transfer.runs.embedding_files import EMBEDDING_SUFFIXES, write_embeddings
    from transfer.runs.prediction_files import check_output
    from transfer.runs.pretrained_predictor import load_run_or_config
    from transfer.system.terminal import Console

    refuse_keep_without_column(keep, column)
    check_output(output, EMBEDDING_SUFFIXES)
    predictor = load_run_or_config(run, device=device, observe=print_note)
    without_vector: list[dict[str, Any]] = []
    total = 0

    def count(embeddings: Iterable[tuple[dict[str, Any], Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
        nonlocal total
        for row, vector in embeddings:
            total += 1
            if vector is None:
                without_vector.append(row)
            yield row, vector

    read = read_inputs(inputs, predictor.preprocessing, column, keep)
    started = time.perf_counter()
    try:
        shape = write_embeddings(
            output,
            count(predictor.embeddings(read, stage, on_error)),
            predictor.embedding_columns(keep, location_columns(inputs, column)),
        )
        rate = total / max(time.perf_counter() - started, 1e-9)
        failed = sum("error" in row for row in without_vector)
        size = " x ".join(f"{length:,}" for length in shape[1:])
        line = f"{output}: {total:,} vectors of {size}, {failed:,} failed, {rate:,.0f} per second"
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    finally:
        if without_vector:
            Console(stderr=True).print(unanswered_text(without_vector, total), soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def neighbors(
    run: RunFolder,
    queries: Annotated[
        list[str],
        typer.Argument(metavar="QUERY", help="Path of a file or folder, pattern of paths, text, or - for lines."),
    ],
    k: Annotated[int, typer.Option("--k", min=1, help="Number of neighbors of each query.")] = 5,
    column: Column = None,
    device: Device = None,
    as_json: AsJSON = False,
) -> None:
    """Find the training examples of a run that are nearest to each query, by the cosine of their features."""
    from transfer.cli.tables import neighbors_table
    from transfer.runs.neighbors import neighbors_of_inputs
    from transfer.runs.predictor import load
    from transfer.system.terminal import Console

    predictor = load(run, device=device, observe=print_note)
    read = list(read_inputs(queries, predictor.preprocessing, column))
    for answer in neighbors_of_inputs(run, predictor, read, k=k, observe=print_note):
        if as_json:
            print(json.dumps(answer, ensure_ascii=False))  # noqa: T201
        else:
            Console().print(neighbors_table(answer))
