"""Several processes that train one model together: each computes a share of every batch, and all know the whole.

Between two steps of the optimizer every process holds the same weights, optimizer state, metrics and counts, so that
any one of them can write a checkpoint, and any number of processes can go on from it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, pairwise
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from transfer.errors import TrainingError, TransferError
from transfer.system.ranks import Rank, cpu_is_requested, rank_from_environment, refuse_sharding

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
"""In which all processes must have come."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""In which a process that is alive answers in the middle of training; rank 0 may be writing a checkpoint."""
BARRIER_TIMEOUT = timedelta(days=2)
"""What one process may do for all the others (fill the feature cache, load the data) takes no longer than this."""
POLL_SECONDS = 0.02
MIN_SHARD_EXAMPLES = 2
"""Batch norm cannot train on one example."""

_T = TypeVar("_T")
_meetings = count()


class ProcessLostError(TrainingError):
    """Another process of the run has ended, was killed or cannot be reached any more."""


class ProcessGroup:
    """The processes of a run, this one among them; without arguments this one is alone.

    Args:
        own: This one's place.
        waiting: The group that waits long for one of them.
        store: Where they leave word for each other.
    """

    def __init__(self, rank: Rank | None = None, waiting: Any = None, store: Any = None) -> None:
        self.rank = rank or Rank()
        self._waiting = waiting
        self._store = store

    @property
    def is_distributed(self) -> bool:
        """There are others."""
        return self.rank.world_size > 1

    @property
    def is_main(self) -> bool:
        """This one alone writes the run directory and tells what happens."""
        return self.rank.index == 0

    def shard_bounds(self, count: int) -> list[tuple[int, int]]:
        """Return where each process's share of a batch begins and ends: in a row, of like size, of two or more each.

        Of a batch too small for all the last processes get nothing.
        """
        takers = min(self.rank.world_size, max(1, count // MIN_SHARD_EXAMPLES))
        ends = [0, *((number + 1) * count // takers for number in range(takers))]
        return [*pairwise(ends), *[(count, count)] * (self.rank.world_size - takers)]

    def shard(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which examples of a batch this process computes.

        A process that gets nothing computes the first few all the same, so that all do the same things; they are left
        out wherever something is counted.
        """
        start, end = self.shard_bounds(len(indices))[self.rank.index]
        return indices[start:end] if end > start else indices[:MIN_SHARD_EXAMPLES]

    def shard_size(self, count: int) -> int:
        """Return how many of the examples that this process computes of a batch are its share."""
        start, end = self.shard_bounds(count)[self.rank.index]
        return end - start

    def gather(self, count: int, *shares: Tensor) -> list[Tensor]:
        """Return tensors over a whole batch, on every process, from its share of each.

        Args:
            count: Examples of the batch.
            shares: (B, ...) each; rows beyond :meth:`shard_size` are left out.
        """
        bounds = self.shard_bounds(count)
        own = self.shard_size(count)
        rows = [share[:own].detach() for share in shares]
        rows = [(row if row.dim() > 1 else row[:, None]).flatten(1).contiguous() for row in rows]
        packed = torch.cat([row.view(torch.uint8) for row in rows], dim=1)
        sent = packed.new_zeros(max(end - start for start, end in bounds), packed.shape[1])
        sent[:own] = packed
        received = [torch.empty_like(sent) for _ in bounds]
        with _answered():
            dist.all_gather(received, sent)
        whole = torch.cat([part[: end - start] for part, (start, end) in zip(received, bounds, strict=True)])
        widths = [row.shape[1] * row.element_size() for row in rows]
        return [
            # A copy of its own, because a number of several bytes must stand where such a number may.
            columns.clone(memory_format=torch.contiguous_format).view(share.dtype).reshape(count, *share.shape[1:])
            for columns, share in zip(torch.split(whole, widths, dim=1), shares, strict=True)
        ]

    def all_reduce(self, parameters: Sequence[nn.Parameter], statistics: Sequence[Tensor]) -> None:
        """Put the sum over all processes in the place of each gradient, and the mean in that of each statistic.

        A parameter that has a gradient on no process gets none.
        """
        found = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        with _answered():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        with torch.no_grad():
            for parameter, anywhere in zip(parameters, found.tolist(), strict=True):
                if anywhere and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            tensors = [*gradients, *statistics]
            for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
                _sum([tensor for tensor in tensors if tensor.dtype == dtype])
            for statistic in statistics:
                statistic.div_(self.rank.world_size)

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the numbers that the processes have."""
        whole = torch.tensor([number])
        with _answered():
            dist.all_reduce(whole, dist.ReduceOp.MAX)
        return int(whole.item())

    def broadcast_object(self, make: Callable[[], _T]) -> _T:
        """Return on every process what the first one makes."""
        if not self.is_distributed:
            return make()
        box = [make() if self.is_main else None]
        self.barrier()
        with _answered():
            dist.broadcast_object_list(box, src=0, group=self._waiting)
        return cast("_T", box[0])

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let the first process of each machine go ahead with what is inside, and the others find what it has left."""
        if self.is_distributed and self.rank.local_rank:
            self.barrier()
        yield
        if self.is_distributed and not self.rank.local_rank:
            self.barrier()

    def barrier(self) -> None:
        """Wait for all others, however long one of them works; a signal is heard meanwhile."""
        if not self.is_distributed:
            return
        with _answered():
            work: Any = dist.barrier(self._waiting, async_op=True)
            while not work.is_completed():
                time.sleep(POLL_SECONDS)
            work.wait()

    def require_equal(self, facts: Mapping[str, str]) -> None:
        """Refuse to go on where the processes were not given the same.

        Args:
            facts: What must be equal, by what it is called.

        Raises:
            TrainingError: Names what differs, and on which process.
        """
        if not self.is_distributed:
            return
        everybody: list[Any] = [None] * self.rank.world_size
        with _answered():
            dist.all_gather_object(everybody, dict(facts), group=self._waiting)
        for rank, theirs in enumerate(everybody):
            different = [name for name, value in everybody[0].items() if theirs.get(name) != value]
            if different:
                raise TrainingError(
                    f"process {rank} was given other {' and other '.join(different)} than process 0",
                    fix="put the same data and weights on every machine",
                )

    def first_to_tell(self) -> bool:
        """Tell whether no other process has said yet why the run ends."""
        if self._store is None:
            return True
        try:
            return int(self._store.add("told", 1)) == 1
        except RuntimeError:  # the process that kept the store is gone
            return True


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Meet the processes that a launcher has started with this one, and part at the end.

    Of an error that ends several of them one shows the message (:attr:`transfer.errors.TransferError.shown_elsewhere`).

    Raises:
        UserError: The launcher is to cut the model into pieces.
        TrainingError: Not all came in time.
        ProcessLostError: One ended on the way.
    """
    own = rank_from_environment()
    if own.world_size == 1:
        yield SINGLE_PROCESS
        return
    processes = _meet(own)
    try:
        refuse_sharding()
        yield processes
    except BaseException as error:
        first = processes.first_to_tell()
        if isinstance(error, TransferError):
            error.shown_elsewhere = not first
        raise
    # After an error the group stays: to part from processes that are gone may take for ever.
    dist.destroy_process_group()


def _meet(own: Rank) -> ProcessGroup:
    on_gpus = torch.cuda.is_available() and not cpu_is_requested()
    if on_gpus:
        torch.cuda.set_device(own.local_rank)
    try:
        store, rank, size = next(rendezvous("env://", own.index, own.world_size, timeout=RENDEZVOUS_TIMEOUT))
        store.set_timeout(RENDEZVOUS_TIMEOUT)
        # A launcher may keep the store from one meeting to the next, with what stands in it.
        store = dist.PrefixStore(f"transfer/{next(_meetings)}", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        waiting = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
        # One that finds a mistake at once and ends would otherwise be missed by those that are still connecting.
        dist.barrier(waiting)  # type: ignore[arg-type]  # this process is of the group
    except RuntimeError as error:
        raise TrainingError(
            f"the {own.world_size} processes did not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')} "
            f"within {RENDEZVOUS_TIMEOUT.seconds // 60} minutes: "
            f"{_first_line(error)}",
            fix="start as many as were announced, and let every machine reach that address",
        ) from error
    return ProcessGroup(own, waiting, store)


@contextmanager
def _answered() -> Iterator[None]:
    """Say in words that another process does not answer; nothing else goes wrong in what is inside."""
    try:
        yield
    except RuntimeError as error:  # gloo raises a plain one, and torch's own are derived from it
        raise ProcessLostError(
            "another process of this run was lost: it failed, was killed, or its machine cannot be reached "
            f"({_first_line(error)})",
            fix="start the processes again",
        ) from error


def _first_line(error: RuntimeError) -> str:
    """Return what happened without where in torch's sources, and without the advice that gloo adds."""
    return re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0].strip()


def _sum(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes in the place of each tensor; all at once, because each message costs time."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _answered():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
