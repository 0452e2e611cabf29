"""Outputs of a model for raw values, and the pieces of a value that changed its score.

The change is measured by leaving out one piece at a time (occlusion, Zeiler and Fergus 2014; erasure, Li et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from transfer.data.batch import Batch
from transfer.data.encoding import encode
from transfer.errors import RunError
from transfer.models.forward import forward_batches
from transfer.models.saved_model import LoadedModel
from transfer.system.iteration import batched

OCCLUSION_BATCH = 64
"""Number of occluded values that go through the model together."""


def outputs_of(loaded: LoadedModel, values: Sequence[Any], name: Callable[[int], str]) -> Tensor:
    """Return the outputs of a model for raw values, float32 (N, C), on the CPU.

    Args:
        loaded: The model with its preprocessing.
        values: N raw values of the model's field; they form one batch.
        name: Function that returns the name of a value, by index, for error messages.

    Raises:
        UserError: A value cannot be encoded, or the outputs are not finite.
    """
    encoded = encode(loaded.backbone.preprocessing, values, range(len(values)), name)
    outputs = outputs_of_encoded(loaded, encoded)
    refuse_non_finite(outputs, name)
    return outputs


def refuse_non_finite(outputs: Tensor, name: Callable[[int], str]) -> None:
    """Raise an error if outputs (N, C) contain NaN or infinity.

    Args:
        outputs: Outputs of the model, on the CPU.
        name: Function that returns the name of a value, by index, for error messages.

    Raises:
        RunError: An output is not finite.
    """
    finite = outputs.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        fix = "the weights may be damaged: copy the model again from the machine it was trained on"
        raise RunError("the outputs of the model are not finite", where=name(finite.index(False)), fix=fix)


def outputs_of_encoded(loaded: LoadedModel, encoded: Sequence[Any]) -> Tensor:
    """Return the outputs of a model for encoded values, float32 (N, C), on the CPU.

    Args:
        loaded: The model with its preprocessing.
        encoded: N values as the preprocessing's ``encode`` returns them; they form one batch.
    """
    device = next(loaded.model.parameters()).device
    batch = Batch.without_targets(loaded.backbone.preprocessing, encoded)
    ((_, outputs),) = forward_batches(loaded.model, [batch], device=device)
    on_cpu: Tensor = outputs.float().cpu()
    return on_cpu


def explain_output(loaded: LoadedModel, value: Any, output: Tensor) -> dict[str, Any]:
    """Return the score of a value, and the change of the score that is due to each of its pieces.

    Args:
        loaded: The model; its preprocessing divides a value into pieces.
        value: A raw value.
        output: Outputs of the model for the value, (C,).

    Returns:
        ``of``, the name of the explained output; its ``score``; and the ``pieces`` in order, each with its ``change``:
        the score with the piece minus the score without it, or None if nothing is left without it.
    """
    scores = loaded.task.scores(output[None])[0]
    index = loaded.task.explained_output(scores)
    score = float(scores[index])
    pieces: list[dict[str, Any]] = []
    for batch in batched(loaded.backbone.preprocessing.occlusions(value), OCCLUSION_BATCH):
        # Nothing is left of a text without its only word: that piece has no score to compare with.
        rests = [occlusion.rest for occlusion in batch if occlusion.rest is not None]
        scores_without: Iterator[float] = iter(())
        if rests:
            outputs = outputs_of(loaded, rests, lambda i: f"the input without its piece {i + 1}")
            scores_without = iter(loaded.task.scores(outputs)[:, index].tolist())
        for occlusion in batch:
            change = None if occlusion.rest is None else score - next(scores_without)
            pieces.append({"piece": occlusion.piece, "change": change})
    names = loaded.data.classes
    return {"of": names[index] if index < len(names) else str(index), "score": score, "pieces": pieces}
