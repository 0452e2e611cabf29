"""Files of predictions: CSV, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transfer.errors import UserError
from transfer.runs.answers import flat
from transfer.system.formatting import quote_for_shell

PREDICTION_SUFFIXES = (".csv", ".jsonl", ".parquet")


def check_output(path: Path, suffixes: Sequence[str] = PREDICTION_SUFFIXES) -> None:
    """Refuse an output file before anything is computed for it.

    Args:
        path: File to write.
        suffixes: Suffixes of the available formats.

    Raises:
        UserError: The suffix is none of a format, the path is a folder, or a library for the format is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise UserError(
            f"the format of the output is unknown: expected a suffix that is available, got {suffix or 'none'}",
            where=str(path),
            available=suffixes,
            fix=f"write --output {quote_for_shell(path.with_suffix(suffixes[0]))}, for example",
        )
    if path.is_dir():
        raise UserError("the output is a folder: expected a file", where=str(path))
    if suffix == ".parquet":
        _pyarrow(path)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of a file, which replaces the file if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_predictions(path: Path, answers: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write answers to a file, a row each, in order. The file appears when it is complete.

    Args:
        path: File to write; its suffix is the format (:data:`PREDICTION_SUFFIXES`).
        answers: Answers of :meth:`transfer.Predictor.answers`.
        columns: Columns of a CSV or Parquet file. A line of JSON Lines contains the answer itself.

    Raises:
        UserError: pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    with replaced_file(path) as temporary:
        if suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                for answer in answers:
                    file.write(json.dumps(answer, ensure_ascii=False, default=str) + "\n")
        elif suffix == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                for answer in answers:
                    writer.writerow({name: _cell(value) for name, value in flat(answer).items()})
        else:
            _write_parquet(temporary, answers, columns)


def _cell(value: Any) -> Any:
    """Return a value as the text of a cell; a list of labels is JSON, which datasets of texts and images read."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def _write_parquet(path: Path, answers: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    arrow, parquet = _pyarrow(path), importlib.import_module("pyarrow.parquet")
    # The type of a column that a user keeps is known only when all rows are: they are collected.
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for answer in answers:
        row = flat(answer)
        for name in columns:
            values[name].append(row.get(name))
    table = {}
    for name, column in values.items():
        try:
            table[name] = arrow.array(column, arrow.string() if all(value is None for value in column) else None)
        except (ValueError, TypeError):  # values of several types, or dicts
            table[name] = arrow.array([None if value is None else str(_cell(value)) for value in column])
    parquet.write_table(arrow.table(table), path)


def _pyarrow(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError(
            "Parquet files need the library `pyarrow`, which is not installed",
            where=str(path),
            fix="pip install 'transferkit[huggingface]', or write a .csv or .jsonl file",
        ) from error
