"""Training on cached features of the frozen prefix.

Frozen leading stages compute the same features in every epoch, so they run once per example, and their features are
stored on disk. The key of an entry contains everything that determines the features: weights, buffers, attributes and
code of the stages and of the preprocessing, the examples, the precision and, for augmented views, the seed. Different
runs therefore use the same entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transfer.data.batch import Batch, Shard
from transfer.data.loader import Loader
from transfer.feature_cache.entry import Entry, take
from transfer.feature_cache.prefix import FrozenPrefix
from transfer.feature_cache.store import FeatureCache

AUTO_VIEWS = 4
"""Number of augmented views that ``train.views: auto`` caches, as accurate as a new view per epoch (docs/log.md)."""


class CachedLoader:
    """The batches of a loader, with cached features as inputs.

    Args:
        loader: Loader that determines the order of the examples.
        views: One entry per augmented view. In each epoch, a view is drawn for each example from (seed, epoch, index).
    """

    def __init__(self, loader: Loader, views: Sequence[Entry]) -> None:
        self.loader = loader
        self.split = loader.split
        self.views = tuple(views)

    def __len__(self) -> int:
        """Number of batches in the first epoch."""
        return len(self.loader)

    def count(self, epoch: int) -> int:
        """Return the number of batches in an epoch."""
        return self.loader.count(epoch)

    def epoch(
        self, epoch: int = 0, *, start: int = 0, limit: int | None = None, shard: Shard | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch, as :meth:`transfer.data.loader.Loader.epoch`."""
        # A function of seed, epoch and index, like the augmentation that it replaces.
        views = np.zeros(len(self.split), dtype=np.int64)
        if len(self.views) > 1:
            # The 1 makes the draw independent of the order of the examples, which comes from (seed, epoch).
            views = np.random.default_rng((self.loader.seed, epoch, 1)).integers(len(self.views), size=len(self.split))
        for whole in self.loader.batch_indices(epoch)[start:][:limit]:
            indices = whole if shard is None else shard(whole)
            targets = torch.as_tensor(self.split.targets[indices])
            yield Batch(take(self.views, views[indices], indices), targets, indices, None if shard is None else whole)


@dataclass(frozen=True)
class StageInputs:
    """The batches of a split, and the stage that takes them as inputs.

    Args:
        loader: Loader of raw examples or of cached features.
        first_stage: Index of the stage that takes the batches.
        report: Cached stages, views and bytes, or the reason why nothing is cached; for the log and the summary.
    """

    loader: Loader | CachedLoader
    first_stage: int
    report: dict[str, Any]

    def __str__(self) -> str:
        if not self.report["cached"]:
            return f"not cached: {self.report['why']}"
        views = self.report["views"]
        text = f", {views} view{'s' * (views > 1)} each" if views else ""
        return f"cached after {self.report['stages'][-1]}{text} ({self.report['bytes'] / 2**20:.1f} MiB)"


def select_stage_inputs(
    cache: FeatureCache | None, prefix: FrozenPrefix, loader: Loader, *, views: int | None, mixed: bool
) -> StageInputs:
    """Return the cached features of a split if they can be cached, otherwise its raw batches and the reason.

    Args:
        cache: The feature cache. None disables it.
        prefix: Frozen leading stages; the prefix may be empty.
        loader: Batches of the split.
        views: Number of augmented views to cache per example. Not used if the loader does not augment.
        mixed: Whether examples are mixed at the input (mixup, CutMix).
    """
    reason = reason_not_cached(
        prefix.count,
        cache=cache is not None,
        augments=loader.augments,
        views=views,
        mixed=mixed,
        batch_norm=prefix.model.has_batch_norm,
    )
    # Without a cache there is always a reason; the second condition is for the type checker.
    if reason is not None or cache is None:
        return StageInputs(loader, 0, {"cached": False, "why": reason})
    entries = []
    wanted = range(views or 1) if loader.augments else (None,)
    for view in wanted:
        entry = cache.load_or_compute(prefix, loader, view=view, views=len(wanted))
        # Some views without the others would change the augmentation, so all of them are cached or none.
        if isinstance(entry, str):
            return StageInputs(loader, 0, {"cached": False, "why": entry})
        entries.append(entry)
    size = sum(tensor.numel() * tensor.element_size() for entry in entries for tensor in entry.tensors)
    report = {"cached": True, "stages": prefix.stages, "views": len(entries) if loader.augments else None}
    entries = [entry.on_device(prefix.device) for entry in entries]
    return StageInputs(CachedLoader(loader, entries), prefix.count, report | {"bytes": size})


def reason_not_cached(
    stages: int, *, cache: bool, augments: bool, views: int | None, mixed: bool, batch_norm: bool = False
) -> str | None:
    """Return the reason why features are not cached, as far as it is known without data; None if they are cached.

    Args:
        stages: Number of frozen leading stages that are worth caching.
        cache: Whether the cache is enabled.
        augments: Whether the examples are augmented at random.
        views: Number of augmented views to cache per example.
        mixed: Whether examples are mixed at the input (mixup, CutMix).
        batch_norm: Whether the model has batch-norm layers, whose statistics must be frozen too.
    """
    if not stages:
        statistics = " (including batch-norm statistics)" if batch_norm else ""
        return f"no leading stage is fully frozen{statistics} and worth caching"
    if not cache:
        return "train.cache is off"
    if mixed:
        return "train.mix mixes examples at the input"
    if augments and views is None:
        return (
            "random augmentation differs in each epoch (train.views: K caches K augmented views of each example; auto "
            f"caches {AUTO_VIEWS} if the backbone is frozen for more than {AUTO_VIEWS} epochs)"
        )
    return None
