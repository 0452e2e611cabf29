"""Outputs of a stage of a model for any number of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from transfer.data.batch import Batch
from transfer.errors import UserError
from transfer.interfaces import Preprocessing
from transfer.models.forward import forward_batches
from transfer.models.model import Model


def stage_outputs(
    model: Model, preprocessing: Preprocessing, encoded_batches: Iterable[Sequence[Any]], stage: str, *, where: str
) -> Any:
    """Return the output of a stage for all values, on the CPU.

    Args:
        model: Model.
        preprocessing: Preprocessing of the backbone.
        encoded_batches: Batches of encoded values.
        stage: Name of a stage of the model.
        where: Model folder in errors.

    Returns:
        Tensor (N, ...), or a pair of sequences (N, T, D), padded with zeros, and their mask (N, T).

    Raises:
        UserError: There is no value, or the stage passes on something else.
    """
    stages = tuple(model.stages)
    device = next(model.parameters()).device
    batches: list[Any] = []
    for encoded in encoded_batches:
        batch = Batch.without_targets(preprocessing, encoded)
        ((_, output),) = forward_batches(model, [batch], device=device, end_stage=stages.index(stage) + 1)
        output = _to_cpu(output) if isinstance(output, Tensor) else tuple(map(_to_cpu, output))
        if not _has_row_per_value(output, len(encoded)):
            raise UserError(
                f"the output of stage {stage!r} is not one tensor with a row for each value",
                where=where,
                available=stages,
                fix=f"use a later stage, such as {stages[-2]}",
            )
        batches.append(output)
    if not batches:
        raise UserError("there are no values: expected at least one")
    # All batches have the structure of the first: they come from one stage.
    if isinstance(batches[0], Tensor):
        return _join(batches)
    return tuple(map(_join, zip(*batches, strict=True)))


def _to_cpu(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu()


def _has_row_per_value(output: Any, count: int) -> bool:
    """Return whether an output is a tensor (B, ...), or a pair of sequences (B, T, ...) and their mask (B, T)."""
    if isinstance(output, Tensor):
        return len(output) == count
    # A tuple may contain other things: distinct word vectors with their indices, or the values of several branches.
    if len(output) != 2 or output[1].dtype != torch.bool:
        return False
    return len(output[1]) == count and output[0].shape[:2] == output[1].shape


def _join(batches: Sequence[Tensor]) -> Tensor:
    """Return batches (B, ...) as one tensor (N, ...), padded with zeros to the largest size in each dimension."""
    shape = [max(sizes) for sizes in zip(*(batch.shape[1:] for batch in batches), strict=True)]
    joined = batches[0].new_zeros((sum(map(len, batches)), *shape))
    start = 0
    for batch in batches:
        region = (slice(start, start + len(batch)), *map(slice, batch.shape[1:]))
        joined[region] = batch
        start += len(batch)
    return joined
