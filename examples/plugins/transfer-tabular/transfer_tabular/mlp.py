"""A backbone over rows of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transfer import Backbone, DataError, FeatureSpec, Preprocessing

Columns = Mapping[str, list[Any]]
"""Of a column of numbers its mean and standard deviation; of one of categories their names."""


def _value(cell: Any) -> float | None:
    """Return the number in a cell, and None where there is none."""
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def learn(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Tell columns of numbers from those of categories, and say what the numbers or the categories are."""
    columns = {}
    for name in rows[0]:
        cells = [str(row[name]).strip() for row in rows if str(row[name]).strip()]
        numbers = [number for number in map(_value, cells) if number is not None]
        if numbers and len(numbers) == len(cells):
            columns[name] = [float(np.mean(numbers)), float(np.std(numbers)) or 1.0]
        else:
            columns[name] = sorted(set(cells))
    return columns


class RowPreprocessing(Preprocessing):
    """Each cell as two numbers: the standardised number or the category's index, 0 where unknown; and 1 where missing."""

    encode_once = True

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def encode(self, values: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Return float32 (number of columns, 2) for each row."""
        return [torch.tensor([self._cell(row, name) for name in self.columns]) for row in values]

    def _cell(self, row: Mapping[str, Any], name: str) -> tuple[float, float]:
        if name not in row:
            raise ValueError(f"the row has no column {name!r}")
        known, cell = self.columns[name], str(row[name]).strip()
        if is_category(known):
            return (known.index(cell) + 1 if cell in known else 0), not cell
        if (number := _value(cell)) is None:
            if cell:
                raise ValueError(f"column {name!r} holds {cell!r}, which is no number")
            return 0.0, 1.0
        return (number - known[0]) / known[1], 0.0

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return float32 (B, number of columns, 2)."""
        return torch.stack(list(encoded))

    def read(self, source: str) -> dict[str, Any]:
        """Read a row as a JSON object."""
        try:
            row = json.loads(source)
        except ValueError as error:
            raise DataError(f"{source!r} is no JSON object", fix='write {"column": value, ...}') from error
        if not isinstance(row, dict):
            raise DataError(f"{source!r} is no JSON object", fix='write {"column": value, ...}')
        return row

    def example(self) -> dict[str, Any]:
        """Return a row of means and first categories."""
        return {name: known[0] if known else "" for name, known in self.columns.items()}

    def describe(self) -> Mapping[str, Any]:
        """Return the columns."""
        return {"columns": dict(self.columns)}


def is_category(known: Sequence[Any]) -> bool:
    """Tell a column's categories from its mean and standard deviation."""
    return not known or isinstance(known[0], str)


class ColumnsIn(nn.Module):
    """Columns side by side: a number and whether it is missing, or the embedding of a category."""

    def __init__(self, columns: Columns, size: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(len(k) + 1, size) for k in columns.values() if is_category(k))
        categories = [is_category(known) for known in columns.values()]
        self.numbers = [place for place, category in enumerate(categories) if not category]
        self.categories = [place for place, category in enumerate(categories) if category]
        self.size = 2 * len(self.numbers) + size * len(self.categories)

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, size) of (B, number of columns, 2)."""
        tables = zip(self.tables, self.categories, strict=True)
        embedded = [table(rows[:, place, 0].long()) for table, place in tables]
        return torch.cat([rows[:, self.numbers].flatten(1), *embedded], dim=1)


class TabularMLP(Backbone):
    """Layers of a linear map, batch norm, ReLU and dropout over a row's numbers and embedded categories.

    What is a number and what a category, means, deviations and categories are learned from the training split.

    Args:
        width: Size of each layer, and of the features.
        layers: How many.
        embedding: Size of a category's embedding.
        dropout: Of each layer.
    """

    field = "row"

    def __init__(
        self,
        columns: Columns | None = None,
        *,
        width: Annotated[int, Field(ge=1)] = 64,
        layers: Annotated[int, Field(ge=1)] = 2,
        embedding: Annotated[int, Field(ge=1)] = 8,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        self._columns = (
            {"number": [0.0, 1.0], "category": ["one"]} if columns is None else columns
        )  # until data is seen
        first = ColumnsIn(self._columns, embedding)
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
        """As the training split's columns are."""
        return RowPreprocessing(self._columns)

    @classmethod
    def from_data(cls, values: Sequence[Any], **options: Any) -> Self:
        """Learn the columns."""
        return cls(learn(values), **options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Take the columns as they were learned."""
        return cls(json.loads(assets["columns.json"]), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the columns."""
        return {"columns.json": json.dumps(self._columns)}
