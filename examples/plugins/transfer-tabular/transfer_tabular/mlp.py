"""An MLP backbone over rows of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transfer import Backbone, DataError, FeatureSpec, Preprocessing

Row = Mapping[str, Any]


class Columns(NamedTuple):
    """Statistics of the training split by column.

    Args:
        numbers: Mean and standard deviation of each numeric column.
        categories: Embedding index of each category, by column. Indices start at 1; 0 is missing or unknown.
    """

    numbers: Mapping[str, Sequence[float]]
    categories: Mapping[str, Mapping[str, int]]


def learn(rows: Sequence[Row]) -> Columns:
    """Return the statistics of the columns. A column is numeric if all non-empty cells are finite numbers."""
    numbers: dict[str, Sequence[float]] = {}
    categories: dict[str, dict[str, int]] = {}
    used = 0  # all categories share one embedding table, so their indices continue from column to column
    for column in rows[0]:
        cells = [cell for row in rows if (cell := _cell(row, column))[0]]
        values = np.array([number for _, number in cells])
        if len(values) and np.isfinite(values).all():
            numbers[column] = [float(values.mean()), float(values.std()) or 1.0]  # a constant column is not scaled
        else:
            names = sorted({text for text, _ in cells})
            categories[column] = {name: index for index, name in enumerate(names, used + 1)}
            used += len(names)
    return Columns(numbers, categories)


def _cell(row: Row, column: str) -> tuple[str, float]:
    """Return the text of a cell and its numeric value, NaN if it is not a number."""
    if column not in row:
        raise ValueError(f"the row has no column {column!r}")
    text = str(row[column]).strip()
    try:
        return text, float(text)
    except ValueError:
        return text, math.nan


class RowPreprocessing(Preprocessing):
    """Standardize numbers, with a missing-value indicator each, and map categories to embedding indices."""

    encode_once = True

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def encode(self, values: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
        """Return for each row its numbers, float32 (2 N,), and its categories, int64 (C,).

        Each number is followed by 1 if it is missing and 0 otherwise. Missing and unknown categories are 0.
        """
        return [(self._numbers(row), self._categories(row)) for row in values]

    def _numbers(self, row: Row) -> Tensor:
        numbers: list[float] = []
        for column, (mean, deviation) in self.columns.numbers.items():
            text, number = _cell(row, column)
            if text and not math.isfinite(number):
                raise ValueError(f"column {column!r} is not a number: got {text!r}")
            numbers += [(number - mean) / deviation, 0.0] if text else [0.0, 1.0]
        return torch.tensor(numbers)

    def _categories(self, row: Row) -> Tensor:
        indices = [names.get(_cell(row, column)[0], 0) for column, names in self.columns.categories.items()]
        return torch.tensor(indices, dtype=torch.int64)

    def read(self, source: str) -> Row:
        """Return the row that a JSON object describes."""
        try:
            return dict(json.loads(source))
        except (ValueError, TypeError) as error:
            raise DataError(f"{source!r} is not a JSON object", fix='write {"column": value, ...}') from error

    def read_bytes(self, content: bytes) -> Row:
        """Return the row in the body of a request to the server."""
        return self.read(content.decode())

    def example(self) -> Row:
        """Return a row with the mean of each number and missing categories."""
        means = {column: mean for column, (mean, _) in self.columns.numbers.items()}
        return means | dict.fromkeys(self.columns.categories, "")

    def describe(self) -> Mapping[str, Any]:
        """Return the statistics of the columns."""
        return self.columns._asdict()


class SideBySide(nn.Module):
    """Concatenate the numbers and the embedded categories of a row.

    Args:
        columns: Statistics of the columns.
        embedding: Size of the embedding of a category.
    """

    def __init__(self, columns: Columns, embedding: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1 + sum(map(len, columns.categories.values())), embedding)
        self.size = 2 * len(columns.numbers) + embedding * len(columns.categories)

    def forward(self, row: tuple[Tensor, Tensor]) -> Tensor:
        """Map numbers (B, 2 N) and categories (B, C) to (B, size)."""
        numbers, categories = row
        return torch.cat([numbers, self.table(categories).flatten(1)], dim=1)


class TabularMLP(Backbone):
    """MLP with batch norm, ReLU and dropout over the numbers and embedded categories of a row.

    Column types, means, standard deviations and categories are learned from the training split.

    Args:
        width: Size of each layer and of the features.
        layers: Number of layers.
        embedding: Size of the embedding of a category.
        dropout: Dropout probability after each layer.
    """

    field = "row"

    def __init__(
        self,
        columns: Columns | None = None,  # None before the training data is read, for example in `transfer check`
        *,
        width: Annotated[int, Field(ge=1)] = 64,
        layers: Annotated[int, Field(ge=1)] = 2,
        embedding: Annotated[int, Field(ge=1)] = 8,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        self._columns = columns or Columns({"number": [0.0, 1.0]}, {"category": {"one": 1}})
        first = SideBySide(self._columns, embedding)
        stages: dict[str, nn.Module] = {"columns": first}
        for number in range(layers):
            linear = nn.Linear(width if number else first.size, width)
            stages[f"layer{number + 1}"] = nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
        super().__init__(stages)
        self._width = width

    @property
    def features(self) -> FeatureSpec:
        """A vector per row."""
        return FeatureSpec("vector", self._width)

    @property
    def preprocessing(self) -> RowPreprocessing:
        """Preprocessing with the statistics of the training split."""
        return RowPreprocessing(self._columns)

    @classmethod
    def from_data(cls, values: Sequence[Any], **options: Any) -> Self:
        """Build the backbone with the column statistics of the training split."""
        return cls(learn(values), **options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Restore the backbone with its saved column statistics."""
        return cls(Columns(**json.loads(assets["columns.json"])), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the statistics of the columns as JSON."""
        return {"columns.json": json.dumps(self._columns._asdict())}
