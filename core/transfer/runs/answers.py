"""Answers of predictions: the interpretation of outputs, and the columns of answers in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from transfer.models.saved_model import LoadedModel

NOT_IN_EVERY_ANSWER = ("unknown_fraction", "note", "error")
"""Keys that only some answers have."""


def answers_of(loaded: LoadedModel, encoded: Sequence[Any], outputs: Tensor) -> list[dict[str, Any]]:
    """Return the task's interpretation of outputs (N, C) for encoded values.

    An answer to a value that is partly unknown contains ``unknown_fraction``. If a value is completely unknown, the
    outputs do not depend on it: its answer contains None and a ``note``.
    """
    answers = []
    for value, meaning in zip(encoded, loaded.task.interpret(outputs), strict=True):
        fraction = loaded.backbone.preprocessing.unknown_fraction(value)
        note = {"note": "no word of it is in the vocabulary of the model"} if fraction == 1 else {}
        unknown = {"unknown_fraction": fraction} if fraction else {}
        answers.append((dict.fromkeys(meaning) if note else meaning) | unknown | note)
    return answers


def complete_probabilities(answers: Sequence[dict[str, Any]], loaded: LoadedModel, outputs: Tensor) -> None:
    """Replace the probabilities of the most probable classes by those of all classes, in place."""
    scores, classes = loaded.task.scores(outputs), loaded.data.classes
    if scores.ndim != 2 or scores.shape[1] != len(classes):
        return
    for answer, row in zip(answers, scores.tolist(), strict=True):
        if isinstance(answer.get("probabilities"), dict):
            answer["probabilities"] = dict(zip(classes, row, strict=True))


def flat(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer with one column for each probability, named ``probability_CLASS``."""
    columns: dict[str, Any] = {}
    for name, value in answer.items():
        if name == "probabilities" and isinstance(value, Mapping):
            columns |= {f"probability_{label}": number for label, number in value.items()}
        elif name != "probabilities":
            columns[name] = value
    return columns
