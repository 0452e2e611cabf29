"""Predictions of a trained model for raw inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transfer.runs.predictor import OnError, load
from transfer.training.events import Observer, ignore_events


def predict(
    run: str | Path,
    sources: Any,
    *,
    column: str | None = None,
    keep: Sequence[str] = (),
    explain: bool = False,
    on_error: OnError = "fail",
    device: str | None = None,
    observe: Observer = ignore_events,
) -> Iterator[dict[str, Any]]:
    """Predict inputs with the model of a run, in batches and in order.

    The model is read by every call; :func:`transfer.load` reads it once for many calls.

    Args:
        run: Run directory, or model folder (an export in the format ``safetensors``).
        sources: Inputs. A ``pathlib.Path`` is a file, or a folder whose files are read. A string is a text if the
            backbone reads texts, and the path of a file otherwise. Other inputs are raw values: a PIL image, an array
            of uint8 (H, W, C), bytes of a file. With ``column``, a table: its path, a data frame of pandas or polars, a
            dict of columns, or a list of dicts.
        column: Name of the column of a table with the inputs.
        keep: Names of the columns of a table that the answers repeat.
        explain: Whether to compute the effect of each piece of an input on its score, by leaving out one piece at a
            time (occlusion, Zeiler and Fergus 2014; erasure, Li et al. 2016).
        on_error: Whether the first input that cannot be read raises its error (``fail``) or gets an answer with an
            ``error`` and None for the interpretation (``skip``).
        device: Device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None uses the run's
            ``train.device``, or ``auto`` if this machine does not have that device.
        observe: Function that is called with notes.

    Yields:
        ``input`` and the task's interpretation (for classification ``label``, ``probability``, ``probabilities``). A
        text with words outside the vocabulary also gets ``unknown_fraction``. If no word is in the vocabulary, the
        interpretation is None, and a ``note`` states the reason. With ``explain``, also the ``explanation``: ``of``,
        the name of the explained output (the predicted class); its ``score``; and the ``pieces`` in order, each with
        its ``change``, the score with the piece minus the score without it.

    Raises:
        UserError: The run is damaged, the device does not exist, an input cannot be read, or the backbone cannot divide
            its inputs into pieces.
    """
    predictor = load(run, device=device, observe=observe)
    yield from predictor.answers(predictor.inputs(sources, column, keep), explain=explain, on_error=on_error)
