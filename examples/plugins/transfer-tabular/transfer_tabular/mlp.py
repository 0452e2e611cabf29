"""A backbone over rows of a table."""

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
    """What the training split says of columns: mean and deviation of numbers, or each category's place, from 1 on."""

    numbers: Mapping[str, Sequence[float]]
    categories: Mapping[str, Mapping[str, int]]


def learn(rows: Sequence[Row]) -> Columns:
    """Tell columns of numbers from those of categories; what is empty is missing."""
    numbers: dict[str, Sequence[float]] = {}
    categories: dict[str, dict[str, int]] = {}
    places = 0
    for column in rows[0]:
        cells = [cell for row in rows if (cell := _cell(row, column))[0]]
        found = np.array([number for _, number in cells])
        if len(found) and np.isfinite(found).all():
            numbers[column] = [float(found.mean()), float(found.std()) or 1.0]
        else:
            names = sorted({text for text, _ in cells})
            categories[column] = {name: place for place, name in enumerate(names, places + 1)}
            places += len(names)
    return Columns(numbers, categories)


def _cell(row: Row, column: str) -> tuple[str, float]:
    """Return what stands in a cell, and the number that it is: "not a number" where it is none."""
    if column not in row:
        raise ValueError(f"the row has no column {column!r}")
    text = str(row[column]).strip()
    try:
        return text, float(text)
    except ValueError:
        return text, math.nan


class RowPreprocessing(Preprocessing):
    """Numbers, standardised, each with whether it is missing; and places of categories, 0 where unknown or missing."""

    encode_once = True

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def encode(self, values: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
        """Return for each row float32 (2 N,) of its numbers and int64 (C,) of its categories."""
        return [(self._numbers(row), self._categories(row)) for row in values]

    def _numbers(self, row: Row) -> Tensor:
        found: list[float] = []
        for column, (mean, deviation) in self.columns.numbers.items():
            text, number = _cell(row, column)
            if text and not math.isfinite(number):
                raise ValueError(f"column {column!r} holds {text!r}, which is no number")
            found += [(number - mean) / deviation, 0.0] if text else [0.0, 1.0]
        return torch.tensor(found)

    def _categories(self, row: Row) -> Tensor:
        places = [known.get(_cell(row, column)[0], 0) for column, known in self.columns.categories.items()]
        return torch.tensor(places, dtype=torch.int64)

    def read(self, source: str) -> Row:
        """Read a row as a JSON object."""
        try:
            return dict(json.loads(source))
        except (ValueError, TypeError) as error:
            raise DataError(f"{source!r} is no JSON object", fix='write {"column": value, ...}') from error

    def read_bytes(self, content: bytes) -> Row:
        """Read the same from what a server was sent."""
        return self.read(content.decode())

    def example(self) -> Row:
        """Return a row of means and of categories that are missing."""
        means = {column: mean for column, (mean, _) in self.columns.numbers.items()}
        return means | dict.fromkeys(self.columns.categories, "")

    def describe(self) -> Mapping[str, Any]:
        """Return the columns."""
        return self.columns._asdict()


class SideBySide(nn.Module):
    """Numbers (B, 2 N), and categories (B, C) embedded, side by side."""

    def __init__(self, columns: Columns, embedding: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1 + sum(map(len, columns.categories.values())), embedding)
        self.size = 2 * len(columns.numbers) + embedding * len(columns.categories)

    def forward(self, row: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, size)."""
        numbers, places = row
        return torch.cat([numbers, self.table(places).flatten(1)], dim=1)


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
        columns: Columns | None = None,  # None until data is seen
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
        """As the training split's columns are."""
        return RowPreprocessing(self._columns)

    @classmethod
    def from_data(cls, values: Sequence[Any], **options: Any) -> Self:
        """Learn the columns."""
        return cls(learn(values), **options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Take the columns as they were learned."""
        return cls(Columns(**json.loads(assets["columns.json"])), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the columns."""
        return {"columns.json": json.dumps(self._columns._asdict())}
