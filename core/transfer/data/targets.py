"""Conversion of label names to the targets of a split, and of targets to text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.errors import DataError
from transfer.interfaces import DataSpec

MAX_CLASSES_SHOWN = 20
"""Maximum number of valid names in an error."""


def encode_labels(labels: Sequence[str], classes: Sequence[str], where: Callable[[int], str]) -> npt.NDArray[np.int64]:
    """Return the class index of each example, int64 (N,).

    Args:
        labels: Class name of each example.
        classes: Names of the classes, in the order of their indices.
        where: Function from the index of an example to its name in errors.

    Raises:
        transfer.DataError: A label is not one of the classes.
    """
    class_indices = {name: index for index, name in enumerate(classes)}
    try:
        return np.array([class_indices[label] for label in labels], dtype=np.int64)
    except KeyError:
        index = next(index for index, label in enumerate(labels) if label not in class_indices)
        raise _unknown_label("class", labels[index], classes, where(index)) from None


def multi_hot(
    labels: Sequence[Collection[str]], classes: Sequence[str], where: Callable[[int], str]
) -> npt.NDArray[np.float32]:
    """Return the multi-hot encoding of the labels, float32 (N, C): ones for the labels of an example, zeros otherwise.

    Args:
        labels: Label names of each example; may be empty.
        classes: Names of all labels, in the order of the columns.
        where: Function from the index of an example to its name in errors.

    Raises:
        transfer.DataError: A label is not one of the names.
    """
    columns = {name: column for column, name in enumerate(classes)}
    targets = np.zeros((len(labels), len(classes)), dtype=np.float32)
    for index, names in enumerate(labels):
        for name in names:
            if name not in columns:
                raise _unknown_label("label", name, classes, where(index))
            targets[index, columns[name]] = 1
    return targets


def describe(data: DataSpec, target: Any) -> str:
    """Return the target of an example as text: its class, its labels, or its numbers by name."""
    if data.target == "class":
        return class_name(data.classes, int(target))
    values = np.asarray(target)
    if values.shape != (len(data.classes),):  # a task may predict several values per number, such as quantiles
        return ", ".join(f"{value:.4g}" for value in values.reshape(-1).tolist())
    pairs = zip(data.classes, values.tolist(), strict=True)
    if data.target == "labels":
        return " and ".join(name for name, value in pairs if value) or "none"
    return ", ".join(f"{name} {value:.4g}" for name, value in pairs)


def class_name(classes: Sequence[str], index: int) -> str:
    """Return the name of a class; ``output N`` for an output of a task that is not a class of the data."""
    return classes[index] if 0 <= index < len(classes) else f"output {index}"


def _unknown_label(what: str, name: str, classes: Sequence[str], where: str) -> DataError:
    return DataError(
        f"{what} {name!r} is not in the training data",
        where=where,
        available=classes[:MAX_CLASSES_SHOWN],
        fix=f"correct the label, or add training examples of that {what}",
    )
