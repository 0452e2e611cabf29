"""Conversion of label names to the targets of a split, and of targets to text."""

from __future__ import annotations

import ast
import json
import math
import re
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


def as_text(value: object) -> str | None:
    """Return a value of a table as text, as JSON writes it. A missing value is empty, and other data has no text."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def label_text(value: object) -> str | None:
    """Return a label as text without surrounding blanks; empty if it is missing, None if it is a list or an object.

    A float such as 1.0 is the class 1: a column of integers with a missing value is stored as floats.
    """
    text = as_text(int(value) if isinstance(value, float) and value.is_integer() else value)
    return None if text is None else text.strip()


_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"\[\](){}][^,'"\[\](){}]*"""
_LIST = re.compile(rf"[\[({{]\s*(?:(?:{_ITEM})\s*(?:,\s*(?:{_ITEM})\s*)*,?)?\s*[\])}}]", re.DOTALL)


def parse_label_list(value: object, separator: str) -> tuple[str, ...]:
    """Return the labels of an example.

    Args:
        value: List of labels, text of a list as Python or JSON write it, or names with a separator. An empty text or
            list contains no label.
        separator: Text between two labels.

    Raises:
        ValueError: The value is missing, or is or contains something else. The message is the expected value.
    """
    expected = f"a list of labels, or labels separated by {separator!r}"
    items: Sequence[object]
    if isinstance(value, str):
        text = value.strip()
        if _LIST.fullmatch(text):
            # Not a parser of Python's literals: it would read NumPy's ['a' 'b'] as the one label 'ab'.
            words = [word.strip() for word in re.findall(_ITEM, text[1:-1], re.DOTALL)]
            items = [ast.literal_eval(word) if word[0] in "'\"" else None if word == "null" else word for word in words]
        elif text.startswith("[") and text.endswith("]"):
            raise ValueError(expected)
        else:
            return tuple(stripped for name in text.split(separator) if (stripped := name.strip()))
    elif isinstance(value, list):
        items = value
    else:
        raise ValueError(expected)
    labels = [label_text(item) for item in items]
    # An empty text in a list is no label, and a null is a missing one.
    if any(
        label is None or (not label and not isinstance(item, str)) for label, item in zip(labels, items, strict=True)
    ):
        raise ValueError("labels without null, lists and objects in the list")
    return tuple(label for label in labels if label)


_BITS = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


def is_multi_hot(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether lists of labels are rows of zeros and ones, one for each of several labels."""
    if any(label.lower() not in _BITS for row in rows for label in row):
        return False
    # A list of labels does not repeat one. The same length in all rows shows it if there are two labels.
    widths = {len(row) for row in rows}
    return any(len(set(row)) < len(row) for row in rows) or (len(widths) == 1 and max(widths) > 1)


def from_multi_hot(
    rows: Sequence[Sequence[str]], names: Sequence[str], where: Callable[[int], str]
) -> npt.NDArray[np.float32]:
    """Return rows of zeros and ones as float32 (N, C).

    Args:
        rows: Zero or one for each label, as text, of each example.
        names: Names of the labels.
        where: Function from the index of an example to its name in errors.

    Raises:
        transfer.DataError: A row has another number of values, or a value is not 0 or 1.
    """
    targets = np.zeros((len(rows), len(names)), dtype=np.float32)
    for index, row in enumerate(rows):
        bits = [_BITS.get(value.lower()) for value in row]
        if len(bits) != len(names) or None in bits:
            raise DataError(
                f"the labels are wrong: expected {len(names)} zeros and ones, got [{', '.join(row)}]",
                where=where(index),
                fix="write one value for each of label_names",
            )
        targets[index] = bits
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
