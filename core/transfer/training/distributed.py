"""The process group of data-parallel training: every rank computes a shard of each batch.

Between two optimizer steps all ranks have the same weights, optimizer state, metrics and counts. Any rank can therefore
write a checkpoint, and a run can resume from it with another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from transfer.errors import TrainingError, TransferError
from transfer.system.ranks import (
    Rank,
    cpu_is_requested,
    rank_from_environment,
    refuse_sharding,
    set_rendezvous_address,
)

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
"""Time within which all processes must join."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Time within which every live process joins a collective during training. Rank 0 may be writing a checkpoint."""
BARRIER_TIMEOUT = timedelta(days=2)
"""Time that one process may work while the others wait: filling the feature cache, loading data."""
POLL_SECONDS = 0.02
MIN_SHARD_EXAMPLES = 2
"""Batch norm cannot train on one example."""

_T = TypeVar("_T")
_TensorsByFile = Mapping[str, Mapping[str, Tensor]]
_rendezvous_count = count()


class ProcessGroup:
    """The processes that train a run together, this one included.

    Args:
        rank: Rank of this process. None for a single process.
        barrier_group: Process group with the timeout of :meth:`barrier`.
        store: Key-value store that the processes share.
        device: Device whose backend sends large tensors. None is the CPU.
    """

    def __init__(
        self,
        rank: Rank | None = None,
        barrier_group: Any = None,
        store: Any = None,
        device: torch.device | None = None,
    ) -> None:
        self.rank = rank or Rank()
        self.device = device or torch.device("cpu")
        # A separate group, because the timeout of a collective belongs to its group: barriers wait for days, gradients
        # for minutes.
        self._barrier_group = barrier_group
        self._store = store

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.rank.world_size > 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run directory and reports events."""
        return self.rank.index == 0

    def shard_bounds(self, batch_size: int) -> list[tuple[int, int]]:
        """Return start and end of each rank's shard of a batch.

        Shards are contiguous, differ by at most one example and have two or more. If the batch is too small for that,
        the last ranks have empty shards.
        """
        # Rounding each end spreads the remainder over the ranks.
        shards = min(self.rank.world_size, max(1, batch_size // MIN_SHARD_EXAMPLES))
        ends = [0, *((number + 1) * batch_size // shards for number in range(shards))]
        return [*pairwise(ends), *[(batch_size, batch_size)] * (self.rank.world_size - shards)]

    def shard(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the examples of a batch that this rank computes.

        A rank with an empty shard computes the first examples anyway, because every rank must take part in the
        collectives of a step. Sums and gathers leave them out (:meth:`shard_size`).
        """
        start, end = self.shard_bounds(len(indices))[self.rank.index]
        return indices[start:end] if end > start else indices[:MIN_SHARD_EXAMPLES]

    def shard_size(self, batch_size: int) -> int:
        """Return the number of examples in this rank's shard of a batch, 0 if it is empty."""
        start, end = self.shard_bounds(batch_size)[self.rank.index]
        return end - start

    def all_gather(
        self, batch_sizes: Sequence[int], shards: Sequence[Sequence[Tensor]], header: Tensor
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Gather tensors over several batches from the shards of all ranks, on every rank.

        Args:
            batch_sizes: Number of examples in each batch.
            shards: For each batch, tensors (:meth:`shard_size`, ...) over this rank's shard.
            header: Facts of this rank, int64 (H,), on the CPU.

        Returns:
            The headers of all ranks (world size, H) on the CPU, and for each batch its tensors (batch size, ...).
        """
        # One collective for all tensors, because latency dominates. Every row becomes a row of bytes: the tensors of a
        # batch, of any dtype, are flattened to (B, bytes) and concatenated to (B, total bytes). The batches follow each
        # other, padded to the longest message, since all_gather needs equal shapes.
        packed, widths = [], []
        for tensors in shards:
            rows = [(tensor if tensor.dim() > 1 else tensor[:, None]).flatten(1).contiguous() for tensor in tensors]
            widths.append([row.shape[1] * row.element_size() for row in rows])
            packed.append(torch.cat([row.view(torch.uint8) for row in rows], dim=1).reshape(-1))
        device = packed[0].device
        # Every rank knows all bounds, so no collective is needed to agree on the size.
        bounds = [self.shard_bounds(size) for size in batch_sizes]
        counts = [[end - start for start, end in of_batch] for of_batch in bounds]
        of_rank = [
            [count * sum(width) for count, width in zip(of_ranks, widths, strict=True)]
            for of_ranks in zip(*counts, strict=True)
        ]
        start = header.numel() * header.element_size()
        sent = torch.zeros(start + max(map(sum, of_rank)), dtype=torch.uint8, device=device)
        message = torch.cat([header.view(torch.uint8).to(device), *packed])
        sent[: len(message)] = message
        received = [torch.empty_like(sent) for _ in of_rank]
        with raise_if_process_lost():
            dist.all_gather(received, sent)
        headers = torch.stack([part[:start] for part in received]).cpu().view(header.dtype)
        parts = [
            torch.split(part[start : start + sum(sizes)], sizes) for part, sizes in zip(received, of_rank, strict=True)
        ]
        gathered = []
        for number, (size, tensors) in enumerate(zip(batch_sizes, shards, strict=True)):
            rows_of_batch = torch.cat([part[number] for part in parts]).view(size, -1)
            columns = torch.split(rows_of_batch, widths[number], dim=1)
            gathered.append(
                [
                    # The clone aligns the bytes in memory: a view of another dtype needs an aligned start.
                    column.clone(memory_format=torch.contiguous_format)
                    .view(tensor.dtype)
                    .reshape(size, *tensor.shape[1:])
                    for column, tensor in zip(columns, tensors, strict=True)
                ]
            )
        return headers, gathered

    def all_reduce_min(self, number: int) -> int:
        """Return the minimum of a number over all ranks."""
        minimum = torch.tensor([number])
        if self.is_distributed:
            with raise_if_process_lost():
                dist.all_reduce(minimum, dist.ReduceOp.MIN, group=self._barrier_group)
        return int(minimum.item())

    def broadcast_object(self, make: Callable[[], _T]) -> _T:
        """Return plain data that rank 0 makes, on every rank.

        Args:
            make: Function that makes the data, which JSON can represent; it is called on rank 0 only.
        """
        return make() if not self.is_distributed else self.broadcast_contents(lambda: ({}, make()))[1]

    def broadcast_contents(self, make: Callable[[], tuple[_TensorsByFile, _T]]) -> tuple[_TensorsByFile, _T]:
        """Return tensors and plain data that rank 0 makes, on every rank.

        Tensors are sent one by one, as bytes, and everything else as JSON: a message cannot run code.

        Args:
            make: Function that makes tensors on the CPU, by file and name, and data that JSON can represent; it is
                called on rank 0 only.
        """
        if not self.is_distributed:
            return make()
        tensors, content = make() if self.is_main else ({}, None)
        self.barrier()  # making them may take longer than the timeout of a collective
        layout = {
            file: {
                name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in named.items()
            }
            for file, named in tensors.items()
        }
        text = torch.frombuffer(bytearray(json.dumps([layout, content]).encode()), dtype=torch.uint8)
        size = torch.tensor([len(text)])
        with raise_if_process_lost():
            dist.broadcast(size, src=0)
            text = text if self.is_main else torch.empty(int(size.item()), dtype=torch.uint8)
            dist.broadcast(text, src=0)
            layout, content = json.loads(text.numpy().tobytes())
            received: dict[str, dict[str, Tensor]] = {}
            for file, named in layout.items():
                received[file] = {}
                for name, (dtype, shape) in named.items():
                    tensor = tensors[file][name] if self.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
                    # As bytes, because no backend sends every dtype; NCCL only sends tensors on the GPU.
                    sent = tensor.contiguous().to(self.device)
                    if sent.numel():
                        dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
                    received[file][name] = tensor if self.is_main else sent.to(tensor.device)
        return received, content

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run the block on local rank 0 first; the other ranks of the machine then find its files."""
        if self.is_distributed and self.rank.local_rank:
            self.barrier()
        yield
        if self.is_distributed and not self.rank.local_rank:
            self.barrier()

    def barrier(self) -> None:
        """Wait for all ranks, up to ``BARRIER_TIMEOUT``. Signals are handled while waiting."""
        if not self.is_distributed:
            return
        with raise_if_process_lost():
            work: Any = dist.barrier(self._barrier_group, async_op=True)
            while not work.is_completed():  # a blocking wait would delay Python's signal handlers until its end
                time.sleep(POLL_SECONDS)
            work.wait()

    def require_equal(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks have the same inputs.

        Args:
            facts: Digests of the inputs by name.

        Raises:
            TrainingError: A rank has other inputs; the error names them and the rank.
        """
        if not self.is_distributed:
            return
        # Compared on every rank, so that all of them raise: one that continued would wait for the others. A digest is
        # as long on every rank; the names of the facts are the same.
        digests = [hashlib.sha256(fact.encode()).digest() for fact in facts.values()]
        sent = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1)
        received = [torch.empty_like(sent) for _ in range(self.rank.world_size)]
        with raise_if_process_lost():
            dist.all_gather(received, sent, group=self._barrier_group)
        for rank, digests_of_rank in enumerate(received):
            equal = (digests_of_rank == received[0]).all(1).tolist()
            different = [name for name, is_equal in zip(facts, equal, strict=True) if not is_equal]
            if different:
                raise TrainingError(
                    f"process {rank} was given other {' and other '.join(different)} than process 0",
                    fix="put the same data and weights on every machine",
                )

    def claim_error_report(self) -> bool:
        """Return whether this process reports the error that ends the run: True on the first process that asks."""
        if self._store is None:
            return True
        try:
            # The store adds atomically: only one process gets the 1.
            return int(self._store.add("error_reports", 1)) == 1
        except RuntimeError:  # the process that hosts the store has ended
            return True


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the process group that the launcher started, and destroy it on exit.

    If an error ends several processes, only one of them reports it
    (:attr:`transfer.errors.TransferError.shown_elsewhere`).

    Raises:
        UserError: The launcher requests sharding of the model.
        TrainingError: Not all processes joined in time.
        ProcessLostError: A process ended during the run.
    """
    rank = rank_from_environment()
    if rank.world_size == 1:
        yield SINGLE_PROCESS
        return
    processes = _join(rank)
    try:
        refuse_sharding()
        yield processes
    except BaseException as error:
        reports = processes.claim_error_report()
        if isinstance(error, TransferError):
            error.shown_elsewhere = not reports
        raise
    # Not after an error: destroying the group can block forever if a process is gone.
    dist.destroy_process_group()


class ProcessLostError(TrainingError):
    """Another process of the run has ended, was killed or cannot be reached any more."""


def _join(rank: Rank) -> ProcessGroup:
    use_gpus = torch.cuda.is_available() and not cpu_is_requested()
    # Before the group is made: NCCL would otherwise put every process of a machine on its first GPU.
    if use_gpus:
        # Slurm may show each process only its own GPU, which then has index 0.
        torch.cuda.set_device(rank.local_rank % torch.cuda.device_count())
    set_rendezvous_address()
    try:
        store, index, world_size = next(rendezvous("env://", rank.index, rank.world_size, timeout=RENDEZVOUS_TIMEOUT))
        store.set_timeout(RENDEZVOUS_TIMEOUT)
        # A launcher may keep the store for several runs of one process: each run has its own keys.
        store = dist.PrefixStore(f"transfer/{next(_rendezvous_count)}", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_gpus else "gloo",
            store=store,
            rank=index,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        barrier_group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
        # A process that fails immediately would otherwise be gone before the others have connected to it.
        dist.barrier(barrier_group)  # type: ignore[arg-type]  # this process is a member of the group
    except RuntimeError as error:
        raise TrainingError(
            f"the {rank.world_size} processes did not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')} "
            f"within {RENDEZVOUS_TIMEOUT.seconds // 60} minutes: "
            f"{_first_line(error)}",
            fix="start as many processes as were announced, and make that address reachable from every machine",
        ) from error
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpus else torch.device("cpu")
    return ProcessGroup(rank, barrier_group, store, device)


@contextmanager
def raise_if_process_lost() -> Iterator[None]:
    """Turn the error of a collective into a :class:`ProcessLostError`; nothing else can fail in the block."""
    try:
        yield
    except RuntimeError as error:  # gloo raises a plain one, and torch's own are derived from it
        raise ProcessLostError(
            "another process of this run was lost: it failed, was killed, or its machine cannot be reached "
            f"({_first_line(error)})",
            fix="start the processes again",
        ) from error


def _first_line(error: RuntimeError) -> str:
    """Return the first sentence of an error without torch's source location and gloo's advice."""
    return re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0].strip()
