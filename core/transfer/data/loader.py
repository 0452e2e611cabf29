"""Data loader: the order is a function of (seed, epoch), augmentation of (seed, epoch, example index)."""

from __future__ import annotations

import atexit
import copy
import functools
import itertools
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from transfer.data.batch import Batch, Shard, tensor_bytes
from transfer.data.encoding import encode, encode_all, encoded_lengths
from transfer.data.memory_cache import MemoryCache
from transfer.data.randomness import preserve_rng_state, seed_all
from transfer.errors import DataError, PluginError
from transfer.interfaces import Preprocessing, Sampler, Split
from transfer.system.devices import available_cores
from transfer.system.memory import free_shared_memory_bytes
from transfer.system.ranks import rank_from_environment

BUCKET_BATCHES = 50
"""Number of batches whose examples are sorted by length together: enough to save padding, few enough to stay random."""
MAX_AUTO_WORKERS = 16
"""Maximum number of loader processes that ``auto`` chooses."""
AMPLE_SHARED_MEMORY_BYTES = 2**31
"""Free shared memory above which no batch is measured."""
BATCHES_PER_WORKER = 3
"""Number of batches of a loader process in shared memory: two that are prefetched, and one that is read or written."""
MEASURED_EXAMPLES = 8
"""Number of examples from whose size the loader decides whether the encoded values of a split fit into memory."""


