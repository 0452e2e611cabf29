"""From raw examples to batches: the order is f(seed, epoch), augmentation is f(seed, epoch, index)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from transfer.errors import DataError
from transfer.interfaces import Preprocessing, Split

BUCKET_BATCHES = 50
"""Batches whose examples are sorted by length together: enough to save padding, few enough to stay random."""


@dataclass(frozen=True)
class Batch:
    """What one step consumes.

    Args:
        inputs: The backbone's input: a tensor or a tuple of tensors, batch first.
        targets: int64 (B,) or float32 (B, C).
        indices: int64 (B,), the examples' places in their split.
    """

    inputs: Any
    targets: Tensor
    indices: npt.NDArray[np.int64]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(move(self.inputs, device), self.targets.to(device, non_blocking=True), self.indices)


def move(inputs: Any, device: torch.device) -> Any:
    """Return a backbone's input (a tensor or a tuple of tensors) on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return tuple(move(item, device) for item in inputs)


class Loader:
    """The batches of one split, epoch after epoch.

    Args:
        split: Raw examples.
        field: The field that the backbone consumes.
        preprocessing: The backbone's.
        batch_size: Examples per batch; the last one may be smaller. None: as ``max_tokens`` says.
        max_tokens: Instead: the most that a batch may cost, its examples times the longest's length. An example that
            costs more alone is a batch of its own. It needs values that are encoded once and so have known lengths.
        seed: Of order and augmentation.
        training: Shuffle and augment. Otherwise the order is fixed, longest first, and nothing is random.
        bucket: Put examples of like length into one batch, where values are encoded once and so have known lengths: the
            number of batches whose examples are sorted together (True: 50).
        workers: Loader processes; 0 loads in this one.

    Raises:
        DataError: A value that is encoded once cannot be encoded; the message names the example.
    """

    def __init__(
        self,
        split: Split,
        field: str,
        preprocessing: Preprocessing,
        *,
        batch_size: int | None,
        max_tokens: int | None = None,
        seed: int = 0,
        training: bool = False,
        bucket: bool | int = True,
        workers: int = 0,
    ) -> None:
        self.split = split
        self.field = field
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.bucket_batches = BUCKET_BATCHES if bucket is True else int(bucket)
        self.seed = seed
        self.training = training
        self.examples = _Examples(split, field, preprocessing, seed=seed, augments=training)
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
        return len(self.plan(epoch if self.max_tokens else 0))

    def plan(self, epoch: int) -> list[npt.NDArray[np.int64]]:
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
        return other

    def epoch(self, epoch: int = 0, *, first: int = 0, most: int | None = None) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: Which one, counted from 0 over the whole run.
            first: Batches to leave out at the beginning (a run that goes on).
            most: Yield no more than this many.
        """
        batches = self.plan(epoch)[first:][:most]
        loader: DataLoader[Any] = DataLoader(
            self.examples,
            batch_sampler=[[(epoch, int(i)) for i in batch] for batch in batches],
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # __getitems__ has made the batch already
            num_workers=min(self.workers, len(batches)),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # it draws from this one, not from the model's
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

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


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _Examples(Dataset[Any]):
    """Makes batches of (epoch, index) pairs; loader processes get a copy."""

    def __init__(self, split: Split, field: str, preprocessing: Preprocessing, *, seed: int, augments: bool) -> None:
        self.split = split
        self.column: Sequence[Any] = split.fields[field]
        self.preprocessing = preprocessing
        self.seed = seed
        self.augments = augments and preprocessing.augments
        self.encoded: Sequence[Any] | None = None
        if preprocessing.encode_once:
            self.encoded = encode(preprocessing, self.column, range(len(split)), split.name)

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
        if self.encoded is not None:
            encoded = [self.encoded[i] for i in indices]
        else:
            encoded = list(encode(self.preprocessing, self.column, indices.tolist(), self.split.name))
        if self.augments:
            with _own_randomness():
                for place, (epoch, index) in enumerate(pairs):
                    _seed_all(self.seed, epoch, index)
                    encoded[place] = self.preprocessing.augment(encoded[place])
        return Batch(self.preprocessing.collate(encoded), torch.as_tensor(self.split.targets[indices]), indices)


def encode(
    preprocessing: Preprocessing, column: Sequence[Any], indices: Sequence[int], name: Callable[[int], str]
) -> Sequence[Any]:
    """Encode some values of a column; if that fails, find out which one it is.

    Args:
        preprocessing: The backbone's.
        column: Raw values.
        indices: Which of them, in order.
        name: What a value is called in messages, by index.

    Raises:
        DataError: Names the value that cannot be encoded.
    """
    try:
        return preprocessing.encode([column[i] for i in indices])
    except (ValueError, OSError) as error:
        for index in indices:
            try:
                preprocessing.encode([column[index]])
            except (ValueError, OSError) as one:
                raise DataError(f"cannot be read: {one}", where=name(index), fix="mend or remove it") from one
        raise DataError(f"a batch cannot be encoded: {error}") from error


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the global generators afterwards: augmentation must not move the model's own randomness."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _seed_all(*parts: int) -> None:
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
