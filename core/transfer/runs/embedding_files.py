"""Files of embeddings: Parquet, safetensors and NumPy."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from transfer.errors import UserError
from transfer.runs.prediction_files import arrow_columns, replaced_file, write_predictions

EMBEDDING_SUFFIXES = (".parquet", ".safetensors", ".npy")
EMBEDDING = "embedding"
"""Name of the column or tensor with the vectors."""


def write_embeddings(
    path: Path, embeddings: Iterable[tuple[Mapping[str, Any], Tensor | None]], columns: Sequence[str]
) -> tuple[int, ...]:
    """Write vectors and the names of their inputs to a file, a row each, in order. Return the shape (N, ...).

    A Parquet file has a column for each key of the rows, and the column ``embedding`` with null for an input without a
    vector. A safetensors file contains the tensor ``embedding`` and the rows as JSON in its metadata, under ``rows``.
    An .npy file contains the vectors, and ``PATH.csv`` the rows. In both, an input without a vector is a row of NaN.

    Args:
        path: File to write; its suffix is the format (:data:`EMBEDDING_SUFFIXES`).
        embeddings: Rows and vectors of :meth:`transfer.Predictor.embeddings`. They are collected in memory.
        columns: Keys of the rows, in the order of the columns.

    Raises:
        UserError: There is no vector, or a column has the name of that of the vectors.
    """
    if EMBEDDING in columns:
        raise UserError(f"the column {EMBEDDING!r} cannot be kept: it is that of the vectors", where="--keep")
    rows, vectors = list[dict[str, Any]](), list[Tensor | None]()
    for row, vector in embeddings:
        rows.append({name: row.get(name) for name in columns})
        vectors.append(vector)
    present = [vector for vector in vectors if vector is not None]
    if not present:
        raise UserError(
            f"there is nothing to write: none of the {len(rows):,} inputs has a vector",
            where=str(path),
            fix="see the error of each input with --on-error fail",
        )
    empty = torch.full_like(present[0], float("nan"))
    values = torch.stack([empty if vector is None else vector for vector in vectors])
    suffix = path.suffix.lower()
    with replaced_file(path) as temporary:
        if suffix == ".parquet":
            _write_parquet(temporary, rows, columns, values, [vector is None for vector in vectors])
        elif suffix == ".safetensors":
            metadata = {"rows": json.dumps(rows, ensure_ascii=False, default=str)}
            save_file({EMBEDDING: values.contiguous()}, temporary, metadata=metadata)
        else:
            with temporary.open("wb") as file:
                np.save(file, values.numpy())
    if suffix == ".npy":
        write_predictions(path.with_name(f"{path.name}.csv"), rows, columns)
    return tuple(values.shape)


def _write_parquet(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], values: Tensor, missing: Sequence[bool]
) -> None:
    """Write a table whose vectors are lists of numbers; those of images (C, H, W) are flattened in this order."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    table = arrow_columns({name: [row[name] for row in rows] for name in columns})
    present = ~np.array(missing)
    flat = values[torch.from_numpy(present)].flatten(1).numpy()
    ends = np.cumsum(present, dtype=np.int64) * flat.shape[1]
    # Row i is the list from offset i to offset i + 1, or null if offset i is null. Parquet has no null lists of a fixed
    # size.
    offsets = arrow.array(np.append(0, ends), mask=np.append(~present, False))
    vectors = arrow.LargeListArray.from_arrays(offsets, arrow.array(flat.reshape(-1)))
    table[EMBEDDING] = vectors
    parquet.write_table(arrow.table(table), path)
