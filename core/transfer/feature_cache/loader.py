"""The frozen prefix of a model, run once per example: its features on disk, keyed by content, shared between runs.

Stages that are frozen from the input on compute the same thing every epoch. What they return is stored under a key
made of everything that decides it: the weights and buffers of these stages, the preprocessing, the examples, the
precision and, for augmented views, the seed. Entries are written to a temporary folder and renamed when complete, so
that a crash leaves nothing half in use, and the second of two runs that make one entry at once drops its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.data.batch import Batch, Shard
from transfer.data.loader import Loader
from transfer.feature_cache.prefix import FrozenPrefix
from transfer.feature_cache.store import Entry, FeatureCache, pad


class CachedLoader:
    """The batches of a loader, with stored features in place of the backbone's input.

    Args:
        loader: Whose order it keeps.
        views: An entry per augmented view; each example draws one of them by (seed, epoch, index).
    """

    def __init__(self, loader: Loader, views: Sequence[Entry]) -> None:
        self.loader = loader
        self.split = loader.split
        self.views = tuple(views)

    def __len__(self) -> int:
        """The number of batches of the first epoch."""
        return len(self.loader)

    def count(self, epoch: int) -> int:
        """Return the number of batches of an epoch."""
        return self.loader.count(epoch)

    def epoch(
        self, epoch: int = 0, *, start: int = 0, limit: int | None = None, shard: Shard | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch, as :meth:`transfer.data.loader.Loader.epoch`."""
        views = np.zeros(len(self.split), dtype=np.int64)
        if len(self.views) > 1:
            views = np.random.default_rng((self.loader.seed, epoch, 1)).integers(len(self.views), size=len(self.split))
        for whole in self.loader.batch_indices(epoch)[start:][:limit]:
            indices = whole if shard is None else shard(whole)
            targets = torch.as_tensor(self.split.targets[indices])
            yield Batch(self._take(indices, views[indices]), targets, indices, None if shard is None else whole)

    def _take(self, indices: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> Any:
        if len(self.views) == 1:
            return self.views[0].take(indices)
        if self.views[0].offsets is not None:
            return pad([self.views[view].steps(index) for view, index in zip(views, indices, strict=True)])
        parts = [self.views[view].take(indices[views == view]) for view in np.unique(views)]
        back = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(views == v) for v in np.unique(views)])))
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)[back]
        return tuple(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True))


@dataclass(frozen=True)
class StageInputs:
    """Where the batches of a split come from.

    Args:
        loader: Raw or cached.
        first_stage: The stage that takes them.
        report: What was cached, or why not; for the log and the summary.
    """

    loader: Loader | CachedLoader
    first_stage: int
    report: dict[str, Any]

    def __str__(self) -> str:
        if not self.report["cached"]:
            return f"not cached: {self.report['why']}"
        return f"cached after {self.report['stages'][-1]} ({self.report['bytes'] / 2**20:.1f} MiB)"


def select_stage_inputs(
    cache: FeatureCache | None, prefix: FrozenPrefix, loader: Loader, *, views: int | None, mixed: bool
) -> StageInputs:
    """Return a split's batches: stored features where that is possible, else the loader as it is and the reason.

    Args:
        cache: None where it is switched off.
        prefix: The stages that are frozen from the input on, perhaps none.
        loader: The split's batches.
        views: Augmented views to keep per example, where the loader augments.
        mixed: Batches are blended at the input.
    """
    reason = reason_not_cached(
        prefix.count, cache=cache is not None, augments=loader.augments, views=views, mixed=mixed
    )
    if reason is not None or cache is None:
        return StageInputs(loader, 0, {"cached": False, "why": reason})
    entries = []
    wanted = range(views or 1) if loader.augments else (None,)
    for view in wanted:
        entry = cache.load_or_compute(prefix, loader, view=view, views=len(wanted))
        if isinstance(entry, str):
            return StageInputs(loader, 0, {"cached": False, "why": entry})
        entries.append(entry)
    size = sum(tensor.numel() * tensor.element_size() for entry in entries for tensor in entry.tensors)
    report = {"cached": True, "stages": prefix.stages, "views": len(entries) if loader.augments else None}
    return StageInputs(CachedLoader(loader, entries), prefix.count, report | {"bytes": size})


def reason_not_cached(stages: int, *, cache: bool, augments: bool, views: int | None, mixed: bool) -> str | None:
    """Return why features are not stored, as far as that is known without data; None where they are.

    Args:
        stages: How many are frozen from the input on and worth storing.
        cache: It is switched on.
        augments: The examples are augmented at random.
        views: Augmented views to keep per example.
        mixed: Batches are blended at the input.
    """
    if not stages:
        return "no stage is frozen from the input on, with its statistics of batch norm, that is worth storing"
    if not cache:
        return "train.cache is off"
    if mixed:
        return "train.mix blends examples at the input"
    if augments and views is None:
        return "augmentation differs from epoch to epoch (train.views: K keeps K augmented views of each example)"
    return None
