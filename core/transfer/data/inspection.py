"""Inspection of the splits before training: repeated splits, duplicates, contradictory labels, similar class names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.data.targets import describe
from transfer.errors import DataError
from transfer.interfaces import SPLITS, Data, DataSpec, Split
from transfer.interfaces.columns import content_keys
from transfer.system.formatting import format_names

DATA_WARNINGS_TITLE = "possible problems in the data"
MAX_NAMES_SHOWN = 5
"""Maximum number of class names in a warning."""
MIN_CONTAINED_EXAMPLES = 10
"""Number of examples below which a split may be contained in another one by chance, which is only a warning."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def inspect_data(data: Data, splits: Mapping[str, Split], fields: Sequence[str]) -> dict[str, str]:
    """Return warnings about the data, by subject. Columns that cannot be compared cheaply are not compared.

    Args:
        data: Data with the splits of the dataset.
        splits: Complete splits, as they are used.
        fields: Names of the fields that the model reads.

    Raises:
        DataError: Two splits of the dataset contain the same examples, or one contains all examples of another.
    """
    _refuse_repeated_split(data.splits, fields)
    warnings = {}
    if "validation" in data.splits and "test" not in data.splits:
        warnings["test split"] = (
            "the dataset has no test split: its validation split is the test split, and a validation split is cut from "
            "train"
        )
    warnings |= _class_warnings(data.spec, splits)
    keys = {name: content_keys(split.column(*fields)) for name, split in splits.items()}
    compared = {name: column for name, column in keys.items() if column is not None}
    # Contents become integers, so that all comparisons below are comparisons of arrays.
    numbers: dict[Any, int] = {}
    codes = {
        name: np.fromiter((numbers.setdefault(key, len(numbers)) for key in column), np.int64, len(column))
        for name, column in compared.items()
    }
    warnings |= _duplicates(splits, codes)
    warnings |= _contradictions(data.spec, splits, codes)
    return warnings


def _refuse_repeated_split(splits: Mapping[str, Split], fields: Sequence[str]) -> None:
    """Refuse two splits with the same examples: metrics on the second one would be those of the first."""
    for first, second in combinations([name for name in SPLITS if name in splits], 2):
        one, other = splits[first], splits[second]
        if len(one) != len(other) or not len(one) or not _same_content(one, other, fields):
            continue
        raise _leak(f"the {first} and {second} splits contain the same {len(one):,} examples", first, second)


def _leak(message: str, first: str, second: str) -> DataError:
    """Return the error of examples that the model uses in one split and that are scored in another one."""
    # Without `val`, a validation split is cut from train; a test split cannot be replaced.
    option = "val" if "validation" in (first, second) else "test"
    reason = "memorizes them" if first == "train" else "is selected on them"
    return DataError(
        f"{message}: the model {reason}, so metrics on {second} would be too good",
        fix=f"set {option} to other data, or remove it"
        + (": validation is then split off from train" if option == "val" else ""),
    )


def _same_content(one: Split, other: Split, fields: Sequence[str]) -> bool:
    """Return whether two splits contain the same values, in any order."""
    columns = [(one.fields[field], other.fields[field]) for field in fields]
    if all(a is b for a, b in columns):
        return True
    keys = [content_keys(split.column(*fields)) for split in (one, other)]
    if keys[0] is not None and keys[1] is not None:
        return Counter(keys[0]) == Counter(keys[1])
    # A fingerprint of a column's own is cheap by contract; any other would read every value.
    return all(hasattr(a, "fingerprint") and hasattr(b, "fingerprint") for a, b in columns) and (
        one.fingerprint(*fields) == other.fingerprint(*fields)
    )


