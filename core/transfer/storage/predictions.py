"""Predictions for a split, in a safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from transfer.errors import RunError
from transfer.system.atomic_files import read_bytes, write_atomically

NAMES = "names"
"""Tensor with the names of the examples: a JSON list in UTF-8, uint8 (bytes,)."""


@dataclass(frozen=True)
class Predictions:
    """The predictions for the N examples of the test split, in order.

    Args:
        predictions: Predictions (N, ...) as the metrics of the task take them.
        targets: Targets (N, ...).
        losses: Loss of each example, float (N,). None in runs of older versions.
        confidences: Highest score of each example (a probability if the task has probabilities), float (N,). None in
            runs of older versions.
        scores: Scores of all outputs, float (N, C), such as the probability of each class. None if they are equal to
            the predictions, and in runs of older versions.
        names: Name of each example, such as its file. Empty if the examples have no names, and in runs of older
            versions.
    """

    predictions: Tensor
    targets: Tensor
    losses: Tensor | None = None
    confidences: Tensor | None = None
    scores: Tensor | None = None
    names: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def write_predictions(path: Path, scored: Predictions) -> None:
    """Write predictions to a safetensors file."""
    tensors = {name: tensor.contiguous() for name, tensor in scored.tensors().items()}
    if scored.names:
        # As a tensor, because the metadata of a safetensors file is limited to 100 MB.
        content = json.dumps([str(name) for name in scored.names], ensure_ascii=False).encode(errors="replace")
        tensors[NAMES] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    write_atomically(path, save(tensors))


def read_predictions(path: Path) -> Predictions | None:
    """Return the predictions that :func:`write_predictions` wrote; None if there is no file.

    Raises:
        RunError: The file is damaged.
    """
    try:
        tensors = load(read_bytes(path))
        names = _names(tensors.pop(NAMES, None))
        # Later versions may add tensors.
        fields: dict[str, Any] = {
            name: tensor for name, tensor in tensors.items() if name in Predictions.__dataclass_fields__
        }
        predictions = Predictions(**fields, names=names)
        lengths = {len(tensor) for tensor in predictions.tensors().values()} | ({len(names)} if names else set())
        if len(lengths) != 1:
            raise ValueError("the tensors differ in length")
        return predictions
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise RunError(f"the predictions cannot be read: {error}", where=str(path)) from error


def _names(stored: Tensor | None) -> tuple[str, ...]:
    """Return names of examples that are stored as a JSON list in UTF-8.

    Raises:
        ValueError: The content is none.
    """
    if stored is None:
        return ()
    names = json.loads(stored.numpy().tobytes())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the names of the examples are wrong: expected a list of texts")
    return tuple(names)
