"""The frozen prefix of a model and its cache key."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transfer.config.train_settings import Precision
from transfer.data.loader import Loader
from transfer.data.randomness import preserve_rng_state
from transfer.feature_cache.content_digest import content_digest
from transfer.interfaces.preprocessing import move
from transfer.models.forward import forward_batches
from transfer.models.model import Model
from transfer.system.directory_cache import KEY_DIGITS

FORMAT = 3
BATCH_SIZE = 64
"""Batch size of the forward pass. It is the same in every run, because another batch size rounds differently."""
SAMPLE_EXAMPLES = 2
"""Examples whose features are part of the key: few, because they are computed even if all features are cached."""


@dataclass(frozen=True)
class FrozenPrefix:
    """The leading stages of a model that are frozen.

    Args:
        model: Model whose first stages are the prefix.
        count: Number of stages in the prefix.
        assets: Text files that the backbone learned from the training split (a vocabulary). They determine how raw
            values are encoded.
        precision: Precision of the forward pass.
    """

    model: Model
    count: int
    assets: Mapping[str, str]
    precision: Precision

    @property
    def stages(self) -> list[str]:
        """Names of the stages."""
        return list(self.model.stages)[: self.count]

    @property
    def device(self) -> torch.device:
        """Device that the stages compute on."""
        return next(self.model.parameters()).device

    def key(self, loader: Loader, view: int | None) -> str:
        """Return the digest of everything that determines the features of a split.

        It contains the digests of the stages and of the preprocessing (weights, all buffers, attributes and code), the
        examples, the precision and the type of the device. A sample of the features themselves is part of it too, so
        that a change which these digests miss is a different key.

        Args:
            loader: Batches of the split.
            view: Index of an augmented view. None does not augment.

        Raises:
            RecursionError: The attributes of a stage or of the preprocessing are nested too deeply to be digested.
        """
        if id(loader) not in self._facts:  # views of one split have these facts in common
            self._facts[id(loader)] = loader, self._facts_of(loader)
        facts = self._facts[id(loader)][1]
        if view is not None:
            facts = facts | {"view": view, "seed": loader.seed, "augmented": self._augmented_sample(loader, view)}
        # Sorted, because mappings of plugins may be in any order.
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    @functools.cached_property
    def _facts(self) -> dict[int, tuple[Loader, dict[str, Any]]]:
        return {}  # the loader is kept, so that no other one can have its id

    def _facts_of(self, loader: Loader) -> dict[str, Any]:
        # First of all, because stages may build masks and tables in their first forward pass.
        sample = self._sample(loader)
        return {
            "format": FORMAT,
            "device": self.device.type,
            "precision": self.precision,
            "fields": loader.fields,
            "examples": loader.split.fingerprint(*loader.fields),
            "assets": dict(self.assets),
            "described": dict(loader.preprocessing.describe()),
            "preprocessing": content_digest(loader.preprocessing),
            "stages": self.digest,
            "sample": sample,
        }

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the stages: weights, buffers, attributes and code."""
        # Only the stages of the prefix: other heads and other upper stages use the same features.
        return content_digest({name: self.model.stages[name] for name in self.stages})

    def _sample(self, loader: Loader) -> str:
        """Return the digest of the inputs and the features of the first examples by index, without augmentation."""
        if not len(loader.split):
            return ""
        batch = loader.in_fixed_order(SAMPLE_EXAMPLES, augment=False).batch(0, _sample_of(loader))
        with preserve_rng_state(), _reproducible(self.device):
            ((_, features),) = forward_batches(
                self.model, [batch], device=self.device, precision=self.precision, end_stage=self.count
            )
        return content_digest((batch.inputs, features))

    def _augmented_sample(self, loader: Loader, view: int) -> str:
        """Return the digest of the augmented inputs of the first examples by index."""
        examples = loader.in_fixed_order(SAMPLE_EXAMPLES, augment=True).examples
        return content_digest(examples.batch(view, _sample_of(loader)).inputs) if len(loader.split) else ""

    def probe(self, loader: Loader, view: int | None, examples: int) -> Any:
        """Return the features, on the CPU, of copies of the example that comes last in the fixed order (the shortest).

        Args:
            loader: Batches of the split.
            view: Index of an augmented view. None does not augment.
            examples: Number of copies.
        """
        fixed = loader.in_fixed_order(BATCH_SIZE, augment=view is not None)
        index = int(fixed.batch_indices(0)[-1][-1])
        with preserve_rng_state():
            batch = fixed.batch(view or 0, np.repeat(index, examples))
            ((_, features),) = forward_batches(
                self.model, [batch], device=self.device, precision=self.precision, end_stage=self.count
            )
        return move(features, torch.device("cpu"))

    def run(
        self, loader: Loader, view: int | None, limit: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], Any]]:
        """Yield indices (B,) and features, on the CPU, of the examples of a split, in batches of fixed size and order.

        Args:
            loader: Batches of the split. Their size and order are not used.
            view: Index of an augmented view. None does not augment.
            limit: Maximum number of batches. None runs all.
        """
        batches = loader.in_fixed_order(BATCH_SIZE, augment=view is not None).epoch(view or 0)
        for batch, features in forward_batches(
            self.model,
            islice(batches, limit),
            device=self.device,
            precision=self.precision,
            end_stage=self.count,
            out_of_memory_fix=f"set train.cache: off (cached features are computed in batches of {BATCH_SIZE})",
        ):
            # Moved to the CPU batch by batch: the features of a split may not fit into the memory of a GPU.
            yield batch.indices, move(features, torch.device("cpu"))


def _sample_of(loader: Loader) -> npt.NDArray[np.int64]:
    return np.arange(min(SAMPLE_EXAMPLES, len(loader.split)))


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose the same algorithm in every process: with benchmarks, the fastest one differs between runs."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
