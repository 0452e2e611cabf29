"""The contract of a dataset: raw examples by split, with their targets.

**Options.** A component's constructor signature is the schema of its config block. The framework passes the parameters
before the ``*``; the keyword-only parameters after it are the options that a config may set. Each option has a type, a
default unless it is required, and an entry under ``Args:`` in the class docstring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from transfer.interfaces.columns import Columns, Selection, as_positional, fingerprint

TargetKind = Literal["class", "labels", "number"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSpec:
    """The fields and the target of a dataset, as far as they are known.

    Args:
        fields: Names of the inputs of one example, usually the names of their modalities (``image``, ``text``).
        target: Kind of the target: one ``class`` per example (int64, shape ()), a set of ``labels`` (float32 zeros and
            ones, shape (C,)), or a ``number`` (float32, shape (C,)).
        classes: Names of the classes, labels or numbers, in the order of the model's outputs. Empty until the data has
            been read, unless the options determine them.
        placeholders: Whether ``classes`` are placeholders, because the data has not been read. Their names and their
            number are unrelated to the data, so options that name classes must not be compared with them.
    """

    fields: tuple[str, ...]
    target: TargetKind
    classes: tuple[str, ...] = ()
    placeholders: bool = False


@dataclass(frozen=True)
class Split:
    """Raw examples of one split, stored as columns.

    Columns are read by position. A column that is indexed by label (a pandas Series) is converted to an array of its
    values in order. Otherwise, a shuffled table would combine examples with wrong targets.

    Args:
        fields: Sequence of raw values (a PIL image, a string) by field name. A sequence may read values lazily; it must
            then be picklable.
        targets: Targets of the N examples: int64 (N,) class indices, or float32 (N, C) labels or numbers. Other integer
            and float types, and lists, are converted.
        names: Name of each example in messages, such as its path. Empty: examples are named by their index.
        groups: Group of each example, int64 (N,), if some examples must stay together (images of one patient).
        pool: Larger split that contains these examples, and their indices in it, int64 (N,), if several splits are
            parts of it (folds). The feature cache then stores the features of the pool once for all of them.

    Raises:
        ValueError: The columns differ in length, or the targets are not class indices, labels or numbers.
    """

    fields: Mapping[str, Sequence[Any]]
    targets: npt.NDArray[Any]
    names: Sequence[str] = ()
    groups: npt.NDArray[np.int64] | None = None
    pool: tuple[Split, npt.NDArray[np.int64]] | None = None

    def __post_init__(self) -> None:
        """Convert columns to sequences that are read by position, and check lengths and targets."""
        columns = {name: as_positional(column, f"field {name!r}") for name, column in self.fields.items()}
        object.__setattr__(self, "fields", columns)  # the dataclass is frozen
        object.__setattr__(self, "names", () if self.names is None else as_positional(self.names, "names"))
        object.__setattr__(self, "targets", _as_array(self.targets, "targets"))
        if self.groups is not None:
            object.__setattr__(self, "groups", _as_array(self.groups, "groups"))
        # Lengths are compared before the targets are checked, whose errors name examples.
        lengths = {name: len(column) for name, column in self.fields.items()} | {"targets": len(self.targets)}
        if len(self.names):
            lengths["names"] = len(self.names)
        if self.groups is not None:
            lengths["groups"] = len(self.groups)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a split differ in length: {lengths}")
        object.__setattr__(self, "targets", self._checked_targets())

    def _checked_targets(self) -> npt.NDArray[Any]:
        """Return the targets as int64 (N,) or float32 (N, C)."""
        targets = self.targets
        # Kinds of NumPy types: b boolean, u unsigned, i signed, f float.
        if targets.ndim == 1 and targets.dtype.kind in "bui":
            self._require(targets >= 0, "a class index of 0 or more")
            return targets.astype(np.int64, copy=False)
        if targets.ndim == 2 and targets.dtype.kind in "buif":
            with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite and is refused below
                numbers = targets.astype(np.float32, copy=False)
            self._require(np.isfinite(numbers).all(axis=1), "finite float32 numbers")
            return numbers
        # One-dimensional floats are not reshaped: they may be class indices that a missing value turned into floats.
        raise ValueError(
            f"the targets have type {targets.dtype} and shape {targets.shape}: "
            "expected integers (N,) for classes, or numbers (N, C) for labels and numbers"
        )

    def _require(self, valid: Any, expected: str) -> None:
        """Refuse the first target that is not valid, naming its example."""
        if not valid.all():
            index = int(np.argmin(valid))  # the first False
            raise ValueError(
                f"the target of {self.name(index)} is wrong: expected {expected}, got {self.targets[index]}"
            )

    def require_targets_of(self, spec: DataSpec) -> None:
        """Check the targets against the kind of target and the classes of a dataset.

        Raises:
            ValueError: The type or shape does not fit, a class index is out of range, or a label is not 0 or 1.
        """
        targets, count = self.targets, len(spec.classes)
        if spec.target == "class":
            fits, expected = targets.ndim == 1, "int64 (N,)"
        else:
            fits = targets.ndim == 2 and (not count or targets.shape[1] == count)
            expected = f"float32 (N, {count or 'C'})"
        if not fits:
            raise ValueError(
                f"targets of kind {spec.target!r} are wrong: expected {expected}, got {targets.dtype} {targets.shape}"
            )
        if spec.target == "class" and count:
            self._require(targets < count, f"a class index below {count}, the number of classes")
        if spec.target == "labels":
            self._require(((targets == 0) | (targets == 1)).all(axis=1), "zeros and ones")

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """Return the name of the example at ``index`` in messages."""
        return self.names[index] if len(self.names) else f"example {index}"

    def column(self, *fields: str) -> Sequence[Any]:
        """Return the raw values of one field, or tuples of the values of several fields (:class:`Columns`)."""
        columns = [self.fields[field] for field in fields]
        return columns[0] if len(columns) == 1 else Columns(columns)

    def fingerprint(self, *fields: str) -> str:
        """Return a digest of the raw values of some fields, in the order of the fields.

        A column may define a method ``fingerprint() -> str`` that is cheaper than reading all values (names, sizes and
        modification times of files). For any other column, every value is read.

        A method ``content_keys()``, which returns a hashable key of the content of each value, allows duplicates to be
        found in a column that reads its values lazily.
        """
        return fingerprint(self.column(*fields))

    def select(self, indices: npt.NDArray[np.int64]) -> Split:
        """Return the split of the examples at ``indices``, in this order; only targets and groups are copied."""
        return Split(
            {name: Selection(column, indices) for name, column in self.fields.items()},
            self.targets[indices],
            Selection(self.names, indices) if len(self.names) else (),
            None if self.groups is None else self.groups[indices],
            None if self.pool is None else (self.pool[0], self.pool[1][indices]),
        )


@dataclass(frozen=True)
class Data:
    """A dataset after reading.

    Args:
        spec: Fields, kind of target and classes; for ``class`` and ``labels`` the classes are filled in.
        splits: ``train`` and, if the dataset has them, ``validation`` and ``test``. Missing splits are cut from
            ``train`` later (:mod:`transfer.data.splits`).

    Raises:
        ValueError: The targets of a split do not fit the spec.
    """

    spec: DataSpec
    splits: Mapping[str, Split]

    def __post_init__(self) -> None:
        """Check the targets of every split."""
        for name, split in self.splits.items():
            try:
                split.require_targets_of(self.spec)
            except ValueError as error:
                raise ValueError(f"the {name} split: {error}") from None


def _as_array(column: Any, what: str) -> npt.NDArray[Any]:
    column = as_positional(column, what)
    return np.asarray(column.detach().cpu() if isinstance(column, Tensor) else column)


class Dataset(ABC):
    """Raw examples of a task.

    The constructor takes only options and reads nothing, so that a config can be checked without the data.
    """

    @property
    @abstractmethod
    def spec(self) -> DataSpec:
        """Fields, target and classes as far as the options determine them; nothing is read."""

    @abstractmethod
    def load(self) -> Data:
        """Find (or download) and read the data.

        Raises:
            transfer.DataError: The data is missing, empty or malformed. The message names the file to provide and its
                location.
        """
