"""Loader, batches and memory cache."""

from __future__ import annotations

import itertools
import pickle
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from transfer import DataError, Preprocessing, Split
from transfer.data import loader as loading, memory_cache
from transfer.data.batch import Batch, TimedIterator, move
from transfer.data.encoding import MAX_PROBLEMS, encode
from transfer.data.loader import Loader


class Ragged(Preprocessing):
    """Lists of numbers, padded with zeros; a negative one cannot be encoded."""

    encode_once: ClassVar[bool] = True

    def encode(self, values: Sequence[Any]) -> list[Tensor]:
        for value in values:
            if min(value) < 0:
                raise ValueError("a number is negative")
        return [torch.tensor(value, dtype=torch.float32) for value in values]

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(encoded), batch_first=True)

    def length(self, encoded: Tensor) -> int:
        return len(encoded)

    def read(self, source: str) -> Any:
        return [float(source)]


class Lazy(Ragged):
    """Ragged values, encoded batch by batch."""

    encode_once: ClassVar[bool] = False


class Noisy(Lazy):
    """Lazy values with noise from every global generator."""

    def augment(self, encoded: Tensor) -> Tensor:
        return encoded + torch.rand(1) + float(np.random.rand()) + random.random()


class NoisyOnce(Noisy):
    """Noise on values that are encoded once."""

    encode_once: ClassVar[bool] = True


def split(count: int = 50, *, longest: int = 12) -> Split:
    lengths = np.random.default_rng(1).integers(1, longest + 1, count)
    return Split({"x": [[float(i)] * n for i, n in enumerate(lengths)]}, np.arange(count) % 3)


def loader(preprocessing: Preprocessing, part: Split | None = None, **options: Any) -> Loader:
    return Loader(part or split(), ("x",), preprocessing, **{"batch_size": 8, "training": True, **options})


def batches(made: Loader, epoch: int = 0) -> list[Batch]:
    return list(made.epoch(epoch))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and np.array_equal(a.indices, b.indices)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("preprocessing", [Ragged(), Lazy(), Noisy(), NoisyOnce()])
