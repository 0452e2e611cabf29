"""The data of a complete run, compared with the data that its model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transfer.config.run_config import RunConfig
from transfer.data.in_memory import IN_MEMORY, InMemoryTable, require_table
from transfer.data.splits import digest
from transfer.errors import DataError, RunError
from transfer.interfaces import Data, DataSpec, Split
from transfer.storage.run_directory import RunDirectory
from transfer.training.build import read_data


def read_splits(config: RunConfig, trained: DataSpec, run: Path) -> dict[str, Split]:
    """Read the splits of a run, with targets in the order of the model's classes.

    Args:
        config: Config of the run.
        trained: Data specification that the model was trained on.
        run: Run directory, for errors.

    Raises:
        DataError: The data is wrong, or has a class that the model does not have.
    """
    data, splits = read_data(config)
    return align_classes(data, splits, trained, str(run))


def require_same_table(directory: RunDirectory, data: InMemoryTable) -> None:
    """Require that data in memory is the data that a run was started with.

    Raises:
        RunError: The run has read its data from files, or was started with other data.
        ConfigError: The data is no :func:`transfer.table`.
    """
    table, block = require_table(data), directory.config()["data"]
    where = str(directory.path / "config.yaml")
    if str(block.get("name")).rpartition(":")[2] != IN_MEMORY:
        raise RunError(f"the run reads its data by itself, from {block.get('name')}", where=where, fix="leave out data")
    if block.get("digest") != table.digest:
        raise RunError(
            f"the data is not that of the run: expected the digest {block.get('digest')}, got {table.digest}",
            where=where,
            fix="pass the same data in the same order; to score other data: transfer.evaluate(RUN, on=data)",
        )


def align_classes(data: Data, splits: Mapping[str, Split], trained: DataSpec, where: str) -> dict[str, Split]:
    """Return splits with targets in the order of the model's classes.

    Args:
        data: Data with the classes of the targets.
        splits: Splits of the data.
        trained: Data specification that the model was trained on.
        where: Location of the run or of the data, for errors.

    Raises:
        DataError: The data has another kind of target, or a class that the model does not have.
    """
    if data.spec.target != trained.target:
        raise DataError(
            f"the targets of the data are wrong: expected a {trained.target}, got a {data.spec.target}", where=where
        )
    if data.spec.classes == trained.classes:
        return dict(splits)
    unknown = [name for name in data.spec.classes if name not in trained.classes]
    missing = [name for name in trained.classes if name not in data.spec.classes]
    # A class that no example has any more does not change the meaning of the others. A missing number does.
    if unknown or (missing and trained.target == "number"):
        examples = [_examples_of(data, splits, name) for name in unknown]
        parts = [f"the model has no class {', '.join(examples)}"] if unknown else []
        parts += [f"the data has no class {', '.join(map(repr, missing))}"] if missing else []
        raise DataError(
            f"the classes of the data are not those of the model: {'; '.join(parts)}",
            where=where,
            available=trained.classes,
            fix="give the classes the names that they had in training, or train a new model",
        )
    # positions[i]: index of the i-th class of the data among the classes of the model.
    positions = np.array([trained.classes.index(name) for name in data.spec.classes], dtype=np.int64)
    return {name: _with_positions(split, positions, trained) for name, split in splits.items()}


def _examples_of(data: Data, splits: Mapping[str, Split], name: str) -> str:
    """Return the name of a class with its number of examples and the first of them."""
    index = data.spec.classes.index(name)
    if data.spec.target == "number":
        return repr(name)
    found = []
    for split in splits.values():
        is_class = split.targets == index if data.spec.target == "class" else split.targets[:, index] > 0
        found += [split.name(int(position)) for position in np.flatnonzero(is_class)]
    return f"{name!r} ({len(found):,} examples, the first is {found[0]})" if found else repr(name)


def changed_split(summary: Mapping[str, Any], name: str, split: Split) -> str | None:
    """Return a note if a split is not the one of the training, None if it is or the run has no digests.

    Args:
        summary: Content of the run's ``summary.json``.
        name: Name of the split.
        split: The split as it is now.
    """
    digests, examples = summary.get("digests"), summary.get("examples")
    if not isinstance(digests, Mapping) or digests.get(name) in (None, digest({name: split})):
        return None
    before = examples.get(name) if isinstance(examples, Mapping) else None
    count = f" ({before:,} examples then, {len(split):,} now)" if isinstance(before, int) else ""
    return f"the {name} split has changed since the training{count}: its metrics differ from those of the run"


def _with_positions(split: Split, positions: np.ndarray[Any, np.dtype[np.int64]], trained: DataSpec) -> Split:
    if trained.target == "class":
        return replace(split, targets=positions[split.targets])
    # Labels that no example has any more are zeros.
    targets = np.zeros((len(split), len(trained.classes)), dtype=np.float32)
    targets[:, positions] = split.targets
    return replace(split, targets=targets)
