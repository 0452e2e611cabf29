"""Predictions of a trained model for raw inputs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transfer.errors import DataError, RunError
from transfer.interfaces import Preprocessing
from transfer.models.model_json import DESCRIPTION
from transfer.models.saved_model import LoadedModel, find_model, plugin_changes, read_model
from transfer.runs.inference_device import inference_device
from transfer.runs.occlusion import explain_output, outputs_of
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json
from transfer.training.events import Note, Observer, ignore_events

PREDICTION_BATCH = 64
"""Number of inputs that go through the model together."""


def predict(
    run: str | Path,
    sources: Iterable[str],
    *,
    explain: bool = False,
    device: str | None = None,
    observe: Observer = ignore_events,
) -> Iterator[dict[str, Any]]:
    """Predict inputs with the model of a run, in batches and in order.

    Args:
        run: Run directory, or model folder (an export in the format ``safetensors``).
        sources: Inputs. Each is the path of a file, a pattern of paths, or the content itself if the backbone reads
            text.
        explain: Whether to compute the effect of each piece of an input on its score, by leaving out one piece at a
            time (occlusion, Zeiler and Fergus 2014; erasure, Li et al. 2016).
        device: Device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None uses the run's
            ``train.device``, or ``auto`` if this machine does not have that device.
        observe: Function that is called with notes.

    Yields:
        ``input`` and the task's interpretation (for classification ``label``, ``probability``, ``probabilities``). With
        ``explain``, also the ``explanation``: ``of``, the name of the explained output (the predicted class); its
        ``score``; and the ``pieces`` in order, each with its ``change``, the score with the piece minus the score
        without it.

    Raises:
        UserError: The run is damaged, the device does not exist, an input cannot be read, or the backbone cannot divide
            its inputs into pieces.
    """
    folder = find_model(run)
    loaded = read_model(folder)
    if changed := plugin_changes(folder):
        observe(Note(f"plugins have changed since the run, so results may differ: {'; '.join(changed)}"))
    if explain and not loaded.backbone.preprocessing.explains:
        name = read_json(folder / DESCRIPTION, "there is no model here")["backbone"]["name"]
        fix = "predict without an explanation"
        raise RunError(f"backbone {name!r} cannot divide an input into pieces", where=str(folder), fix=fix)
    loaded.model.to(inference_device(device, _device_of_run(Path(run), folder), observe))
    names: list[str] = []
    for name in _expand(sources):
        names.append(name)
        if len(names) == PREDICTION_BATCH:
            yield from _predict(loaded, names, explain)
            names = []
    # The last batch may be smaller.
    if names:
        yield from _predict(loaded, names, explain)


def _device_of_run(run: Path, folder: Path) -> str:
    """Return the ``train.device`` of a run; ``auto`` for a model folder without its run."""
    # `find_model` returns the path itself if it is a model folder.
    if folder == run:
        return "auto"
    return str(RunDirectory.open(run).config().get("train", {}).get("device", "auto"))


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
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the input cannot be read: {reason}", where=source or "(empty input)") from error


def _expand(sources: Iterable[str]) -> Iterator[str]:
    """Yield the sources, with every pattern that matches files replaced by these files."""
    for source in sources:
        # A text may contain a question mark: only a source that matches files is a pattern.
        matches = sorted(glob.glob(os.path.expanduser(source))) if glob.has_magic(source) else []
        yield from matches or [source]
