"""Gradient exchange by DistributedDataParallel, and messages with losses and predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from transfer import TrainingError
from transfer.system.ranks import Rank
from transfer.training.distributed import ProcessGroup
from transfer.training.parallel import MetricMessages, Replicas

RANKS = 4


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGroup]:
    """Rank 0 of 4 equal ones, three of which do not exist: what is sent can be counted in one process."""

    class Done:
        def wait(self) -> None:
            """Return at once."""

    def all_reduce(tensor: Tensor, *_: Any, **__: Any) -> Done:
        tensor.mul_(RANKS)
        return Done()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield ProcessGroup(Rank(0, RANKS, 0, RANKS))
    dist.destroy_process_group()


class Chain(nn.Module):
    """Two layers, one that may be unused, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(2, 2)
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 2)

    def forward(self, inputs: Tensor, first_stage: int = 0) -> Tensor:
        """Return outputs (B, 2)."""
        outputs: Tensor = self.head(self.norm(self.second(self.first(inputs).relu())))
        return outputs


def make_step(replicas: Replicas, *, is_last: bool = True) -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def losses() -> tuple[Tensor, Tensor]:
        outputs = replicas.forward(inputs)
        return outputs.square().sum(1), outputs

    with replicas.step(losses, is_last=is_last):
        losses()[0].mean().backward()  # type: ignore[no-untyped-call]


def count_bytes(replicas: Replicas) -> list[int]:
    """Return a list to which the size of each message with gradients is appended."""
    sizes: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses other annotations than its own
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    assert replicas._wrapped is not None
    replicas._wrapped.register_comm_hook(None, hook)
    return sizes


def test_step_sends_each_trained_gradient_once(processes: ProcessGroup) -> None:
    model = Chain()
    model.first.requires_grad_(False)
    replicas = Replicas(processes, model, model)  # type: ignore[arg-type]
    replicas.start_phase()
    make_step(replicas)
    sizes = count_bytes(replicas)
    make_step(replicas, is_last=False)
    assert sizes == []
    make_step(replicas)
    trained = [p for n, p in model.named_parameters() if n.partition(".")[0] in ("second", "norm", "head")]
    assert sum(sizes) == 4 * sum(parameter.numel() for parameter in trained)
    # A parameter that no loss depends on keeps no gradient, so that the optimizer skips it.
    assert model.unused.weight.grad is None
    assert model.unused.weight.requires_grad


def test_parameter_without_gradient_in_later_step_is_named(processes: ProcessGroup) -> None:
    model = Chain()
    replicas = Replicas(processes, model, model)  # type: ignore[arg-type]
    replicas.start_phase()
    make_step(replicas)
    for parameter in model.parameters():
        parameter.grad = None
    model.norm = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=r"norm\.weight has no gradient in a later step"):
        make_step(replicas)


def test_replicas_are_wrapped_again_for_next_phase(processes: ProcessGroup) -> None:
    """The reason why a phase wraps the model: gradients of parameters that were frozen before are not exchanged."""
    model = Chain()
    model.first.requires_grad_(False)
    kept = Replicas(processes, model, model)  # type: ignore[arg-type]
    kept.start_phase()
    make_step(kept)
    first, without = model.first.weight.numel() + model.first.bias.numel(), count_bytes(kept)
    model.first.requires_grad_(True)
    make_step(kept)
    kept.start_phase()
    make_step(kept)
    anew = count_bytes(kept)
    make_step(kept)
    assert sum(anew) - sum(without) == 4 * first


def test_first_message_is_sent_before_backward_ends(processes: ProcessGroup) -> None:
    model = Chain()
    replicas = Replicas(processes, model, model, bucket_mib=0.001)  # type: ignore[arg-type]
    replicas.start_phase()
    make_step(replicas)
    moments: list[str] = []
    assert replicas._wrapped is not None

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses other annotations than its own
        moments.append("message")
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    replicas._wrapped.register_comm_hook(None, hook)
    model.first.weight.register_post_accumulate_grad_hook(lambda _: moments.append("last gradient"))  # type: ignore[no-untyped-call]
    make_step(replicas)
    assert moments.index("message") < moments.index("last gradient")


def test_step_of_single_process_wraps_nothing() -> None:
    model = Chain()
    replicas = Replicas(ProcessGroup(), model, model)  # type: ignore[arg-type]
    replicas.start_phase()
    make_step(replicas)
    assert replicas._wrapped is None


def test_batches_of_message_are_returned_in_order(processes: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages of four ranks, which the test exchanges itself."""
    sent: list[Tensor] = []
    ranks = [MetricMessages(ProcessGroup(Rank(index, RANKS)), None) for index in range(RANKS)]
    batches = [np.arange(11), np.arange(20, 23)]  # only one rank has a shard of the second
    for rank in ranks:
        for indices in batches:
            shard = torch.from_numpy(rank.processes.shard(indices))
            rank.append(indices, [shard.float(), torch.stack([shard, -shard], 1), shard % 2 == 0])
        assert rank.examples == 14
    assert ranks[0].is_due
    # Every rank sends the same number of bytes; the first pass only collects the messages.
    batches_of = [list(rank._batches) for rank in ranks]
    monkeypatch.setattr(dist, "all_gather", lambda received, message: sent.append(message.clone()))
    for rank in ranks:
        rank.exchange()
    assert len({len(message) for message in sent}) == 1

    def gather(received: list[Tensor], _: Tensor) -> None:
        for part, message in zip(received, sent, strict=True):
            part.copy_(message)

    monkeypatch.setattr(dist, "all_gather", gather)
    for rank, waiting in zip(ranks, batches_of, strict=True):
        rank._batches = waiting
        for (indices, _, tensors), expected in zip(rank.exchange(), batches, strict=True):
            whole = torch.from_numpy(expected)
            assert np.array_equal(indices, expected)
            for found, wanted in zip(
                tensors, [whole.float(), torch.stack([whole, -whole], 1), whole % 2 == 0], strict=True
            ):
                assert torch.equal(found, wanted)
    assert len({rank._interval for rank in ranks}) == 1
    assert ranks[0].exchange() == []
