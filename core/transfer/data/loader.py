"""From raw examples to batches: the order is f(seed, epoch), augmentation is f(seed, epoch, index)."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from transfer.data.batch import Batch, Shard
from transfer.data.encoding import encode
from transfer.data.memory_cache import MemoryCache
from transfer.data.randomness import preserve_rng_state, seed_all
from transfer.errors import DataError
from transfer.interfaces import Preprocessing, Split

BUCKET_BATCHES = 50
"""Batches whose examples are sorted by length together: enough to save padding, few enough to stay random."""
MEASURED_EXAMPLES = 8
"""Whose size tells whether the encoded values of a split fit into memory."""


class Loader:
    """The batches of one split, epoch after epoch.

    Args:
        split: Raw examples.
        fields: The fields that the backbone consumes.
        preprocessing: The backbone's.
        batch_size: Examples per batch; the last one may be smaller. None: as ``max_tokens`` says.
        max_tokens: Instead: the most that a batch may cost, its examples times the longest's length. An example that
            costs more alone is a batch of its own. It needs values that are encoded once and so have known lengths.
        seed: Of order and augmentation.
        training: Shuffle and augment. Otherwise the order is fixed, longest first, and nothing is random.
        augment: In training; false: shuffle alone.
        bucket: Put examples of like length into one batch, where values are encoded once and so have known lengths: the
            number of batches whose examples are sorted together (True: 50).
        workers: Loader processes; 0 loads in this one. Where encoded values are kept in memory they are made in this
            one, by threads if the preprocessing has some, and loader processes begin once all are there.
        repeated: The split is gone through more than once, so encoded values may be worth keeping.

    Raises:
        DataError: A value that is encoded once cannot be encoded; the message names the example.
    """

    def __init__(
        self,
        split: Split,
        fields: tuple[str, ...],
        preprocessing: Preprocessing,
        *,
        batch_size: int | None,
        max_tokens: int | None = None,
        seed: int = 0,
        training: bool = False,
        augment: bool = True,
        bucket: bool | int = True,
        workers: int = 0,
        repeated: bool = True,
    ) -> None:
        self.split = split
        self.fields = fields
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.bucket_batches = BUCKET_BATCHES if bucket is True else int(bucket)
        self.seed = seed
        self.training = training
        self.examples = _BatchDataset(
            split, fields, preprocessing, seed=seed, augments=training and augment, caches_in_memory=repeated
        )
        self.lengths: npt.NDArray[np.int64] | None = None
        if self.examples.encoded is not None and (bucket or max_tokens):
            self.lengths = preprocessing.lengths(self.examples.encoded)
        # Values that are ready need no process to prepare them.
        self.workers = 0 if self.examples.encoded is not None and not self.examples.augments else workers

    def __len__(self) -> int:
        """The number of batches of the first epoch."""
        return self.count(0)

    def count(self, epoch: int) -> int:
        """Return the number of batches of an epoch; with ``max_tokens`` they may differ."""
        return len(self.batch_indices(epoch if self.max_tokens else 0))

    def batch_indices(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Return the indices of each batch of an epoch: a function of the seed and the epoch alone."""
        count = len(self.split)
        generator = np.random.default_rng((self.seed, epoch))
        lengths = self.lengths if self.bucket_batches else None
        if not self.training:
            return self._chunk(np.arange(count) if lengths is None else np.argsort(-lengths, kind="stable"))
        order = generator.permutation(count)
        if lengths is not None:
            size = self.batch_size or max(1, int(self._most_tokens // lengths.mean()))
            pools = np.split(order, range(size * self.bucket_batches, count, size * self.bucket_batches))
            order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        batches = self._chunk(order)
        if self.batch_size and len(batches) > 1 and len(batches[-1]) == 1:
            # Batch norm cannot train on a batch of one: it joins the batch before.
            batches[-2:] = [np.concatenate(batches[-2:])]
        return batches if lengths is None else [batches[i] for i in generator.permutation(len(batches))]

    def largest_batch(self, count: int) -> Batch:
        """Return a batch of the examples that cost most: the longest, where lengths are known, else any."""
        lengths = self.lengths
        if lengths is None and self.examples.encoded is not None:
            lengths = self.preprocessing.lengths(self.examples.encoded)
        order = np.arange(len(self.split)) if lengths is None else np.argsort(-lengths, kind="stable")
        return self.examples.batch([(0, int(index)) for index in order[:count]])

    @property
    def augments(self) -> bool:
        """Examples differ from epoch to epoch."""
        return self.examples.augments

    def in_fixed_order(self, batch_size: int, *, augment: bool) -> Loader:
        """Return the same examples, encoded once for both, in batches of another size and in no random order."""
        other = copy.copy(self)
        other.batch_size, other.max_tokens, other.training = batch_size, None, False
        other.examples = copy.copy(self.examples)
        other.examples.augments = augment
        other.examples.caches_in_memory = augment  # one of several views
        return other

    def epoch(
        self, epoch: int = 0, *, start: int = 0, limit: int | None = None, shard: Shard | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: Which one, counted from 0 over the whole run.
            start: Batches to leave out at the beginning (a run that goes on).
            limit: Yield no more than this many.
            shard: Load of each batch this process's share alone.
        """
        whole = self.batch_indices(epoch)[start:][:limit]
        batches = whole if shard is None else [shard(batch) for batch in whole]
        self.examples.measure()
        loader: DataLoader[Any] = DataLoader(
            self.examples,
            # One batch's pairs at a time: a million examples are not a million tuples.
            batch_sampler=([(epoch, int(i)) for i in batch] for batch in batches),
            collate_fn=_identity_collate,  # type: ignore[arg-type]  # __getitems__ has made the batch already
            num_workers=0 if self.examples.is_filling_cache else min(self.workers, len(batches)),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # it draws from this one, not from the model's
            worker_init_fn=_ignore_signals,
        )
        for number, batch in enumerate(loader):
            if isinstance(batch, DataError):
                raise batch
            yield batch if shard is None else replace(batch, global_indices=whole[number])

    @property
    def _most_tokens(self) -> int:
        assert self.max_tokens is not None, "a loader has a batch_size or max_tokens"
        return self.max_tokens

    def _chunk(self, order: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut an order into batches of ``batch_size``, or as long as each fits into ``max_tokens``."""
        if self.batch_size is not None:
            return np.split(order, range(self.batch_size, len(order), self.batch_size))
        assert self.lengths is not None, "max_tokens needs values that are encoded once"
        lengths = self.lengths[order]
        batches, start = [], 0
        while start < len(order):
            # No more can fit than were all as short as the first.
            ahead = lengths[start : start + max(1, self._most_tokens // max(1, int(lengths[start])))]
            costs = np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
            size = max(1, int(np.searchsorted(costs, self._most_tokens, side="right")))  # costs only rise
            batches.append(order[start : start + size])
            start += size
        return batches


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach a whole group, to the training process: it may want another batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _identity_collate(batch: Batch) -> Batch:
    return batch


def _copied(value: Any) -> Any:
    """Return a copy of an encoded value: of its tensors and arrays, and of the containers that hold them."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its items one by one
        return type(value)(*map(_copied, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


class _BatchDataset(Dataset[Any]):
    """Makes batches of (epoch, index) pairs; loader processes get a copy."""

    def __init__(
        self,
        split: Split,
        fields: tuple[str, ...],
        preprocessing: Preprocessing,
        *,
        seed: int,
        augments: bool,
        caches_in_memory: bool,
    ) -> None:
        self.split = split
        self.column: Sequence[Any] = split.column(*fields)
        self.preprocessing = preprocessing
        self.seed = seed
        self.augments = augments and preprocessing.augments
        self.encoded: Sequence[Any] | None = None
        if preprocessing.encode_once:
            self.encoded = encode(preprocessing, self.column, range(len(split)), split.name)
        self.caches_in_memory = caches_in_memory and self.encoded is None
        self.memory_cache = MemoryCache(len(split), preprocessing.keep_bytes)

    @property
    def is_filling_cache(self) -> bool:
        """Encoded values are being collected in memory."""
        return self.caches_in_memory and self.memory_cache.is_filling

    def measure(self) -> None:
        """Find out, once, whether the encoded values of the split fit into memory."""
        if self.caches_in_memory and not self.memory_cache.is_measured:
            indices = np.unique(np.linspace(0, len(self.split) - 1, MEASURED_EXAMPLES, dtype=np.int64)).tolist()
            values = encode(self.preprocessing, self.column, indices, self.split.name)
            self.memory_cache.measure(dict(zip(indices, values, strict=True)))

    def __getitem__(self, pair: tuple[int, int]) -> Batch:
        return self.batch([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Batch | DataError:
        try:
            return self.batch(pairs)
        except DataError as error:
            # An exception that leaves a loader process is rebuilt from its text alone; as a value it arrives whole.
            return error

    def batch(self, pairs: list[tuple[int, int]]) -> Batch:
        indices = np.array([index for _, index in pairs])
        encoded = self._encoded(indices.tolist())
        if self.augments:
            with preserve_rng_state():
                for place, (epoch, index) in enumerate(pairs):
                    seed_all(self.seed, epoch, index)
                    value = encoded[place]
                    if self.encoded is not None or index in self.memory_cache.values:
                        # An augmentation that works in place must not change the stored value.
                        value = _copied(value)
                    encoded[place] = self.preprocessing.augment(value)
        return Batch(self.preprocessing.collate(encoded), torch.as_tensor(self.split.targets[indices]), indices)

    def _encoded(self, indices: list[int]) -> list[Any]:
        if self.encoded is not None:
            return [self.encoded[i] for i in indices]
        missing = [i for i in indices if i not in self.memory_cache.values]
        fresh = dict(zip(missing, encode(self.preprocessing, self.column, missing, self.split.name), strict=True))
        found = [fresh[i] if i in fresh else self.memory_cache.values[i] for i in indices]
        if self.is_filling_cache:
            for index, value in fresh.items():
                self.memory_cache.put(index, value)
        return found
