"""From labels as they are written to the targets of a split, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.errors import DataError
from transfer.interfaces import DataSpec

MAX_SHOWN = 20


def encode_labels(labels: Sequence[str], classes: Sequence[str], where: Callable[[int], str]) -> npt.NDArray[np.int64]:
    """Return the class of each example, int64 (N,).

    Args:
        labels: A class's name each.
        classes: The names in order.
        where: What an example is called in messages.

    Raises:
        transfer.DataError: A label is none of the classes.
    """
    known = {name: index for index, name in enumerate(classes)}
    try:
        return np.array([known[label] for label in labels], dtype=np.int64)
    except KeyError:
        index = next(index for index, label in enumerate(labels) if label not in known)
        raise _unknown("class", labels[index], classes, where(index)) from None


def multi_hot(
    labels: Sequence[Collection[str]], classes: Sequence[str], where: Callable[[int], str]
) -> npt.NDArray[np.float32]:
    """Return ones for the labels of each example and zeros elsewhere, float32 (N, C).

    Args:
        labels: Names of labels each, perhaps none.
        classes: The names in order.
        where: What an example is called in messages.

    Raises:
        transfer.DataError: A label is none of these.
    """
    known = {name: index for index, name in enumerate(classes)}
    targets = np.zeros((len(labels), len(classes)), dtype=np.float32)
    for index, names in enumerate(labels):
        for name in names:
            if name not in known:
                raise _unknown("label", name, classes, where(index))
            targets[index, known[name]] = 1
    return targets


def describe(data: DataSpec, target: Any) -> str:
    """Return a target of an example in words: its class, its labels, or its numbers by name."""
    if data.target == "class":
        return data.classes[int(target)]
    pairs = zip(data.classes, np.asarray(target).tolist(), strict=True)
    if data.target == "labels":
        return " and ".join(name for name, value in pairs if value) or "none"
    return ", ".join(f"{name} {value:.4g}" for name, value in pairs)


def _unknown(what: str, name: str, classes: Sequence[str], where: str) -> DataError:
    return DataError(
        f"{what} {name!r} is not in the training data",
        where=where,
        available=classes[:MAX_SHOWN],
        fix=f"correct the label, or add training examples of that {what}",
    )
