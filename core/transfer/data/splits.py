"""From the splits that a dataset brings to the three that a run needs: train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.errors import DataError
from transfer.interfaces import SPLITS, Data, Split

# Splits do not depend on the run's seed, so that runs with several seeds are scored on the same examples.
_SEED = 20_140_825


def complete(data: Data, *, validation: float, limit: int | None) -> dict[str, Split]:
    """Return the splits ``train`` and ``validation`` and, where there is anything to score at the end, ``test``.

    ``validation`` picks the best epoch, so it is never also the split that is reported: where a dataset brings two
    splits, the second is scored once at the end, and validation is cut from ``train``.

    Args:
        data: As the dataset brings it.
        validation: The share of ``train`` to cut off where the dataset leaves no split for it.
        limit: Take the first so many examples per class of each split.

    Raises:
        DataError: A split is empty, a class is missing, or there is too little to cut from.
    """
    splits = dict(data.splits)
    unknown = set(splits) - set(SPLITS)
    if unknown or "train" not in splits:
        raise DataError(f"the dataset has the splits {sorted(splits)}", available=SPLITS, fix="name them so")
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "validation" not in splits:
        splits["train"], splits["validation"] = split_off(splits["train"], validation)
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"the {name} split is empty", fix="give it examples, or cut a larger share of train")
    if limit is not None:
        splits = {name: split.select(_first(split.targets, limit)) for name, split in splits.items()}
    present = np.unique(splits["train"].targets) if data.spec.target == "class" else None
    if present is not None and len(present) < 2:
        only = data.spec.classes[int(present[0])]
        raise DataError(
            f"the training split holds the class {only!r} alone", fix="give examples of two classes or more"
        )
    return {name: splits[name] for name in SPLITS if name in splits}


def split_off(split: Split, share: float) -> tuple[Split, Split]:
    """Cut a share off a split at random, alike in every class where targets are classes, and groups as a whole.

    Args:
        split: Of N examples.
        share: Between 0 and 1. A class of one example stays whole; a larger one gives and keeps at least one.

    Returns:
        What is left and what was cut off, each in the order of the split; always the same for the same split.

    Raises:
        DataError: There is nothing to cut off.
    """
    if split.groups is not None:
        return _cut_groups(split, split.groups, share)
    generator = np.random.default_rng(_SEED)
    taken = np.zeros(len(split), dtype=bool)
    for members in _strata(split.targets):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        taken[generator.permutation(members)[:count]] = True
    if not taken.any():
        alone = "" if len(split) == 1 else ": each is the only one of its class"
        raise DataError(
            f"{len(split)} examples are too few to cut {share:g} of them off{alone}",
            fix="give more examples, or a validation split of their own",
        )
    return split.select(np.flatnonzero(~taken)), split.select(np.flatnonzero(taken))


def _cut_groups(split: Split, groups: npt.NDArray[np.int64], share: float) -> tuple[Split, Split]:
    """Cut whole groups off, the largest first, each as long as it brings every class nearer to its share."""
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise DataError(
            "all examples are of one group, which cannot be cut",
            fix="give more groups, or a split of their own to each part",
        )
    counts = np.stack([np.bincount(group[members], minlength=len(names)) for members in _strata(split.targets)], 1)
    wanted = share * counts.sum(0)
    order = np.random.default_rng(_SEED).permutation(len(names))
    order = order[np.argsort(-counts.sum(1)[order], kind="stable")]
    taken = np.zeros(len(names), dtype=bool)
    missing = wanted.astype(float)
    for number in order:
        if ((missing - counts[number]) ** 2).sum() < (missing**2).sum():
            taken[number] = True
            missing -= counts[number]
    if not taken.any():
        taken[order[-1]] = True  # the smallest is already more than was asked for
    if taken.all():
        taken[order[-1]] = False
    cut_off = taken[group]
    return split.select(np.flatnonzero(~cut_off)), split.select(np.flatnonzero(cut_off))


def _strata(targets: npt.NDArray[Any]) -> list[npt.NDArray[np.int64]]:
    if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        return [np.flatnonzero(targets == c) for c in np.unique(targets)]
    return [np.arange(len(targets))]


def _first(targets: npt.NDArray[Any], limit: int) -> npt.NDArray[np.int64]:
    return np.sort(np.concatenate([members[:limit] for members in _strata(targets)]))


def digest(splits: Mapping[str, Split]) -> str:
    """Return what tells splits apart: their names, targets and the names of their examples, in order."""
    found = hashlib.sha256()
    for name, split in splits.items():
        found.update(f"{name} {len(split)} {split.targets.dtype}".encode() + split.targets.tobytes())
        # Names of files, not their folders or times, which a copy of the data does not keep.
        found.update("\0".join(Path(split.name(i)).name for i in range(len(split))).encode())
    return found.hexdigest()


def count_classes(split: Split, classes: tuple[str, ...]) -> Mapping[str, int]:
    """Return how many examples each class or label has, for tables; empty for numbers."""
    if np.issubdtype(split.targets.dtype, np.integer):
        counts = np.bincount(split.targets, minlength=len(classes))
        return dict(zip(classes, counts.tolist(), strict=True))
    return {}