class Loader:
    """Loader of the batches of one split, for any epoch.

    Args:
        split: Raw examples.
        fields: Names of the fields that the backbone takes as input.
        preprocessing: Preprocessing of the backbone.
        batch_size: Number of examples per batch; the last batch may be smaller. None uses ``max_tokens``.
        max_tokens: Maximum size of a batch: its number of examples times the length of the longest. A longer example
            forms a batch of its own. Requires ``encode_once``, so that lengths are known.
        seed: Seed of the order and of augmentation.
        training: Whether to shuffle and augment. Otherwise the order is fixed, longest first, and nothing is random.
        augment: Whether to augment in training; False only shuffles.
        bucket: Whether examples of similar length share a batch, or the number of batches whose examples are sorted by
            length together (True: 50). Has no effect without ``encode_once``.
        workers: Number of loader processes, which live until the loader is deleted; 0 loads in this process. ``auto``
            uses none until :meth:`prepare_for` has chosen a number. Forked processes fill the memory cache together. If
            memory cannot be shared, this process fills it, and loader processes start afterwards.
        sampler: Order of the examples in training; None shuffles them.
        progress: Function that is called with the number of encoded values and that of all values, while a split is
            encoded once. None reports no progress.
        repeated: Whether the split is iterated more than once, so that keeping encoded values may be worthwhile.

    Raises:
        DataError: A value cannot be encoded with ``encode_once``; the error names the example.
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
        workers: int | Literal["auto"] = 0,
        repeated: bool = True,
        sampler: Sampler | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.split = split
        self.fields = fields
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.bucket_batches = BUCKET_BATCHES if bucket is True else int(bucket)
        self.seed = seed
        self.pin_memory = False
        self.training = training
        self.sampler = sampler
        self.examples = _BatchDataset(
            split,
            fields,
            preprocessing,
            seed=seed,
            augments=training and augment,
            caches_in_memory=repeated,
            progress=progress,
        )
        self.lengths: npt.NDArray[np.int64] | None = None
        if self.examples.encoded is not None and (bucket or max_tokens):
            self.lengths = encoded_lengths(preprocessing, self.examples.encoded)
        # Loader processes have nothing to do if values are encoded already and not augmented.
        self._workers = 0 if self.examples.encoded is not None and not self.examples.augments else workers
        self.workers = 0 if self._workers == "auto" else self._workers
        self._running: _TorchLoader | None = None

    def prepare_for(self, device: torch.device) -> None:
        """Pin memory and choose the number of loader processes for a device, if it is ``auto``.

        A GPU takes a batch in less time than one core needs to decode it, so that every core has to work. A CPU that
        trains has no core left for loader processes: the preprocessing may encode a batch in threads.
        """
        # Pinned memory takes time to allocate, and only copies to a GPU profit from it.
        self.pin_memory = device.type == "cuda"
        if self._workers == "auto":
            cores = available_cores() // rank_from_environment().local_world_size
            self.workers = min(MAX_AUTO_WORKERS, max(0, cores - 1)) if self.pin_memory else 0

    def __len__(self) -> int:
        """Return the number of batches in the first epoch."""
        return self.count(0)

    def count(self, epoch: int) -> int:
        """Return the number of batches in an epoch; with ``max_tokens`` or a sampler it may differ between epochs."""
        return len(self.batch_indices(epoch if self.max_tokens or self.sampler else 0))

    def batch_indices(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Return the example indices of each batch in an epoch, a function of only the seed and the epoch."""
        # Everything random comes from this generator, so that a resumed run and every rank make the same batches.
        num_examples = len(self.split)
        generator = np.random.default_rng((self.seed, epoch))
        lengths = self.lengths if self.bucket_batches else None
        if not self.training:
            return self._chunk(np.arange(num_examples) if lengths is None else np.argsort(-lengths, kind="stable"))
        order = generator.permutation(num_examples) if self.sampler is None else self._sampled(self.sampler, epoch)
        num_examples = len(order)
        if lengths is not None:
            # The shuffled order is cut into pools of bucket_batches batches, and each pool is sorted by length. With
            # max_tokens the number of examples per batch is estimated from the mean length.
            size = self.batch_size or max(1, int(self._max_tokens // lengths.mean()))
            pools = np.split(order, range(size * self.bucket_batches, num_examples, size * self.bucket_batches))
            order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        batches = self._chunk(order)
        if self.batch_size and len(batches) > 1 and len(batches[-1]) == 1:
            # Batch norm cannot train on one example: a last batch of one is merged with the batch before it.
            batches[-2:] = [np.concatenate(batches[-2:])]
        # Shuffled again, because batches of a sorted pool would otherwise come from short to long.
        return batches if lengths is None else [batches[i] for i in generator.permutation(len(batches))]

    def largest_batch(self, count: int) -> Batch:
        """Return a batch of the ``count`` longest examples, or of the first ones if lengths are unknown."""
        lengths = self.lengths
        if lengths is None and self.examples.encoded is not None:
            lengths = encoded_lengths(self.preprocessing, self.examples.encoded)
        # A stable sort keeps the result independent of NumPy's sorting algorithm.
        order = np.arange(len(self.split)) if lengths is None else np.argsort(-lengths, kind="stable")
        return self.batch(0, order[:count])

    def batch(self, epoch: int, indices: npt.NDArray[np.int64]) -> Batch:
        """Return the batch of some examples, augmented as in an epoch, loaded in this process."""
        return self.examples.batch(epoch, indices, self.preprocessing.to_device)

    @property
    def augments(self) -> bool:
        """Whether examples differ between epochs because of augmentation."""
        return self.examples.augments

    def in_fixed_order(self, batch_size: int, *, augment: bool) -> Loader:
        """Return a loader of the same examples in fixed order and another batch size, sharing the encoded values.

        Args:
            batch_size: Number of examples per batch.
            augment: Whether examples are augmented.
        """
        # Shallow copies: both loaders share the encoded values and the memory cache.
        other = copy.copy(self)
        other._running = None
        other.batch_size, other.max_tokens, other.training = batch_size, None, False
        other.examples = copy.copy(self.examples)
        other.examples.augments = augment
        other.examples.caches_in_memory = augment  # augmented views encode the same values repeatedly
        return other

    @functools.cached_property
    def pool(self) -> tuple[Loader, npt.NDArray[np.int64]] | None:
        """A loader of the pool of the split, and the index of each example in the pool; None without a pool."""
        if self.split.pool is None:
            return None
        split, rows = self.split.pool
        other = copy.copy(self)
        other.split, other._running = split, None
        augments = self.examples.augments
        other.examples = _BatchDataset(
            split, self.fields, self.preprocessing, seed=self.seed, augments=augments, caches_in_memory=False
        )
        if self.lengths is not None and other.examples.encoded is not None:
            other.lengths = encoded_lengths(self.preprocessing, other.examples.encoded)
        return other, rows

    def epoch(
        self, epoch: int = 0, *, start: int = 0, limit: int | None = None, shard: Shard | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: Index of the epoch, counted from 0 over all phases of the run.
            start: Number of batches to skip, to resume within an epoch.
            limit: Maximum number of batches; None yields all.
            shard: Function that selects the examples of this rank from each batch; None loads complete batches.
        """
        global_batches = self.batch_indices(epoch)[start:][:limit]
        batches = global_batches if shard is None else [shard(batch) for batch in global_batches]
        # Before loader processes start, so that they get the decision.
        self.examples.measure(shared=self.workers > 0)
        # Loader processes cannot fill a cache that belongs to this process only.
        fills_here = self.examples.is_filling_cache and not self.examples.memory_cache.is_shared
        workers = 0 if fills_here else min(self.workers, len(batches))
        if self._running is None or self._running.num_workers < workers:
            workers = self._workers_in_shared_memory(workers, epoch, batches) if workers else 0
            self._running = _TorchLoader(self.examples, workers, pin_memory=self.pin_memory) if workers else None
        loaded: Iterable[Batch | DataError]
        if self._running is None:
            loaded = self._loaded_here(epoch, batches)
        else:
            self._running.plan.start_epoch(epoch, batches)
            loaded = self._running
        for number, batch in enumerate(loaded):
            if isinstance(batch, DataError):
                raise batch
            if batch.to_device is None:  # loader processes would send the preprocessing with every batch
                batch = replace(batch, to_device=self.preprocessing.to_device)
            yield batch if shard is None else replace(batch, global_indices=global_batches[number])

    def _loaded_here(self, epoch: int, batches: Iterable[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        """Yield batches that this process loads. torch's DataLoader would take longer than a small batch."""
        for indices in batches:
            batch = self.batch(epoch, indices)
            yield batch.pin_memory() if self.pin_memory else batch

    def _sampled(self, sampler: Sampler, epoch: int) -> npt.NDArray[np.int64]:
        """Return the order of a sampler.

        Raises:
            PluginError: It is not an array of indices of the examples.
        """
        order = np.asarray(sampler.order(self.split.targets, self.seed, epoch))
        count = len(self.split)
        if order.ndim != 1 or not len(order) or order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= count:
            raise PluginError(
                f"the order of sampler {type(sampler).__name__} is wrong: expected int64 indices (M,) from 0 to "
                f"{count - 1}, got {order.dtype} {order.shape}"
            )
        return order.astype(np.int64, copy=False)

    def _workers_in_shared_memory(self, workers: int, epoch: int, batches: Sequence[npt.NDArray[np.int64]]) -> int:
        """Return the number of loader processes whose batches fit into the shared memory that is free now.

        Loader processes pass batches on in shared memory. If it is full, they are killed, or wait forever.
        """
        free = free_shared_memory_bytes() // rank_from_environment().local_world_size
        if free > AMPLE_SHARED_MEMORY_BYTES:
            return workers
        # Of the longest batch, because its texts need the most space.
        batch = self.batch(epoch, max(batches, key=len))
        size = max(1, tensor_bytes(batch.inputs) + tensor_bytes(batch.targets))
        fitting = min(workers, int(free // (BATCHES_PER_WORKER * size)))
        if fitting < workers:
            self.workers = fitting  # otherwise every epoch would start the processes again
            warnings.warn(
                f"the free shared memory (/dev/shm) has {free / 2**20:,.0f} MiB, which is too little for {workers} "
                f"loader processes with batches of {size / 2**20:,.1f} MiB: using {fitting} (train.workers)",
                stacklevel=2,
            )
        return fitting

    @property
    def _max_tokens(self) -> int:
        assert self.max_tokens is not None, "a loader has a batch_size or max_tokens"
        return self.max_tokens

    def _chunk(self, order: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Split an order into batches of ``batch_size`` examples, or of up to ``max_tokens`` tokens.

        With ``max_tokens`` each batch is filled greedily: its size with k examples is k times the longest length so
        far, which only grows with k, so the largest k is found by binary search.
        """
        if self.batch_size is not None:
            # np.split takes longer than this.
            return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        assert self.lengths is not None, "max_tokens needs values that are encoded once"
        lengths = self.lengths[order]
        batches, start = [], 0
        while start < len(order):
            # Every example costs at least as much as the first, which bounds the number to look at.
            ahead = lengths[start : start + max(1, self._max_tokens // max(1, int(lengths[start])))]
            costs = np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
            size = max(1, int(np.searchsorted(costs, self._max_tokens, side="right")))
            batches.append(order[start : start + size])
            start += size
        return batches


class _EpochPlan:
    """Batch sampler: the epoch and the example indices of each batch of the current epoch."""

    def __init__(self) -> None:
        self._epoch, self._batches = 0, list[npt.NDArray[np.int64]]()

    def start_epoch(self, epoch: int, batches: list[npt.NDArray[np.int64]]) -> None:
        self._epoch, self._batches = epoch, batches

    def __iter__(self) -> Iterator[Any]:  # torch expects lists of indices; its loader passes any value on
        return zip(itertools.repeat(self._epoch), self._batches)  # the first one is infinite


class _TorchLoader(DataLoader[Any]):
    """Torch's loader of a dataset of batches; its processes work through any number of epochs."""

    def __init__(self, examples: _BatchDataset, workers: int, *, pin_memory: bool) -> None:
        plan = _EpochPlan()
        super().__init__(
            examples,
            batch_sampler=plan,
            collate_fn=_identity_collate,  # type: ignore[arg-type]  # __getitems__ has collated already
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # DataLoader draws a seed: not from the generator of the model
            worker_init_fn=_ignore_signals,
            # Starting processes takes longer than an epoch of a small split.
            persistent_workers=True,
        )
        self.plan = plan

    def _get_iterator(self) -> Any:
        """Start the processes, and end them with this process even if somebody still refers to the loader."""
        iterator: Any = super()._get_iterator()
        for process in iterator._workers:
            process.terminate = process.kill  # torch terminates processes that are stuck, and they ignore SIGTERM
        # Registered after torch's own functions, so it runs before them: those only wait for the processes.
        atexit.register(_end_processes, weakref.ref(iterator))
        return iterator


def _end_processes(reference: weakref.ref[Any]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator._shutdown_workers()


def _ignore_signals(_: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a loader process.

    They may reach the complete process group, and the training process may still need batches to finish an epoch.
    """
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
    """Dataset of batches, indexed by an epoch and example indices. Loader processes get a copy.

    Args:
        split: Raw examples.
        fields: Names of the fields that the backbone takes as input.
        preprocessing: Preprocessing of the backbone.
        seed: Seed of augmentation.
        augments: Whether examples are augmented, if the preprocessing augments.
        caches_in_memory: Whether encoded values are kept in memory, if they fit.
        progress: Function that is called with the number of encoded values and that of all values. None reports no
            progress.
    """

    def __init__(
        self,
        split: Split,
        fields: tuple[str, ...],
        preprocessing: Preprocessing,
        *,
        seed: int,
        augments: bool,
        caches_in_memory: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.split = split
        self.column: Sequence[Any] = split.column(*fields)
        self.preprocessing = preprocessing
        self.seed = seed
        self.augments = augments and preprocessing.augments
        self.encoded: Sequence[Any] | None = None
        if preprocessing.encode_once:
            self.encoded = encode_all(preprocessing, self.column, split.name, progress)
        self.caches_in_memory = caches_in_memory and self.encoded is None
        self.memory_cache = MemoryCache(len(split), preprocessing.keep_bytes)

    @property
    def is_filling_cache(self) -> bool:
        """Whether encoded values are being added to the memory cache."""
        return self.caches_in_memory and self.memory_cache.is_filling

    def measure(self, *, shared: bool = False) -> None:
        """Measure once whether the encoded values of the split fit into memory, shared by loader processes or not."""
        if self.caches_in_memory and not self.memory_cache.is_measured:
            indices = np.unique(np.linspace(0, len(self.split) - 1, MEASURED_EXAMPLES, dtype=np.int64)).tolist()
            values = encode(self.preprocessing, self.column, indices, self.split.name)
            self.memory_cache.measure(dict(zip(indices, values, strict=True)), shared=shared)

    def __getitems__(self, key: tuple[int, npt.NDArray[np.int64]]) -> Batch | DataError:
        try:
            return self.batch(*key)
        except DataError as error:
            # DataLoader rebuilds an exception of a loader process from its text only. As a value it is pickled, with
            # its location and fix; Loader.epoch raises it.
            return error

    def batch(
        self,
        epoch: int,
        indices: npt.NDArray[np.int64],
        to_device: Callable[[Any, torch.device], Any] | None = None,
    ) -> Batch:
        """Return the batch of some examples, augmented as in an epoch, with the function that moves it to a device."""
        numbers: list[int] = indices.tolist()
        encoded = self._encoded(numbers)
        if self.augments:
            repeats = len(set(numbers)) < len(numbers)  # a sampler may draw an example twice
            with preserve_rng_state():
                for position, index in enumerate(numbers):
                    # Seeded for each example: the augmentation depends neither on the batch nor on the loader process.
                    seed_all(self.seed, epoch, index)
                    value = encoded[position]
                    if repeats or self.encoded is not None or index in self.memory_cache.values:
                        # An augmentation that works in place must not change the stored value.
                        value = _copied(value)
                    encoded[position] = self.preprocessing.augment(value)
        targets = torch.as_tensor(self.split.targets[indices])
        return Batch(self.preprocessing.collate(encoded), targets, indices, to_device=to_device)

    def _encoded(self, indices: list[int]) -> list[Any]:
        """Return the encoded values of some examples, from memory or newly encoded."""
        if self.encoded is not None:
            return [self.encoded[i] for i in indices]
        values = [self.memory_cache.get(i) for i in indices]
        missing = list(dict.fromkeys(i for i, value in zip(indices, values, strict=True) if value is None))
        if missing:
            # One call for all missing values: the preprocessing may encode them in parallel.
            fresh = dict(zip(missing, encode(self.preprocessing, self.column, missing, self.split.name), strict=True))
            values = [fresh[i] if value is None else value for i, value in zip(indices, values, strict=True)]
            if self.is_filling_cache:
                for index, value in fresh.items():
                    self.memory_cache.put(index, value)
        return values
