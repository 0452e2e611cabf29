"""The test examples with the highest loss: what they are, what was said of them, and what moved the score."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transfer.data.targets import describe
from transfer.interfaces import Preprocessing, Split
from transfer.models.saved_model import LoadedModel
from transfer.reports.html import escape
from transfer.runs.occlusion import explain_output, outputs_of
from transfer.storage.run_directory import Predictions

MAX_EXAMPLES = 12
MAX_CHARACTERS = 1200
"""Of a text that are shown."""
MAX_PIECES_NAMED = 4
JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Example:
    """One of the examples with the highest loss.

    Args:
        name: What it is called.
        loss: Its loss.
        true: Its target, in words.
        said: What was predicted, in words.
        content: The example itself, as HTML.
        explained: Its text says what moved the score.
    """

    name: str
    loss: float
    true: str
    said: str
    content: str
    explained: bool


def hardest(
    trained: LoadedModel, test: Split, scored: Predictions, losses: Tensor, most_seconds: float | None
) -> list[Example]:
    """Return the examples with the highest loss, the highest first.

    Args:
        trained: Whose preprocessing shows them.
        test: The raw examples.
        scored: What the model made of them.
        losses: Float (N,).
        most_seconds: Explain no more of them than about so many seconds of the processor allow; None: all.
    """
    places = losses.argsort(descending=True, stable=True)[:MAX_EXAMPLES].tolist()
    column, preprocessing = test.column(*trained.backbone.fields), trained.backbone.preprocessing
    values = [column[place] for place in places]
    explained = _explain(trained, values, [test.name(place) for place in places], most_seconds)
    return [
        Example(
            test.name(place),
            float(losses[place]),
            describe(trained.data, test.targets[place]),
            _said(trained, scored, place),
            _content(preprocessing, value) if explanation is None else _explained(explanation),
            explanation is not None,
        )
        for place, value, explanation in zip(places, values, explained, strict=True)
    ]


def _said(trained: LoadedModel, scored: Predictions, place: int) -> str:
    """Say what was predicted, and how surely where that is known."""
    data, prediction = trained.data, scored.predictions[place]
    if data.target == "class" and not prediction.ndim and not prediction.is_floating_point():
        sure = "" if scored.confidences is None else f" ({float(scored.confidences[place]):.3f})"
        return f"{describe(data, prediction)}{sure}"
    if data.target == "labels" and prediction.ndim:
        return describe(data, prediction >= threshold(trained))
    if data.target == "number" and prediction.ndim:
        return describe(data, prediction)
    return str(prediction.tolist())


def threshold(trained: LoadedModel) -> float:
    """Return the probability from which a label counts as predicted."""
    return float(getattr(trained.task, "threshold", 0.5))


def _explain(
    trained: LoadedModel, values: Sequence[Any], names: Sequence[str], most_seconds: float | None
) -> list[Mapping[str, Any] | None]:
    """Explain each value that there is time for, where the backbone can take it apart."""
    preprocessing = trained.backbone.preprocessing
    if not preprocessing.explains:
        return [None] * len(values)
    trained.model.eval()
    started = time.process_time()
    outputs = outputs_of(trained, values, names.__getitem__)
    each, spent = (time.process_time() - started) / len(values), 0.0
    found: list[Mapping[str, Any] | None] = []
    for value, output in zip(values, outputs, strict=True):
        if most_seconds is not None:
            expected = each * sum(1 for _ in preprocessing.occlusions(value))
            if spent + expected > most_seconds:
                found.append(None)
                continue
            spent += expected
        found.append(explain_output(trained, value, output))
    return found


def _explained(explanation: Mapping[str, Any]) -> str:
    """Show an input with its pieces coloured by sign and strength, then those that moved the score most."""
    pieces = [(piece["piece"], piece["change"] or 0.0) for piece in explanation["pieces"]]
    strongest = max((abs(change) for _, change in pieces), default=0.0) or 1.0
    parts, characters = [], 0
    for piece, change in pieces:
        if isinstance(piece, str):
            if characters > MAX_CHARACTERS:
                parts.append(" …")
                break
            characters += len(piece)
            parts.append(_piece(piece, change, strongest))
    ranked = sorted(pieces, key=lambda one: -abs(one[1]))[:MAX_PIECES_NAMED]
    named = [
        f'<span class="{_side(change)}">{escape(str(piece).strip())} {change:+.3f}</span>'
        for piece, change in ranked
        if round(change, 3)
    ]
    moved = f"{escape(explanation['of'])} {explanation['score']:.3f}; moved by {' '.join(named) or 'no piece'}"
    return f'<p class="text">{"".join(parts)}</p><p class="moved">{moved}</p>'


def _piece(piece: str, change: float, strongest: float) -> str:
    share = abs(change) / strongest
    word = piece.rstrip()
    if share < 1 / 10:
        return escape(piece)
    strength = "weak" if share < 1 / 3 else "fair" if share < 2 / 3 else "strong"
    marked = f'<span class="{_side(change)} {strength}" title="{change:+.4f}">{escape(word)}</span>'
    return marked + escape(piece[len(word) :])


def _side(change: float) -> str:
    return "for" if change > 0 else "against"


def _content(preprocessing: Preprocessing, value: Any) -> str:
    """Show a raw value: a picture, a text, each part of several, or the beginning of what it is in Python."""
    if preprocessing.parts and isinstance(value, tuple):
        return "".join(_content(part, one) for part, one in zip(preprocessing.parts.values(), value, strict=True))
    if (picture := preprocessing.thumbnail(value)) is not None:
        kind = "jpeg" if picture.startswith(JPEG) else "png"
        return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(picture).decode()}">'
    words = value if isinstance(value, str) else repr(value)
    return f'<p class="text">{escape(words[:MAX_CHARACTERS])}{" …" if len(words) > MAX_CHARACTERS else ""}</p>'
