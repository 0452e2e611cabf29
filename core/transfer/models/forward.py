"""The forward loop that evaluation, previews, explanations, serving and the feature cache use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from transfer.config.train_settings import Precision
from transfer.data.batch import Batch
from transfer.errors import MemoryRanOut
from transfer.models.model import Model
from transfer.models.precision import autocast

_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")
_SMALLER_BATCH = "set a smaller train.batch_size (or train.evaluation_batch_size, or train.max_tokens), or auto"


def forward_batches(
    model: Model,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: Precision = "fp32",
    first_stage: int = 0,
    end_stage: int | None = None,
    out_of_memory_fix: str = _SMALLER_BATCH,
) -> Iterator[tuple[Batch, Any]]:
    """Yield each batch, on the device, and the model's outputs for it, computed in eval mode and inference mode.

    The model is in its previous mode again when the iterator is exhausted or closed. Nothing in the loop waits for the
    device.

    Args:
        model: Model, already on the device.
        batches: Batches as a loader yields them.
        device: Device that the batches are moved to.
        precision: Precision of the forward pass.
        first_stage: Index of the first stage to run. The batches contain the inputs of this stage.
        end_stage: Index after the last stage to run. None runs all stages and yields outputs (B, out_features).
        out_of_memory_fix: Fix that the error states if memory runs out.

    Raises:
        MemoryRanOut: Memory ran out; the error states the batch size.
    """
    # Read once: the model looks every stage up by its name.
    stages = list(model)[first_stage:end_stage]
    training = model.training
    model.eval()
    try:
        for cpu_batch in batches:
            # The contexts end before the yield: the caller's code must not run in inference mode or under autocast.
            with (
                torch.inference_mode(),
                explain_out_of_memory(len(cpu_batch.indices), out_of_memory_fix),
                autocast(precision, device),
            ):
                # Inside the context, because this copy may be the one that finds no memory.
                batch = cpu_batch.to(device)
                value = batch.inputs
                for stage in stages:
                    value = stage(value)
            yield batch, value
    finally:
        model.train(training)


@contextmanager
def explain_out_of_memory(examples: int, fix: str = _SMALLER_BATCH) -> Iterator[None]:
    """Replace an out-of-memory error of torch by one that states the batch size and a fix.

    Args:
        examples: Number of examples in the batch.
        fix: Settings that the user can change.
    """
    try:
        yield
    except RuntimeError as error:  # torch.cuda.OutOfMemoryError is one; the CPU's allocator raises a plain one
        out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError) or any(t in str(error) for t in _OUT_OF_MEMORY)
        if not out_of_memory:
            raise
        raise MemoryRanOut(f"memory ran out on a batch of {examples} examples", fix=fix) from error
