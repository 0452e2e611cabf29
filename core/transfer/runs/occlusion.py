"""What a model makes of raw values, and which pieces of a value moved its score.

By taking out one piece at a time (occlusion, Zeiler and Fergus 2014; erasure, Li et al. 2016).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from transfer.data.batch import move
from transfer.data.encoding import encode
from transfer.errors import RunError
from transfer.models.saved_model import LoadedModel

TOGETHER = 64
"""Values without a piece that go through the model at once."""


def outputs_of(loaded: LoadedModel, values: Sequence[Any], name: Callable[[int], str]) -> Tensor:
    """Return the model's outputs for raw values, float32 (N, C), on the CPU.

    Args:
        loaded: The model.
        values: N raw values of its field, which go through it together.
        name: What a value is called in messages.

    Raises:
        UserError: A value cannot be encoded, or the outputs are not finite.
    """
    preprocessing = loaded.backbone.preprocessing
    encoded = encode(preprocessing, values, range(len(values)), name)
    device = next(loaded.model.parameters()).device
    with torch.inference_mode():
        outputs: Tensor = loaded.model(move(preprocessing.collate(encoded), device)).float().cpu()
    finite = outputs.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        fix = "the weights may be damaged: copy the model again from where it was trained"
        raise RunError("the model's outputs are not finite", where=name(finite.index(False)), fix=fix)
    return outputs


def explain_output(loaded: LoadedModel, value: Any, output: Tensor) -> dict[str, Any]:
    """Score a value without each of its pieces in turn, in batches.

    Args:
        loaded: The model; its preprocessing says how to take a value apart.
        value: A raw value.
        output: The model's outputs for it, (C,).

    Returns:
        ``of`` which output, its ``score``, and the ``pieces`` in order, each with its ``change``: the score less what
        it is without that piece, or None where nothing would be left.
    """
    scores = loaded.task.scores(output[None])[0]
    index = loaded.task.explained_output(scores)
    whole = float(scores[index])
    pieces: list[dict[str, Any]] = []
    occlusions = iter(loaded.backbone.preprocessing.occlusions(value))
    while some := list(itertools.islice(occlusions, TOGETHER)):
        rests = [occlusion.rest for occlusion in some if occlusion.rest is not None]
        without: Iterator[float] = iter(())
        if rests:
            outputs = outputs_of(loaded, rests, lambda i: f"the input without its piece {i + 1}")
            without = iter(loaded.task.scores(outputs)[:, index].tolist())
        for occlusion in some:
            change = None if occlusion.rest is None else whole - next(without)
            pieces.append({"piece": occlusion.piece, "change": change})
    names = loaded.data.classes
    return {"of": names[index] if index < len(names) else str(index), "score": whole, "pieces": pieces}