def test_batches_depend_on_seed_and_epoch(preprocessing: Preprocessing) -> None:
    one = loader(preprocessing, seed=5)
    first, second = batches(one, 0), batches(one, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert same(batches(loader(preprocessing, seed=5), 1), second)
    assert same(batches(one, 0), first)
    assert not same(first, second)
    assert not same(batches(loader(preprocessing, seed=6), 0), first)


@pytest.mark.parametrize("preprocessing", [Lazy(), Noisy(), NoisyOnce()])
def test_batches_do_not_depend_on_workers(preprocessing: Preprocessing) -> None:
    assert same(batches(loader(preprocessing, workers=2), 3), batches(loader(preprocessing, workers=0), 3))


def test_augmentation_differs_by_example_and_epoch() -> None:
    part = Split({"x": [[0.0]] * 40}, np.zeros(40, dtype=np.int64))
    made = loader(Noisy(), part)
    drawn = [{round(float(v), 5) for batch in batches(made, epoch) for v in batch.inputs} for epoch in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 40
    assert len(drawn[0] | drawn[1]) == 80


def test_augmentation_preserves_rng_state() -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    made = loader(Noisy()).epoch()
    next(made)
    before = states()
    assert len(list(made)) == 6
    assert states() == before


def test_evaluation_is_not_augmented() -> None:
    made = loader(Noisy(), training=False)
    assert same(batches(made, 0), batches(made, 1))
    for batch in batches(made):
        assert torch.equal(batch.inputs[:, 0], torch.as_tensor(batch.indices, dtype=torch.float32))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preprocessing", [Ragged(), Lazy()])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 50, 1000])
def test_epoch_contains_every_example_once(preprocessing: Preprocessing, training: bool, count: int) -> None:
    made = loader(preprocessing, split(count), training=training)
    indices = np.concatenate([batch.indices for batch in batches(made)])
    assert sorted(indices.tolist()) == list(range(count))
    assert len(made) == len(batches(made))


def test_inputs_and_targets_match_indices() -> None:
    for batch in batches(loader(Ragged())):
        assert batch.inputs[:, 0].tolist() == batch.indices.tolist()
        assert batch.targets.tolist() == (batch.indices % 3).tolist()
        assert batch.targets.dtype == torch.int64


def test_last_batch_of_one_is_merged_in_training() -> None:
    sizes = [len(batch) for batch in loader(Lazy(), split(17)).batch_indices(0)]
    assert sizes == [8, 9]
    assert [len(batch) for batch in loader(Lazy(), split(17), training=False).batch_indices(0)] == [8, 8, 1]
    assert [len(batch) for batch in loader(Lazy(), split(1)).batch_indices(0)] == [1]


def padding_fraction(made: Loader) -> float:
    inputs = [batch.inputs for batch in batches(made)]
    lengths = sum(len(value) for value in made.split.fields["x"])
    return 1 - lengths / sum(tensor.numel() for tensor in inputs)


def test_buckets_save_padding() -> None:
    part = split(800, longest=100)
    without, with_buckets = (padding_fraction(loader(Ragged(), part, bucket=b)) for b in (False, True))
    assert without > 0.3
    assert with_buckets < 0.1


def test_buckets_stay_random() -> None:
    made = loader(Ragged(), split(800, longest=100))
    first, second = made.batch_indices(0), made.batch_indices(1)
    assert not any(set(a) == set(b) for a in first for b in second)
    lengths = [max(len(made.split.fields["x"][i]) for i in batch) for batch in first]
    assert lengths != sorted(lengths)


def test_evaluation_order_is_by_decreasing_length() -> None:
    made = loader(Ragged(), training=False)
    lengths = [len(made.split.fields["x"][i]) for batch in made.batch_indices(0) for i in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_epoch_with_start_and_limit() -> None:
    made = loader(Noisy())
    complete = batches(made, 2)
    assert same(list(made.epoch(2, start=3)), complete[3:])
    assert same(list(made.epoch(2, start=1, limit=2)), complete[1:3])
    assert list(made.epoch(2, start=len(complete))) == []


BROKEN = Split({"x": [[1.0], [2.0], [-3.0], [4.0]]}, np.zeros(4, dtype=np.int64), ["a", "b", "c.txt", "d"])


@pytest.mark.parametrize("size", [1, 7, 50, 200])
def test_split_is_encoded_in_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    expected = batches(loader(Ragged(), max_tokens=40, batch_size=None))
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr("transfer.data.encoding.BLOCK_EXAMPLES", size)
    made = loader(Ragged(), max_tokens=40, batch_size=None, progress=lambda *step: steps.append(step))
    assert same(batches(made), expected)
    assert steps == [(min(start, 50), 50) for start in range(0, 50 + size, size)]
    encoded = made.examples.encoded
    assert encoded is not None
    assert [value.tolist() for value in encoded[::-1]] == split().fields["x"][::-1]
    assert encoded[-1] is encoded[49]
    with pytest.raises(IndexError):
        encoded[50]


def test_error_names_examples_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.data.encoding.BLOCK_EXAMPLES", 2)
    values = [[1.0], [-1.0], [2.0], [3.0], [-1.0]]
    with pytest.raises(DataError) as caught:
        loader(Ragged(), Split({"x": values}, np.arange(5) % 3))
    assert [problem.where for problem in caught.value.problems] == ["example 1", "example 4"]


def test_encode_once_error_names_example() -> None:
    with pytest.raises(DataError, match="a number is negative") as caught:
        loader(Ragged(), BROKEN)
    assert caught.value.problems[0].where == "c.txt"


def test_batch_error_names_example() -> None:
    with pytest.raises(DataError, match="a number is negative") as caught:
        batches(loader(Lazy(), BROKEN))
    assert caught.value.problems[0].where == "c.txt"


def test_error_of_complete_batch() -> None:
    class Choosy(Lazy):
        def encode(self, values: Sequence[Any]) -> list[Tensor]:
            if len(values) > 1:
                raise ValueError("too many")
            return super().encode(values)

    with pytest.raises(DataError, match="a batch cannot be encoded: too many"):
        encode(Choosy(), [[1.0], [2.0]], [0, 1], str)


def test_move_nested_tuples() -> None:
    moved = move((torch.zeros(1), (torch.ones(2), torch.ones(3))), torch.device("meta"))
    assert [moved[0].device.type, moved[1][0].device.type, moved[1][1].shape] == ["meta", "meta", (3,)]


def test_batch_is_pinned_by_torch_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader does not pin objects without this method, and copies from other memory are synchronous."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    inputs, targets = (torch.zeros(2, 1), (torch.ones(2, 2),)), torch.zeros(2)
    batch = torch.utils.data._utils.pin_memory.pin_memory(Batch(inputs, targets, np.arange(2)))
    assert batch.inputs[1][0] is inputs[1][0]
    assert [id(tensor) for tensor in pinned] == [id(inputs[0]), id(inputs[1][0]), id(targets)]


def test_iteration_preserves_rng_state() -> None:
    made = loader(Noisy())
    before = torch.get_rng_state().tolist()
    batches(made)
    assert torch.get_rng_state().tolist() == before


class Pair(NamedTuple):
    """An encoded value of two tensors."""

    first: Tensor
    second: Tensor


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda tensor: tensor,
    "array": lambda tensor: tensor.numpy(),
    "list": lambda tensor: [tensor, tensor.clone()],
    "tuple of an array": lambda tensor: (tensor.numpy(),),
    "named tuple": lambda tensor: Pair(tensor, tensor.clone()),
    "dict": lambda tensor: {"x": tensor},
}


class InPlace(Preprocessing):
    """Numbers in a container, which augmentation doubles in place."""

    container: str
    once: bool

    @property
    def encode_once(self) -> bool:  # type: ignore[override]
        return self.once

    @property
    def keep_bytes(self) -> int | None:
        return None

    def encode(self, values: Sequence[Any]) -> list[Any]:
        return [CONTAINERS[self.container](torch.tensor(value)) for value in values]

    def augment(self, encoded: Any) -> Any:
        for item in encoded.values() if isinstance(encoded, dict) else [encoded]:
            for tensor in item if isinstance(item, list | tuple) else [item]:
                tensor *= 2
        return encoded

    def collate(self, encoded: Sequence[Any]) -> Tensor:
        first = [next(iter(e.values())) if isinstance(e, dict) else e for e in encoded]
        return torch.stack([torch.as_tensor(e[0] if isinstance(e, list | tuple) else e) for e in first])

    def read(self, source: str) -> Any:
        return [float(source)]


@pytest.mark.parametrize(
    ("container", "once"),
    # The memory cache takes only tensors and arrays.
    [*((container, True) for container in CONTAINERS), ("tensor", False), ("array", False)],
)
def test_augmentation_in_place_leaves_stored_values_unchanged(container: str, once: bool) -> None:
    preprocessing = InPlace()
    preprocessing.container, preprocessing.once = container, once
    made = loader(preprocessing, Split({"x": [[1.0, 1.0]] * 10}, [0] * 10))
    for epoch in range(3):
        for batch in made.epoch(epoch):
            assert batch.inputs.eq(2).all()


def test_buckets_have_no_batch_of_one() -> None:
    made = loader(Ragged(), split(8 * 50 * 2 + 1), batch_size=8)
    sizes = [len(batch) for batch in made.batch_indices(0)]
    assert min(sizes) > 1
    assert max(sizes) <= 9


def test_loader_process_error_names_example() -> None:
    with pytest.raises(DataError, match="a number is negative") as caught:
        batches(loader(Lazy(), BROKEN, workers=2))
    assert caught.value.problems[0].where == "c.txt"


def costs(made: Loader, epoch: int = 0) -> list[int]:
    """Return the size of each batch when padded to its longest example."""
    assert made.lengths is not None
    return [len(batch) * int(made.lengths[batch].max()) for batch in made.batch_indices(epoch)]


def by_tokens(part: Split | None = None, max_tokens: int = 40, **options: Any) -> Loader:
    return loader(Ragged(), part, batch_size=None, max_tokens=max_tokens, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bucket", [True, False, 3])
def test_max_tokens_limits_size_of_batches(training: bool, bucket: bool | int) -> None:
    made = by_tokens(split(400), training=training, bucket=bucket)
    for epoch in range(3):
        plan = made.batch_indices(epoch)
        assert sorted(np.concatenate(plan).tolist()) == list(range(400))
        assert max(costs(made, epoch)) <= 40
        assert made.count(epoch) == len(plan) == len(batches(made, epoch))


def test_max_tokens_fills_batches() -> None:
    made = by_tokens(split(400), bucket=False)
    assert made.lengths is not None
    plan = made.batch_indices(0)
    for batch, following in itertools.pairwise(plan):
        together = [*batch, following[0]]
        assert len(together) * int(made.lengths[together].max()) > 40


def test_max_tokens_puts_longer_example_into_own_batch() -> None:
    part = Split({"x": [[1.0] * n for n in (3, 90, 4, 2)]}, np.zeros(4, dtype=np.int64))
    for bucket in (True, False):
        plan = by_tokens(part, bucket=bucket).batch_indices(0)
        assert [1] in [batch.tolist() for batch in plan]
        assert sorted(np.concatenate(plan).tolist()) == [0, 1, 2, 3]


def test_max_tokens_batch_count_differs_between_epochs() -> None:
    made = by_tokens(split(400), bucket=False)
    assert len({made.count(epoch) for epoch in range(8)}) > 1
    assert len(made) == made.count(0)


def test_buckets_need_fewer_batches() -> None:
    part = split(800, longest=100)
    plain, buckets = (by_tokens(part, 1000, bucket=bucket).count(0) for bucket in (False, True))
    assert buckets < 0.75 * plain


def test_fixed_order_ignores_max_tokens() -> None:
    sizes = [len(batch) for batch in by_tokens(split(50)).in_fixed_order(16, augment=False).batch_indices(0)]
    assert sizes == [16, 16, 16, 2]


def test_larger_pools_save_more_padding() -> None:
    part = split(800, longest=100)
    fractions = [padding_fraction(loader(Ragged(), part, bucket=batches)) for batches in (1, 4, True)]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] > 0.25


def test_overridden_lengths_are_used() -> None:
    class Known(Ragged):
        def length(self, encoded: Tensor) -> int:
            raise AssertionError("length is called for one value")

        def lengths(self, encoded: Sequence[Any]) -> np.ndarray[Any, Any]:
            return np.array([len(value) for value in encoded])

    assert same(batches(loader(Known())), batches(loader(Ragged())))


class InMemory(Preprocessing):
    """Vectors that are augmented in place, with the number of encoded values."""

    limit: int | None
    encoded: list[int]

    @property
    def keep_bytes(self) -> int | None:
        return self.limit

    def encode(self, values):
        self.encoded.append(len(values))
        return [torch.tensor(value) for value in values]

    def collate(self, encoded):
        return torch.stack(encoded)

    def read(self, source):
        return [float(source)]

    def augment(self, encoded):
        return encoded.mul_(torch.rand(1))


def cached_loader(limit: int | None, **options: object) -> Loader:
    preprocessing = InMemory()
    preprocessing.limit, preprocessing.encoded = limit, []
    split = Split({"point": [[float(i), 1.0, 2.0, 3.0] for i in range(40)]}, np.arange(40) % 2)
    return Loader(split, ("point",), preprocessing, batch_size=8, training=True, **options)


def sums(loader: Loader, epoch: int) -> list[torch.Tensor]:
    return [batch.inputs.clone() for batch in loader.epoch(epoch)]


def test_memory_cache_encodes_once_and_keeps_batches() -> None:
    cached, plain = cached_loader(40 * 16), cached_loader(0)
    for epoch in (0, 1, 2, 0):
        assert all(torch.equal(a, b) for a, b in zip(sums(cached, epoch), sums(plain, epoch), strict=True))
    assert sum(cached.preprocessing.encoded) == 40
    assert sum(plain.preprocessing.encoded) == 4 * 40


def test_memory_cache_of_too_large_split_is_empty() -> None:
    loader = cached_loader(40 * 16 - 1)
    sums(loader, 0), sums(loader, 1)
    assert not loader.examples.memory_cache.values
    assert sum(loader.preprocessing.encoded) == 80 + loading.MEASURED_EXAMPLES


def test_memory_cache_default_limit_is_half_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_cache, "available_bytes", lambda: 2 * 40 * 16)
    fits = cached_loader(None)
    sums(fits, 0)
    assert len(fits.examples.memory_cache.values) == 40
    monkeypatch.setattr(memory_cache, "available_bytes", lambda: 2 * 40 * 16 - 2)
    too_large = cached_loader(None)
    sums(too_large, 0)
    assert not too_large.examples.memory_cache.values


def test_memory_cache_stops_at_limit() -> None:
    loader = cached_loader(40 * 16)
    loader.examples.measure()
    loader.examples.memory_cache._free_bytes = 100
    sums(loader, 0)
    assert len(loader.examples.memory_cache.values) == loading.MEASURED_EXAMPLES + 100 // 16
    assert all(torch.equal(a, b) for a, b in zip(sums(loader, 1), sums(cached_loader(0), 1), strict=True))


def test_memory_cache_of_split_used_once_is_empty() -> None:
    loader = cached_loader(None, repeated=False)
    sums(loader, 0)
    assert not loader.examples.memory_cache.values


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loader_processes_fill_shared_memory_cache() -> None:
    loader, plain = cached_loader(None, workers=2), cached_loader(0)
    for epoch in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(sums(loader, epoch), sums(plain, epoch), strict=True))
        assert loader._running is not None
    assert sum(loader.preprocessing.encoded) == loading.MEASURED_EXAMPLES  # in this process
    cache = loader.examples.memory_cache
    assert cache.is_shared
    assert not cache.is_filling
    assert all(cache.get(i) is not None for i in range(40))
    assert pickle.loads(pickle.dumps(loader.examples)).memory_cache.get(0) is None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loader_processes_wait_for_unshared_memory_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_cache.multiprocessing, "get_start_method", lambda: "spawn")
    loader, plain = cached_loader(None, workers=2), cached_loader(0)
    for epoch in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(sums(loader, epoch), sums(plain, epoch), strict=True))
        assert (loader._running is None) == (epoch == 0)
    assert sum(loader.preprocessing.encoded) == 40


