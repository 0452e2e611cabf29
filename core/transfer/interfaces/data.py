"""The contracts between the parts: Dataset -> Backbone (+ its Preprocessing) -> Head, the Task that judges, Trackers.

**Options.** A component's constructor signature is the schema of its config block. What stands *before* the ``*`` is
handed over by the framework; what stands *after* it (keyword-only) is an option that a config may set. Each option
has a type, a default unless it is required, and a line under ``Args:`` in the class docstring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from transfer.interfaces.columns import Columns, Selection, fingerprint

TargetKind = Literal["class", "labels", "number"]
SPLITS = ("train", "validation", "test")


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataSpec:
    """What a dataset holds, as far as it is known.

    Args:
        fields: Names of the inputs of one example, each with its modality's usual name (``image``, ``text``).
        target: What is to be predicted: one ``class`` per example (int64, ()), a set of ``labels`` (float32 of zeros
            and ones, (C,)), or a ``number`` (float32, (C,)).
        classes: Names of the classes, labels or numbers in the order of the model's outputs; empty as long as the
            data has not been read and the options do not fix them.
    """

    fields: tuple[str, ...]
    target: TargetKind
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Raw examples of one split, as columns.

    Args:
        fields: For each field a sequence of raw values (a PIL image, a string). A sequence may read its values only
            when they are asked for; it must then be picklable.
        targets: int64 (N,) of class indices, or float32 (N, C) of labels or numbers.
        names: What each example is called in messages (its path); empty: its index.
        groups: int64 (N,), the group of each example where some must stay together (pictures of one patient).
    """

    fields: Mapping[str, Sequence[Any]]
    targets: npt.NDArray[Any]
    names: Sequence[str] = ()
    groups: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Refuse columns of different lengths."""
        lengths = {name: len(column) for name, column in self.fields.items()} | {"targets": len(self.targets)}
        if self.names:
            lengths["names"] = len(self.names)
        if self.groups is not None:
            lengths["groups"] = len(self.groups)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a split differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """Return what example ``index`` is called in messages."""
        return self.names[index] if self.names else f"example {index}"

    def column(self, *fields: str) -> Sequence[Any]:
        """Return the raw values of a field, or of several as a tuple for each example (:class:`Columns`)."""
        columns = [self.fields[field] for field in fields]
        return columns[0] if len(columns) == 1 else Columns(columns)

    def fingerprint(self, *fields: str) -> str:
        """Return what identifies the raw values of some fields, in their order.

        A column may know a cheap answer (names, sizes and times of files) and give it by a method ``fingerprint() ->
        str``; of any other column every value is read.
        """
        return fingerprint(self.column(*fields))

    def select(self, indices: npt.NDArray[np.int64]) -> Split:
        """Return the split of these examples, in this order; nothing is read or copied but the targets."""
        return Split(
            {name: Selection(column, indices) for name, column in self.fields.items()},
            self.targets[indices],
            Selection(self.names, indices) if self.names else (),
            None if self.groups is None else self.groups[indices],
        )


@dataclass(frozen=True)
class Data:
    """A dataset that has been read.

    Args:
        spec: With the classes filled in (for ``class`` and ``labels``).
        splits: ``train`` and, where the dataset has them, ``validation`` and ``test``. The engine's side cuts what is
            missing from ``train`` (see :mod:`transfer.data.splits`).
    """

    spec: DataSpec
    splits: Mapping[str, Split]


class Dataset(ABC):
    """Raw examples of a task.

    The constructor takes options alone and reads nothing, so that a config can be checked without data.
    """

    @property
    @abstractmethod
    def spec(self) -> DataSpec:
        """What the options alone say of the data; nothing is read."""

    @abstractmethod
    def load(self) -> Data:
        """Find (or download) and read the data.

        Raises:
            transfer.DataError: It is missing, empty or not what it should be; the message says which file to put where.
        """
