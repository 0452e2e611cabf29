"""Predictions of a run's model for raw inputs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transfer.errors import DataError, RunError
from transfer.interfaces import Preprocessing
from transfer.models.model_json import DESCRIPTION
from transfer.models.saved_model import LoadedModel, find_model, read_model
from transfer.runs.occlusion import explain_output, outputs_of
from transfer.system.atomic_files import read_json

PREDICTION_BATCH = 64


def predict(run: str | Path, sources: Iterable[str], *, explain: bool = False) -> Iterator[dict[str, Any]]:
    """Say what a run's model makes of some inputs, in batches, in order.

    Args:
        run: A run directory, or a model folder (an export as ``safetensors``).
        sources: For each the path of a file, a pattern of paths, or what the backbone's field is made of (a text).
        explain: Say which pieces of an input moved its score, by taking out one at a time (occlusion, Zeiler and Fergus
            2014; erasure, Li et al. 2016).

    Yields:
        ``input`` and what the task says of it (for classification ``label``, ``probability``, ``probabilities``), and
        with ``explain`` the ``explanation``: ``of`` which output (the class predicted), its ``score``, and the
        ``pieces`` in order, each with its ``change``: the score less what it is without that piece.

    Raises:
        UserError: The run is not right, an input cannot be read, or the backbone cannot take its inputs apart.
    """
    folder = find_model(run)
    loaded = read_model(folder)
    if explain and not loaded.backbone.preprocessing.explains:
        name = read_json(folder / DESCRIPTION, "there is no model here")["backbone"]["name"]
        fix = "predict without an explanation"
        raise RunError(f"backbone {name!r} does not say how to take an input apart", where=str(folder), fix=fix)
    names: list[str] = []
    for name in _expand(sources):
        names.append(name)
        if len(names) == PREDICTION_BATCH:
            yield from _predict(loaded, names, explain)
            names = []
    if names:
        yield from _predict(loaded, names, explain)


def _predict(loaded: LoadedModel, names: Sequence[str], explain: bool) -> Iterator[dict[str, Any]]:
    values = [_read(loaded.backbone.preprocessing, name) for name in names]
    outputs = outputs_of(loaded, values, lambda i: names[i] or "(empty input)")
    meanings = loaded.task.interpret(outputs)
    for name, value, output, meaning in zip(names, values, outputs, meanings, strict=True):
        explanation = {"explanation": explain_output(loaded, value, output)} if explain else {}
        yield {"input": name, **meaning, **explanation}


def _read(preprocessing: Preprocessing, source: str) -> Any:
    try:
        return preprocessing.read(source)
    except (ValueError, OSError) as error:
        what = getattr(error, "strerror", None) or error
        raise DataError(f"the input cannot be read: {what}", where=source or "(empty input)") from error


def _expand(sources: Iterable[str]) -> Iterator[str]:
    """Put the files that a pattern matches in its place; a source that is no pattern, or matches nothing, stays."""
    for source in sources:
        # A text may hold a question mark; only what matches files is a pattern.
        matches = sorted(glob.glob(os.path.expanduser(source))) if glob.has_magic(source) else []
        yield from matches or [source]
