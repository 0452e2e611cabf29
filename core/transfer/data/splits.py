"""Completion of a dataset's splits to train, validation and test, by stratified and grouped cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.errors import DataError
from transfer.interfaces import SPLITS, Data, DataSpec, Split

# Splits do not depend on the seed of the run, so that runs with different seeds are evaluated on the same examples.
_SEED = 20_140_825


def complete(
    data: Data,
    *,
    validation: float,
    limit: int | None,
    limits_test: bool = False,
    fold: tuple[int, int, int] | None = None,
) -> dict[str, Split]:
    """Return the splits ``train``, ``validation`` and, if the dataset has a second split, ``test``.

    ``validation`` selects the best epoch, so results on it are optimistic, and it must not be the reported split. If a
    dataset has two splits, the second is used as ``test``, and validation is cut from ``train``.

    Args:
        data: Data with the splits of the dataset.
        validation: Fraction of ``train`` to use for validation if the dataset has no split for it; 0 for no validation.
        limit: Maximum number of examples per class in the training and validation splits; None uses all.
        limits_test: Whether ``limit`` also applies to the test split (in quick runs). Otherwise, metrics with and
            without a limit are of the same examples.
        fold: Fold of a cross-validation that replaces the test split: its number, the number of folds, and the number
            of the repetition, from 1. None uses the test split of the dataset.

    Raises:
        DataError: A split is empty or has an unknown name, or the training split is too small or has one class.
    """
    splits = dict(data.splits)
    unknown = set(splits) - set(SPLITS)
    if unknown or "train" not in splits:
        raise DataError(
            f"the splits of the dataset are wrong: expected train (and validation, test), got {sorted(splits)}",
            available=SPLITS,
            fix="rename the splits",
        )
    # The second of two splits is the reported one, whatever the dataset calls it.
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if fold is not None:
        number, count, repeat = fold
        pool = splits["train"]
        is_tested = fold_numbers(pool, count, repeat) == number
        pool = replace(pool, pool=(pool, np.arange(len(pool))))
        splits["test"] = pool.select(np.flatnonzero(is_tested))
        splits["train"] = pool.select(np.flatnonzero(~is_tested))
    if "validation" not in splits and validation:
        splits["train"], splits["validation"] = split_off(splits["train"], validation)
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"the {name} split is empty", fix="add examples to it, or cut a larger fraction from train")
    if limit is not None:
        limited = [name for name in splits if name != "test" or limits_test]
        splits |= {name: splits[name].select(_first(splits[name].targets, limit)) for name in limited}
    present = np.unique(splits["train"].targets) if data.spec.target == "class" else None
    if present is not None and len(present) < 2:
        raise DataError(
            f"the training split contains only the class {data.spec.classes[int(present[0])]!r}",
            fix="add examples of another class",
        )
    return {name: splits[name] for name in SPLITS if name in splits}


def split_off(split: Split, fraction: float) -> tuple[Split, Split]:
    """Split a fraction off a split at random: stratified by class, and without dividing a group.

    Args:
        split: Split to divide.
        fraction: Fraction to split off, between 0 and 1. Of each class with two or more examples, at least one is split
            off and at least one remains; a class of one example remains.

    Returns:
        The remaining split and the one that was split off, both in the original order. The result is deterministic.

    Raises:
        DataError: The split is too small, or all examples are of one group.
    """
    if split.groups is not None:
        return _split_off_groups(split, split.groups, fraction)
    generator = np.random.default_rng(_SEED)
    taken = np.zeros(len(split), dtype=bool)
    for members in strata(split.targets):
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken[generator.permutation(members)[:count]] = True
    if not taken.any():
        reason = "" if len(split) <= 1 else ": each is the only one of its class"
        raise DataError(
            f"{len(split)} examples are too few to cut {fraction:g} of them off{reason}",
            fix="add examples, or provide a validation split",
        )
    return split.select(np.flatnonzero(~taken)), split.select(np.flatnonzero(taken))


def _split_off_groups(split: Split, groups: npt.NDArray[np.int64], fraction: float) -> tuple[Split, Split]:
    """Split off complete groups until each class is close to its fraction.

    Greedy: starting with the largest, a group is taken if it reduces the squared distance between the number of
    examples that are still missing per class and zero. Groups of equal size are in random order.
    """
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise DataError(
            "all examples are of one group, which cannot be divided",
            fix="add groups, or provide validation and test splits",
        )
    # Number of examples of each group in each class, (groups, classes).
    counts = np.stack([np.bincount(group[members], minlength=len(names)) for members in strata(split.targets)], 1)
    wanted = fraction * counts.sum(0)
    order = np.random.default_rng(_SEED).permutation(len(names))
    # Largest first, because small groups can still fill the rest; the sort is stable, so ties stay in random order.
    order = order[np.argsort(-counts.sum(1)[order], kind="stable")]
    taken = np.zeros(len(names), dtype=bool)
    missing = wanted.astype(float)
    for number in order:
        if ((missing - counts[number]) ** 2).sum() < (missing**2).sum():
            taken[number] = True
            missing -= counts[number]
    if not taken.any():
        taken[order[-1]] = True  # even the smallest group is larger than the fraction
    if taken.all():
        taken[order[-1]] = False  # at least one group must remain
    is_taken = taken[group]
    return split.select(np.flatnonzero(~is_taken)), split.select(np.flatnonzero(is_taken))


def fold_numbers(split: Split, count: int, repeat: int = 1) -> npt.NDArray[np.int64]:
    """Divide a split into folds of similar size: stratified by class, and without dividing a group.

    Args:
        split: Split to divide.
        count: Number of folds, 2 or more.
        repeat: Number of the repetition, from 1; each gives other folds.

    Returns:
        The number of the fold of each example, from 1, int64 (N,). The result is deterministic.

    Raises:
        DataError: There are fewer examples or groups than folds.
    """
    generator = np.random.default_rng((_SEED, repeat))
    classes = strata(split.targets)
    if split.groups is None:
        _require_parts(len(split), count, "examples")
        folds = np.zeros(len(split), dtype=np.int64)
        # Dealt out class by class, without starting at the first fold again: folds differ by at most one example.
        order = np.concatenate([generator.permutation(members) for members in classes])
        folds[order] = np.arange(len(split)) % count
        return folds + 1
    names, group = np.unique(split.groups, return_inverse=True)
    _require_parts(len(names), count, "groups")
    # Number of examples of each group in each class, (groups, classes), as a fraction of the class.
    sizes = np.stack([np.bincount(group[members], minlength=len(names)) / len(members) for members in classes], 1)
    order = generator.permutation(len(names))
    # Largest first, because small groups can still fill the rest; the sort is stable, so ties stay in random order.
    order = order[np.argsort(-sizes.sum(1)[order], kind="stable")]
    filled, fold_of_group = np.zeros((count, len(classes))), np.zeros(len(names), dtype=np.int64)
    for number in order:
        # The fold in which the group adds least to the sum of squares, which is smallest for equal folds.
        fold = int(np.argmin((filled * sizes[number]).sum(1)))
        fold_of_group[number] = fold
        filled[fold] += sizes[number]
    return fold_of_group[group] + 1


def _require_parts(available: int, count: int, what: str) -> None:
    if available < count:
        raise DataError(f"{available} {what} are too few for {count} folds", fix=f"use at most {available} folds")


def strata(targets: npt.NDArray[Any]) -> list[npt.NDArray[np.int64]]:
    """Return the indices of the examples of each class; those of all examples if targets are labels or numbers."""
    if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        return [np.flatnonzero(targets == c) for c in np.unique(targets)]
    return [np.arange(len(targets))]


def _first(targets: npt.NDArray[Any], limit: int) -> npt.NDArray[np.int64]:
    """Return the indices of the first ``limit`` examples of each class, in order."""
    return np.sort(np.concatenate([members[:limit] for members in strata(targets)]))


def digest(splits: Mapping[str, Split]) -> str:
    """Return a digest of splits: their names, targets and the names of their examples, in order."""
    content = hashlib.sha256()
    for name, split in splits.items():
        content.update(f"{name} {len(split)} {split.targets.dtype}".encode() + split.targets.tobytes())
        # File names without folders and modification times, which change when the data is copied.
        content.update("\0".join(Path(split.name(i)).name for i in range(len(split))).encode())
    return content.hexdigest()


def count_classes(split: Split, spec: DataSpec) -> Mapping[str, int]:
    """Return the number of examples of each class or label, for tables; empty for numbers."""
    if spec.target == "number":
        return {}
    targets = split.targets
    counts = np.bincount(targets, minlength=len(spec.classes)) if spec.target == "class" else targets.sum(0, np.int64)
    return dict(zip(spec.classes, counts.tolist(), strict=True))
