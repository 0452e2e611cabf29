"""The forward loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POINT_SIZE, Dense
from torch import Tensor, nn

from transfer import TrainingError
from transfer.builtin.heads import Linear
from transfer.data.batch import Batch
from transfer.models.forward import forward_batches
from transfer.models.model import Model

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    backbone = Dense()
    return Model(backbone, Linear(backbone.features, 2))


def batches(*sizes: int) -> Iterator[Batch]:
    for size in sizes:
        inputs = torch.linspace(-1, 1, size * POINT_SIZE).view(size, POINT_SIZE)
        yield Batch(inputs, torch.zeros(size, dtype=torch.int64), np.arange(size))


def test_outputs_equal_model_in_eval_mode(model: Model) -> None:
    pairs = list(forward_batches(model, batches(5, 3), device=CPU))
    model.eval()
    for (batch, outputs), expected in zip(pairs, batches(5, 3), strict=True):
        assert np.array_equal(batch.indices, expected.indices)
        assert torch.equal(outputs, model(expected.inputs))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(model: Model, training: bool) -> None:
    model.train(training)
    for _ in forward_batches(model, batches(4, 4), device=CPU):
        assert not model.training
    assert model.training is training
    iterator = forward_batches(model, batches(4, 4), device=CPU)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert model.training is training


def test_frozen_stages_stay_in_eval_mode(model: Model) -> None:
    model.keep_in_eval((model[0],))
    model.train()
    list(forward_batches(model, batches(4), device=CPU))
    assert model.training
    assert not model[0].training


def test_mode_is_restored_after_an_exception(model: Model) -> None:
    model.train()
    wrong = Batch(torch.zeros(2, POINT_SIZE + 1), torch.zeros(2), np.arange(2))
    with pytest.raises(RuntimeError, match="shapes"):
        list(forward_batches(model, [wrong], device=CPU))
    assert model.training


def test_outputs_are_inference_tensors_outside_of_the_contexts(model: Model) -> None:
    for _, outputs in forward_batches(model, batches(4), device=CPU, precision="bf16"):
        assert outputs.is_inference()
        assert outputs.dtype == torch.bfloat16
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_stages_can_be_run_in_two_parts(model: Model) -> None:
    ((batch, complete),) = forward_batches(model, batches(6), device=CPU)
    ((_, features),) = forward_batches(model, batches(6), device=CPU, end_stage=2)
    middle = Batch(features, batch.targets, batch.indices)
    ((_, outputs),) = forward_batches(model, [middle], device=CPU, first_stage=2)
    assert features.shape == (6, 8)
    assert torch.equal(outputs, complete)
    ((_, inputs),) = forward_batches(model, batches(6), device=CPU, end_stage=0)
    assert torch.equal(inputs, batch.inputs)


class Exhausting(nn.Module):
    """A stage that fails as torch's CPU allocator does."""

    def forward(self, inputs: Tensor) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 12 bytes")


def test_out_of_memory_error_has_batch_size_and_fix(model: Model) -> None:
    model.second = Exhausting()
    with pytest.raises(TrainingError, match="memory ran out on a batch of 7 examples") as caught:
        list(forward_batches(model, batches(7), device=CPU))
    assert "train.batch_size" in str(caught.value.problems[0].fix)
    with pytest.raises(TrainingError) as caught:
        list(forward_batches(model, batches(7), device=CPU, out_of_memory_fix="set train.cache: off"))
    assert caught.value.problems[0].fix == "set train.cache: off"