def _duplicates(splits: Mapping[str, Split], codes: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, str]:
    """Return warnings about examples that occur twice in a split, or in two splits.

    Raises:
        DataError: All examples of a split are in another one.
    """
    warnings = {}
    for name, numbers in codes.items():
        _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[inverse] != np.arange(len(numbers)))
        if len(repeated):
            pair = f"{splits[name].name(repeated[0])} = {splits[name].name(first[inverse[repeated[0]]])}"
            warnings[f"duplicates in {name}"] = f"{_count(repeated, numbers)} repeat another one ({pair})"
    for first_name, second_name in combinations(codes, 2):
        shared = np.flatnonzero(np.isin(codes[second_name], codes[first_name]))
        for inner, outer in ((second_name, first_name), (first_name, second_name)):
            if _is_contained(codes[inner], codes[outer]):
                message = f"all {len(codes[inner]):,} examples of {inner} are also in {outer}"
                raise _leak(message, first_name, second_name)
        if len(shared):
            original = np.flatnonzero(codes[first_name] == codes[second_name][shared[0]])[0]
            pair = f"{splits[second_name].name(shared[0])} = {splits[first_name].name(original)}"
            warnings[f"{second_name} in {first_name}"] = (
                f"{_count(shared, codes[second_name])} of {second_name} are also in {first_name} ({pair})"
            )
    return warnings


def _is_contained(inner: npt.NDArray[np.int64], outer: npt.NDArray[np.int64]) -> bool:
    """Return whether all examples of a split are in another one, and not because contents repeat by chance."""
    # If most examples repeat another one (a few short texts), any split is contained in any other.
    is_identifying = all(len(np.unique(codes)) > len(codes) / 2 for codes in (inner, outer))
    return len(inner) >= MIN_CONTAINED_EXAMPLES and is_identifying and bool(np.isin(inner, outer).all())


def _count(selected: npt.NDArray[np.int64], everything: npt.NDArray[np.int64]) -> str:
    return f"{len(selected):,} of {len(everything):,} examples"


def _contradictions(
    spec: DataSpec, splits: Mapping[str, Split], codes: Mapping[str, npt.NDArray[np.int64]]
) -> dict[str, str]:
    """Return a warning about examples with the same content and different labels."""
    if spec.target == "number" or not codes:
        return {}
    names = [(split, index) for split, numbers in codes.items() for index in range(len(numbers))]
    contents = np.concatenate(list(codes.values()))
    targets = np.concatenate([splits[name].targets for name in codes])
    labels = np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1)
    # A content that remains in two different pairs of content and label has contradictory labels.
    pairs = np.unique(np.stack([contents, labels], axis=1), axis=0)[:, 0]
    contradictory = np.flatnonzero(np.isin(contents, pairs[1:][pairs[1:] == pairs[:-1]]))
    if not len(contradictory):
        return {}
    first = contradictory[0]
    same = contradictory[contents[contradictory] == contents[first]]
    second = next(index for index in same if labels[index] != labels[first])
    pair = " and ".join(
        f"{splits[names[index][0]].name(names[index][1])} is {describe(spec, targets[index])}"
        for index in (first, second)
    )
    return {"contradictory labels": f"{len(contradictory):,} examples have another label than an equal one ({pair})"}


def _class_warnings(spec: DataSpec, splits: Mapping[str, Split]) -> dict[str, str]:
    """Return warnings about similar class names and about classes without examples."""
    if spec.target == "number" or not spec.classes:
        return {}
    warnings = {}
    by_meaning: dict[object, list[str]] = {}
    for name in spec.classes:
        by_meaning.setdefault(_meaning(name), []).append(name)
    similar = [" and ".join(map(repr, names)) for names in by_meaning.values() if len(names) > 1]
    if similar:
        warnings["similar classes"] = f"{format_names(similar, MAX_NAMES_SHOWN)}: these are different classes"
    for split_name, split in splits.items():
        present = np.unique(split.targets) if spec.target == "class" else np.flatnonzero(split.targets.any(axis=0))
        missing = [repr(name) for name in np.delete(np.array(spec.classes, dtype=object), present)]
        if missing:
            warnings[f"classes without {split_name}"] = (
                f"no {split_name} example of {format_names(missing, MAX_NAMES_SHOWN)}"
            )
    return warnings


def _meaning(name: str) -> object:
    """Return a value that is equal for class names that differ only in case, separators or the format of a number."""
    name = unicodedata.normalize("NFKC", name).strip()
    if _NUMBER.fullmatch(name):
        return float(name)
    # Single letters keep their case: `a` and `A` are two classes of handwritten letters.
    return re.sub(r"[\s_-]", " ", name.casefold() if len(name) > 1 else name)