@pytest.mark.parametrize("limit", [0, None], ids=["no cache", "cache"])
def test_example_twice_in_batch_is_augmented_once_each(limit: int | None) -> None:
    examples = cached_loader(limit).examples
    first, second = examples.batch(0, np.array([3, 3])).inputs
    assert torch.equal(first, second)
    assert torch.equal(first, examples.batch(0, np.array([3])).inputs[0])


def test_shared_memory_cache_limit_and_strides() -> None:
    cache = memory_cache.MemoryCache(3, 3 * 64)
    images = [torch.arange(size, dtype=torch.uint8).view(2, 3, -1).permute(2, 0, 1) for size in (60, 54, 84)]
    cache.measure({0: images[0][:, :1]}, shared=True)  # smaller than the others, and not dense
    assert torch.equal(cache.get(0), images[0][:, :1])
    cache.put(1, images[1])
    assert cache.get(1).stride() == images[1].stride()
    assert torch.equal(cache.get(1), images[1])
    cache.get(1).zero_()
    cache.put(1, images[0])  # another process has added it
    assert torch.equal(cache.get(1), images[1])
    cache.put(2, images[2])
    assert cache.get(2) is None
    assert not cache.is_filling


def test_timed_iterator_measures_waiting() -> None:
    def slow():
        for _ in range(3):
            time.sleep(0.01)
            yield Batch(torch.zeros(1), torch.zeros(1), np.zeros(1, dtype=np.int64))

    timed = TimedIterator(slow())
    assert len(list(timed)) == 3
    assert 0.03 <= timed.seconds < 1


