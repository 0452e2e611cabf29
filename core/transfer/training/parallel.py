"""Gradients, statistics and metrics of the ranks that train one model together.

Gradients are summed by torch's ``DistributedDataParallel`` while the backward pass computes the next ones. Losses and
predictions wait on each rank, and are gathered in one message about every half second.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from transfer.errors import TrainingError
from transfer.models.model import BATCH_NORM, Model
from transfer.system.signals import Signals
from transfer.training.distributed import ProcessGroup, raise_if_process_lost

if TYPE_CHECKING:
    from transfer.training.checkpoints import Checkpoints

MESSAGE_SECONDS = 0.5
"""Time between two messages with losses and predictions. A signal or a loss that is not finite waits as long."""
MAX_MESSAGE_BYTES = 2**25
"""Maximum size of a message over all ranks: long outputs are gathered more often."""


_NO_CONTEXT = nullcontext()


class Replicas:
    """The copies of a model on all ranks, which make equal steps. In a single process, nothing is wrapped or sent.

    The model is wrapped anew for each phase. ``DistributedDataParallel`` fixes the set of trained parameters when it
    wraps a model: gradients of those that a later phase unfreezes would never be summed.

    Args:
        processes: Processes that train together.
        model: Model on its device.
        forward: Forward pass of the model, compiled or not.
        sync_batch_norm: Whether trained batch-norm layers normalize with the statistics of all ranks.
        bucket_mib: Size of the messages with gradients in MiB. None uses torch's default.
    """

    def __init__(
        self,
        processes: ProcessGroup,
        model: Model,
        forward: Callable[..., Tensor],
        *,
        sync_batch_norm: bool = False,
        bucket_mib: float | None = None,
    ) -> None:
        self.processes = processes
        self.model = model
        self._replica = _Replica(model, forward)
        self._sync_batch_norm = sync_batch_norm
        self._bucket_mib = bucket_mib
        self._wrapped: DistributedDataParallel | None = None
        self._trained: dict[str, nn.Parameter] = {}

    def start_phase(self) -> None:
        """Prepare for other trained parameters: the next :meth:`step` wraps the model."""
        self._wrapped = None  # its hooks end with it
        if not self.processes.is_distributed:
            return
        self.model.train()
        if self._sync_batch_norm:
            _synchronize_batch_norm(self.model)

    def forward(self, inputs: Any, first_stage: int = 0) -> Tensor:
        """Return the outputs (B, out_features) of this rank's shard of a batch."""
        outputs: Tensor = (self._wrapped or self._replica.run)(inputs, first_stage)
        return outputs

    def step(self, trace: Callable[[], tuple[Tensor, Tensor]], *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of the forward and backward pass of a batch.

        Args:
            trace: Function that returns the losses (B,) and outputs of the batch. It is called for the first batch of a
                phase, to find out which parameters have a gradient.
            is_last: Whether the batch is the last one of an optimizer step, after which gradients are summed.
        """
        return self._step(trace, is_last=is_last) if self.processes.is_distributed else _NO_CONTEXT

    @contextmanager
    def _step(self, trace: Callable[[], tuple[Tensor, Tensor]], *, is_last: bool) -> Iterator[None]:
        with _explain_lost_process():
            if self._wrapped is None:
                self._wrapped = self._wrap(trace)
            self._replica.averages_statistics = is_last
            with nullcontext() if is_last else self._wrapped.no_sync():
                yield
            if is_last:
                self._replica.finish_averaging()
        missing = [name for name, parameter in self._trained.items() if parameter.grad is None] if is_last else []
        if missing:
            raise _missing_gradients(missing, "in a later step of the phase, but had one in the first")

    def _wrap(self, trace: Callable[[], tuple[Tensor, Tensor]]) -> DistributedDataParallel:
        names = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        # In eval mode, so that running statistics do not change. The graph has the same parameters.
        self.model.eval()
        reached = _parameters_of(trace()[0])
        self.model.train()
        flags = torch.tensor([id(parameter) in reached for parameter in names.values()], dtype=torch.int32)
        counts = flags.clone()
        dist.all_reduce(counts)
        uneven = [
            name for name, n in zip(names, counts.tolist(), strict=True) if 0 < n < self.processes.rank.world_size
        ]
        if uneven:
            raise _missing_gradients(uneven, "in one process, but has one in another")
        # A parameter that no loss depends on has no gradient anywhere; DistributedDataParallel would wait for it.
        excluded = [parameter for parameter, flag in zip(names.values(), flags.tolist(), strict=True) if not flag]
        self._trained = {name: parameter for name, parameter in names.items() if id(parameter) in reached}
        for parameter in excluded:
            parameter.requires_grad_(False)
        supported = inspect.signature(DistributedDataParallel).parameters
        # All ranks have compared their weights, so nothing is sent at the start.
        options: dict[str, Any] = {"init_sync": False, "bucket_cap_mb": self._bucket_mib}
        options = {name: value for name, value in options.items() if name in supported and value is not None}
        # Older versions of torch have this name for it.
        options["forward_sync_buffers" if "forward_sync_buffers" in supported else "broadcast_buffers"] = False
        wrapped = DistributedDataParallel(self._replica, gradient_as_bucket_view=True, **options)
        for parameter in excluded:
            parameter.requires_grad_(True)
        # Torch sorts gradients into messages anew after the first backward pass, in the order in which they came. The
        # layout decides the order of summation over ranks. This backward pass settles it before the first step, so that
        # a resumed run rounds like one without the interruption.
        wrapped(list(self._trained.values())).backward()
        for parameter in self._trained.values():
            parameter.grad = None
        return wrapped


class _Replica(nn.Module):
    """The module that ``DistributedDataParallel`` wraps: the forward pass, then the exchange of batch-norm statistics.

    The mean of the updated running statistics of all ranks equals an update with the mean of their batch statistics,
    because the update is linear.

    Args:
        model: Model, whose gradients and statistics are exchanged.
        run: Forward pass of the model, compiled or not.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._run = (run,)  # in a tuple, because the compiled model would be registered a second time
        self.averages_statistics = False
        self._sent: tuple[Tensor, Any] | None = None

    def forward(self, inputs: Any, first_stage: int | None = None) -> Tensor:
        """Return the outputs of the model, or the sum of a list of parameters without a stage."""
        if first_stage is None:
            return torch.stack([parameter.sum().float() for parameter in inputs]).sum()
        outputs = self.run(inputs, first_stage)
        statistics = self._statistics() if self.averages_statistics and self.training else []
        if statistics:
            flat = torch.cat([statistic.reshape(-1) for statistic in statistics])
            self._sent = flat, dist.all_reduce(flat, async_op=True)  # during the backward pass
        return outputs

    @property
    def run(self) -> Callable[..., Tensor]:
        """Forward pass of the model."""
        return self._run[0]

    def finish_averaging(self) -> None:
        """Replace the running statistics by their mean over all ranks."""
        if self._sent is not None:
            (flat, work), self._sent = self._sent, None
            work.wait()
            flat /= dist.get_world_size()
            statistics = self._statistics()
            for statistic, mean in zip(statistics, torch.split(flat, [s.numel() for s in statistics]), strict=True):
                statistic.copy_(mean.view_as(statistic))

    def _statistics(self) -> list[Tensor]:
        # Frozen batch norm is in eval mode: its statistics do not change and are equal on all ranks. Synchronized batch
        # norm computes the same statistics on all ranks.
        norms = [
            module
            for module in self.modules()
            if isinstance(module, BATCH_NORM) and module.training and not isinstance(module, nn.SyncBatchNorm)
        ]
        return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


class MetricMessages:
    """Losses, targets and inputs of metrics of the last batches, gathered on all ranks in one message.

    A message also carries signals, and the decision of rank 0 whether a checkpoint is due. Metrics do not depend on the
    time of the messages, because the batches are the same and in order.

    Args:
        processes: Processes that train together.
        signals: Signal handlers of the run. None sends no signals.
        checkpoints: Checkpoints of the run, whose times rank 0 decides. None in an evaluation.
    """

    def __init__(
        self, processes: ProcessGroup, signals: Signals | None, checkpoints: Checkpoints | None = None
    ) -> None:
        self.processes = processes
        self.examples = 0
        self._signals = signals
        self._checkpoints = checkpoints
        self._batches: list[tuple[npt.NDArray[np.int64], Any, list[Tensor]]] = []
        self._interval = 1
        self._sent_at = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next message, on all ranks after the same batch."""
        return len(self._batches) >= self._interval

    def append(self, indices: npt.NDArray[np.int64], tensors: list[Tensor], facts: Any = None) -> None:
        """Append a batch.

        Args:
            indices: int64 (B,), indices of all examples in the batch.
            tensors: Tensors over this rank's shard of the batch; further rows are left out.
            facts: Anything that :meth:`exchange` returns with the batch.
        """
        size = self.processes.shard_size(len(indices))
        self._batches.append((indices, facts, [tensor.detach()[:size] for tensor in tensors]))
        self.examples += len(indices)

    def exchange(self) -> list[tuple[npt.NDArray[np.int64], Any, list[Tensor]]]:
        """Gather the batches since the last message; nothing is sent if there are none.

        Returns:
            Indices, facts, and tensors (B, ...) of each batch.
        """
        batches, self._batches, self.examples = self._batches, [], 0
        if not batches:
            return []
        shards = [tensors for _, _, tensors in batches]
        number = 0 if self._signals is None else self._signals.received
        is_overdue = self._checkpoints is not None and self._checkpoints.is_overdue
        header = torch.tensor([number, self._next_interval(shards), is_overdue])
        headers, gathered = self.processes.all_gather([len(indices) for indices, _, _ in batches], shards, header)
        self._interval, self._sent_at = int(headers[0, 1]), time.perf_counter()
        if self._signals is not None:
            self._signals.agree(int(headers[:, 0].max()))
        if self._checkpoints is not None:
            self._checkpoints.agree(is_overdue=bool(headers[0, 2]))
        return [(indices, facts, found) for (indices, facts, _), found in zip(batches, gathered, strict=True)]

    def _next_interval(self, shards: list[list[Tensor]]) -> int:
        """Return the number of batches until the message after this one, as rank 0 decides for all."""
        seconds = (time.perf_counter() - self._sent_at) / len(shards)
        size = sum(tensor.numel() * tensor.element_size() for tensors in shards for tensor in tensors) / len(shards)
        fitting = MAX_MESSAGE_BYTES / (self.processes.rank.world_size * max(size, 1.0))
        # At most doubled: the first batches may be faster or slower than the others.
        return max(1, int(min(MESSAGE_SECONDS / max(seconds, 1e-6), fitting, 2 * len(shards))))


def _parameters_of(losses: Tensor) -> set[int]:
    """Return the ids of the parameters that losses depend on, from their graph."""
    reached, seen, nodes = set[int](), set[Any](), [losses.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the end of the graph, which adds to the gradient of a parameter
            reached.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return reached


def _synchronize_batch_norm(model: Model) -> None:
    """Replace trained batch-norm layers by synchronized ones with the same parameters and statistics."""
    replaced: dict[int, nn.Module] = {}  # a layer may be part of several modules
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BATCH_NORM) and child.training and not isinstance(child, nn.SyncBatchNorm):
                if id(child) not in replaced:
                    replaced[id(child)] = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
                setattr(parent, name, replaced[id(child)])


@contextmanager
def _explain_lost_process() -> Iterator[None]:
    """Turn the error of a collective in the block into a :class:`ProcessLostError`; other errors stay."""
    try:
        yield
    except RuntimeError as error:
        # Torch's own errors have a class; gloo raises a plain one with the path of its source.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        with raise_if_process_lost():
            raise


def _missing_gradients(names: list[str], when: str) -> TrainingError:
    return TrainingError(
        f"the parameter {names[0]} has no gradient {when}: expected the same parameters in all steps and processes",
        fix="let the loss depend on all trained parameters in every forward pass, or train in one process",
    )
