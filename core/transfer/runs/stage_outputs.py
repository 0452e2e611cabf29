"""Outputs of a stage of a model for any number of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from transfer.config.train_settings import Precision
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
    batches = [
        stage_output(model, Batch.without_targets(preprocessing, encoded), stage, where=where)
        for encoded in encoded_batches
    ]
    if not batches:
        raise UserError("there are no values: expected at least one")
    # All batches have the structure of the first: they come from one stage.
    if isinstance(batches[0], Tensor):
        return _join(batches)
    return tuple(map(_join, zip(*batches, strict=True)))


def stage_output(
    model: Model, batch: Batch, stage: str, *, where: str, precision: Precision = "fp32", first_stage: int = 0
) -> Any:
    """Return the output of a stage for a batch, on the CPU.

    Args:
        model: Model.
        batch: Batch with the inputs of the first stage to run.
        stage: Name of a stage of the model.
        where: Model folder in errors.
        precision: Precision of the forward pass.
        first_stage: Index of the first stage to run; larger than 0 for cached features.

    Returns:
        Tensor (B, ...), or a pair of sequences (B, T, D) and their mask (B, T).

    Raises:
        UserError: The stage passes on something else.
    """
    stages = tuple(model.stages)
    device, end_stage = next(model.parameters()).device, stages.index(stage) + 1
    ((_, output),) = forward_batches(
        model, [batch], device=device, precision=precision, first_stage=first_stage, end_stage=end_stage
    )
    output = _to_cpu(output) if isinstance(output, Tensor) else tuple(map(_to_cpu, output))
    if not _has_row_per_value(output, len(batch.indices)):
        raise UserError(
            f"the output of stage {stage!r} is not one tensor with a row for each value",
            where=where,
            available=stages,
            fix=f"use a later stage, such as {stages[-2]}",
        )
    return output


def pooled(output: Any) -> Tensor:
    """Return an output of :func:`stage_output` as one tensor (B, ...): the mean over the steps of each sequence."""
    if isinstance(output, Tensor):
        return output
    features, mask = output
    weights = mask.unsqueeze(-1).to(features.dtype)
    # An empty sequence has no steps: its mean is zero.
    mean: Tensor = (features * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean


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