def test_loader_processes_live_through_several_epochs() -> None:
    kept = loader(Lazy(), workers=2)
    plain = loader(Lazy(), workers=0)
    assert same(batches(kept, 0), batches(plain, 0))
    running = kept._running
    assert running is not None
    processes = [worker.pid for worker in running._iterator._workers]
    for epoch in (1, 2):
        assert same(batches(kept, epoch), batches(plain, epoch))
    next(iter(kept.epoch(3)))  # an epoch that is not read to its end
    assert same(batches(kept, 4), batches(plain, 4))
    assert kept._running is running
    assert [worker.pid for worker in running._iterator._workers] == processes


def test_process_exit_with_referenced_loader(python: Callable[..., Any]) -> None:
    # The processes of the loader ignore SIGTERM, with which Python would end them.
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loader import Lazy, batches, loader
kept = loader(Lazy(), workers=2)
batches(kept, 0)
"""
    ended = python("-c", script)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "expected"),
    [("cpu", 8, 1, 0), ("cuda", 8, 1, 7), ("cuda", 64, 1, 16), ("cuda", 64, 8, 7), ("cuda", 1, 1, 0)],
)
def test_auto_workers_follow_device_cores_and_ranks(
    device: str, cores: int, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.data.loader.available_cores", lambda: cores)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    automatic, given = loader(Lazy(), workers="auto"), loader(Lazy(), workers=3)
    for one in (automatic, given):
        one.prepare_for(torch.device(device))
    assert (automatic.workers, given.workers) == (expected, 3)
    assert automatic.pin_memory == given.pin_memory == (device == "cuda")


def test_encoding_error_names_every_bad_example() -> None:
    values = [[1.0], [-1.0], [2.0], *([-1.0] for _ in range(MAX_PROBLEMS))]
    with pytest.raises(DataError) as caught:
        encode(Ragged(), values, range(len(values)), "row {}".format)
    problems = caught.value.problems
    assert [problem.where for problem in problems[:2]] == ["row 1", "row 3"]
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1].message == "1 more cannot be read"


@pytest.mark.parametrize(("free", "workers"), [(0, 0), (3 * 480, 1), (1 << 40, 2)])
def test_loader_processes_fit_into_the_free_shared_memory(
    free: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_shared_memory_bytes", lambda: free)
    part = Split({"x": [[1.0] * 13] * 16}, np.zeros(16, dtype=np.int64))
    made = loader(Lazy(), part, workers=2)  # a batch has 8 x 13 x 4 bytes of inputs and 8 x 8 of targets
    chunks = made.batch_indices(0)
    if workers == 2:
        assert made._workers_in_shared_memory(2, 0, chunks) == 2
    else:
        with pytest.warns(UserWarning, match=f"too little for 2 loader processes .* using {workers}"):
            assert made._workers_in_shared_memory(2, 0, chunks) == workers


def test_batches_do_not_depend_on_missing_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_shared_memory_bytes", lambda: 0)
    with pytest.warns(UserWarning, match="shared memory"):
        without = batches(loader(Noisy(), workers=2), 3)
    assert same(without, batches(loader(Noisy(), workers=0), 3))
