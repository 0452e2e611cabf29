"""The test examples with the highest loss: their content, their predictions, and the pieces that changed the score."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from transfer.data.targets import describe
from transfer.interfaces import Preprocessing, Split
from transfer.models.saved_model import LoadedModel
from transfer.runs.class_metrics import threshold
from transfer.runs.occlusion import explain_output, outputs_of
from transfer.storage.predictions import Predictions

MAX_EXAMPLES = 12
MAX_CHARACTERS = 1200
"""Number of characters shown of a text."""
MAX_PIECES_NAMED = 4
JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Image:
    """An image that an example consists of.

    Args:
        uri: The image as a ``data:`` URI.
    """

    kind: ClassVar[str] = "image"
    uri: str


@dataclass(frozen=True)
class Text:
    """A text that an example consists of.

    Args:
        text: The text, cut to :data:`MAX_CHARACTERS`.
    """

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Piece:
    """A piece of an explained input.

    Args:
        text: The piece, with the whitespace after it.
        change: Change of the score that is due to the piece: score with it minus score without it.
        strength: ``strong``, ``fair`` or ``weak`` relative to the largest change; empty if the change is small.
    """

    text: str
    change: float
    strength: str = ""

    @property
    def side(self) -> str:
        """Whether the piece raises the score (``for``) or lowers it (``against``)."""
        return "for" if self.change > 0 else "against"

    @property
    def word(self) -> str:
        """The piece without the whitespace after it, which is not highlighted."""
        return self.text.rstrip()

    @property
    def whitespace(self) -> str:
        """The whitespace after the piece."""
        return self.text[len(self.word) :]


@dataclass(frozen=True)
class Explanation:
    """An input with the changes of the score that are due to its pieces.

    Args:
        output: Name of the explained output, such as the predicted class.
        score: Score of the output for the complete input.
        pieces: The pieces of the input in order, cut to :data:`MAX_CHARACTERS`.
        strongest: The pieces with the largest changes, the largest first.
        of_words: Whether all pieces of the input are strings.
    """

    kind: ClassVar[str] = "explanation"
    output: str
    score: float
    pieces: tuple[Piece, ...]
    strongest: tuple[Piece, ...]
    of_words: bool = True


Content = Image | Text | Explanation


@dataclass(frozen=True)
class Example:
    """One of the examples with the highest loss.

    Args:
        name: Name of the example, such as its file.
        loss: Loss of the example.
        true: Target of the example as text.
        predicted: Prediction as text.
        content: The example itself; one entry for each input of the model.
    """

    name: str
    loss: float
    true: str
    predicted: str
    content: tuple[Content, ...]

    @property
    def has_other_pieces(self) -> bool:
        """Whether an explanation names pieces that are not words, such as regions of an image or parts of a sound."""
        return any(isinstance(part, Explanation) and not part.of_words for part in self.content)

    @property
    def explained(self) -> bool:
        """Whether the content shows the changes of the score."""
        return any(isinstance(part, Explanation) for part in self.content)


def top_losses(
    trained: LoadedModel, test: Split, predictions: Predictions, losses: Tensor, max_seconds: float | None
) -> list[Example]:
    """Return the examples with the highest loss, the highest first.

    Args:
        trained: The model; its preprocessing renders the examples.
        test: The raw test examples.
        predictions: Predictions of the model for the test examples.
        losses: Loss of each test example, float (N,).
        max_seconds: Limit on the CPU time for explanations; None explains all examples.
    """
    indices = losses.argsort(descending=True, stable=True)[:MAX_EXAMPLES].tolist()
    column, preprocessing = test.column(*trained.backbone.fields), trained.backbone.preprocessing
    values = [column[index] for index in indices]
    explanations = _explain(trained, values, [test.name(index) for index in indices], max_seconds)
    return [
        Example(
            test.name(index),
            float(losses[index]),
            describe(trained.data, test.targets[index]),
            _predicted(trained, predictions, index),
            _content(preprocessing, value) if explanation is None else _explained(preprocessing, value, explanation),
        )
        for index, value, explanation in zip(indices, values, explanations, strict=True)
    ]


def _predicted(trained: LoadedModel, predictions: Predictions, index: int) -> str:
    """Return a prediction as text, with its confidence if that was stored."""
    data, prediction = trained.data, predictions.predictions[index]
    if data.target == "class" and not prediction.ndim and not prediction.is_floating_point():
        confidence = "" if predictions.confidences is None else f" ({float(predictions.confidences[index]):.3f})"
        return f"{describe(data, prediction)}{confidence}"
    if data.target == "labels" and prediction.ndim:
        return describe(data, prediction >= threshold(trained.task))
    if data.target == "number" and prediction.ndim:
        return describe(data, prediction)
    return str(prediction.tolist())


def _explain(
    trained: LoadedModel, values: Sequence[Any], names: Sequence[str], max_seconds: float | None
) -> list[Mapping[str, Any] | None]:
    """Explain the values for which there is time, if the preprocessing can divide them into pieces."""
    preprocessing = trained.backbone.preprocessing
    if not preprocessing.explains:
        return [None] * len(values)
    started = time.process_time()
    outputs = outputs_of(trained, values, names.__getitem__)
    # An explanation costs one forward pass per piece. The time of the passes so far predicts whether the next fits.
    seconds_per_value, spent = (time.process_time() - started) / len(values), 0.0
    explanations: list[Mapping[str, Any] | None] = []
    for value, output in zip(values, outputs, strict=True):
        # A long text that does not fit is skipped: a shorter one after it may still fit.
        if max_seconds is not None:
            expected = seconds_per_value * sum(1 for _ in preprocessing.occlusions(value))
            if spent + expected > max_seconds:
                explanations.append(None)
                continue
            spent += expected
        explanations.append(explain_output(trained, value, output))
    return explanations


def _explanation(explanation: Mapping[str, Any]) -> Explanation:
    """Rate the pieces of an explanation by the size of their change."""
    changes = [(piece["piece"], piece["change"] or 0.0) for piece in explanation["pieces"]]
    largest = max((abs(change) for _, change in changes), default=0.0) or 1.0
    pieces, characters = [], 0
    for piece, change in changes:
        if not isinstance(piece, str):
            continue
        if characters > MAX_CHARACTERS:
            pieces.append(Piece(" …", 0.0))
            break
        characters += len(piece)
        pieces.append(Piece(piece, change, _strength(abs(change) / largest)))
    ranked = sorted(changes, key=lambda one: -abs(one[1]))[:MAX_PIECES_NAMED]
    strongest = [Piece(str(piece).strip(), change) for piece, change in ranked if round(change, 3)]
    of_words = all(isinstance(piece, str) for piece, _ in changes)
    return Explanation(explanation["of"], explanation["score"], tuple(pieces), tuple(strongest), of_words)


def _explained(preprocessing: Preprocessing, value: Any, explanation: Mapping[str, Any]) -> tuple[Content, ...]:
    """Return an explanation, below the parts of the raw value that its pieces do not show."""
    explained, parts = _explanation(explanation), _content(preprocessing, value)
    return (*(part for part in parts if isinstance(part, Image) or not explained.pieces), explained)


def _strength(fraction: float) -> str:
    """Return the strength of a change that is a fraction of the largest one."""
    if fraction < 1 / 10:
        return ""
    return "weak" if fraction < 1 / 3 else "fair" if fraction < 2 / 3 else "strong"


def _content(preprocessing: Preprocessing, value: Any) -> tuple[Content, ...]:
    """Return a raw value as an image, as a text, or as the start of its Python representation; a tuple part by part."""
    if preprocessing.parts and isinstance(value, tuple):
        parts = zip(preprocessing.parts.values(), value, strict=True)
        return tuple(content for part, one in parts for content in _content(part, one))
    image = None
    with suppress(ValueError, OSError):  # a value that cannot be rendered is shown as text
        image = preprocessing.thumbnail(value)
    if image is not None:
        kind = "jpeg" if image.startswith(JPEG) else "png"
        return (Image(f"data:image/{kind};base64,{base64.b64encode(image).decode()}"),)
    text = value if isinstance(value, str) else repr(value)
    return (Text(text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"),)
