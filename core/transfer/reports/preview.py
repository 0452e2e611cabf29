"""Previews: a training batch as the model receives it, and predictions next to the true targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.config.check import load_config
from transfer.config.run_config import Config
from transfer.config.train_settings import MixupCutmix, TrainConfig
from transfer.data.encoding import encode
from transfer.data.loader import Loader
from transfer.data.targets import describe
from transfer.errors import RunError, UserError
from transfer.interfaces import Backbone, DataSpec, Split, Task
from transfer.models.forward import forward_batches
from transfer.models.model import Model
from transfer.models.precision import place, resolve_precision
from transfer.models.recorded_plugins import load_run_config
from transfer.models.saved_backbone import build_backbone
from transfer.models.saved_model import read_model
from transfer.runs.data import changed_split, read_splits
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import write_atomically
from transfer.system.devices import resolve_device
from transfer.system.formatting import format_value
from transfer.training.build import make_loader, read_data
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.mixup import mix_batch
from transfer.training.preflight import preflight

MAX_EXAMPLES = 64
"""Number of examples shown of a batch."""
PREDICTIONS_PER_GROUP = 8
"""Number of predictions shown in each group: correct, wrong and least certain."""


@dataclass(frozen=True)
class Preview:
    """A rendered batch of examples.

    Args:
        content: Content of a PNG file, or text.
        path: Path of the file with the content; None if it was not written.
    """

    content: bytes | str
    path: Path | None = None


def preview_batch(config: Config, overrides: Sequence[str] = (), *, output: str | Path | None = None) -> Preview:
    """Render the first training batch of a config as the model receives it: encoded, augmented, collated and mixed.

    Nothing is trained, and no weights are read.

    Args:
        config: Path of a YAML file, or the config as a mapping.
        overrides: Changes of the config, each ``path.to.key=value``.
        output: Path of the image (``.png``) or text file to write. By default, an image is written to
            ``NAME-batch.png`` and a text is not written.

    Raises:
        UserError: The config or the data is invalid, or the backbone cannot render its field.
    """
    checked = load_config(config, overrides)
    fields = preflight(checked).backbone.fields
    data, splits = read_data(checked)
    split = splits["train"]
    # Built from the data, because the vocabulary comes from it; pretrained weights are not needed.
    backbone = build_backbone(checked.backbone, split.column(*fields))
    # The same order and augmentation as the first batch of a training run with this seed.
    batch = next(make_loader(checked, split, backbone, training=True).epoch(limit=1)).to(torch.device("cpu"))
    captions = [describe(data.spec, target) for target in batch.targets]
    inputs = batch.inputs
    if checked.train.mix is not None:
        inputs, captions = _mix(inputs, captions, checked.train.mix, checked.seed)
    shown = min(len(captions), MAX_EXAMPLES)
    limit = "" if shown == len(captions) else f" (the first {shown})"
    heading = f"{checked.name}: the first training batch, {len(captions)} examples{limit}"
    column = split.column(*fields)
    values = [column[int(i)] for i in batch.indices[:shown]]
    content = _render(backbone, _first(inputs, shown), values, captions[:shown], {heading: range(shown)})
    path = Path(output).expanduser() if output is not None else None
    if path is None and isinstance(content, bytes):
        path = Path(f"{checked.name}-batch.png")
    return _write(content, path)


def preview_predictions(
    run: str | Path, split: str = "test", *, device: str = "auto", observe: Observer = ignore_events
) -> Preview:
    """Render predictions of a run's model: the most confident correct and wrong ones, and the least certain ones.

    If the task does not predict one label per example, those with the smallest and the largest loss are rendered. The
    image or text is written to ``RUN/plots/``.

    Args:
        run: Run directory.
        split: Name of the split: ``train``, ``validation`` or ``test``.
        device: Device to compute on: auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.
        observe: Function that is called with a note if the split has changed since the training.

    Raises:
        UserError: The run or its data is invalid, the data has a class that the model does not have, the split does not
            exist, or the backbone cannot render its field.
    """
    directory = RunDirectory.open(run)
    directory.refuse_links()
    config = load_run_config(directory)
    loaded = read_model(directory.model)
    splits = read_splits(config, loaded.data, directory.path)
    if split not in splits:
        raise RunError(f"the data has no split {split!r}", where=str(directory.path), available=list(splits))
    examples = splits[split]
    if (note := changed_split(directory.summary(), split, examples)) is not None:
        observe(Note(note))
    loader = make_loader(config, examples, loaded.backbone)
    outputs = _outputs(loaded.model, loader, config.train, resolve_device(device))
    predictions = loaded.task.interpret(outputs)
    groups = _groups(loaded.task, loaded.data, examples, outputs, predictions)
    indices = [index for group in groups.values() for index in group]
    # Positions of each group's examples in the batch that is rendered.
    ends = np.cumsum([len(group) for group in groups.values()]).tolist()
    positions = {name: range(end - len(groups[name]), end) for name, end in zip(groups, ends, strict=True)}
    captions = [_caption(loaded.data, examples.targets[i], predictions[i]) for i in indices]
    preprocessing = loaded.backbone.preprocessing
    column = examples.column(*loaded.backbone.fields)
    encoded = encode(preprocessing, column, indices, examples.name)
    inputs = preprocessing.model_inputs(encoded)
    content = _render(loaded.backbone, inputs, [column[i] for i in indices], captions, positions)
    suffix = "png" if isinstance(content, bytes) else "txt"
    return _write(content, directory.path / "plots" / f"predictions.{suffix}")


def _mix(inputs: Any, captions: Sequence[str], mix: MixupCutmix, seed: int) -> tuple[Any, list[str]]:
    """Mix a batch as training does, and state the weights of both targets in the captions."""
    # The mixing is random: the same config always shows the same batch, and the caller's generator is left alone.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))
        mixed = mix_batch(inputs, mix)
    weight, rest = f"{mixed.lam:.2f}", f"{1 - mixed.lam:.2f}"
    partners = [captions[partner] for partner in mixed.permutation.tolist()]
    return mixed.inputs, [f"{weight} {one}\n{rest} {other}" for one, other in zip(captions, partners, strict=True)]


def _first(inputs: Any, count: int) -> Any:
    return inputs[:count] if isinstance(inputs, Tensor) else tuple(_first(item, count) for item in inputs)


def _render(
    backbone: Backbone,
    inputs: Any,
    values: Sequence[Any],
    captions: Sequence[str],
    groups: Mapping[str, Sequence[int]],
) -> bytes | str:
    content = backbone.preprocessing.render_batch(inputs, values, captions, groups)
    if content is None:
        raise UserError(
            f"backbone {type(backbone).__name__} cannot render {' and '.join(backbone.fields)}",
            fix=f"define render_batch() in {type(backbone.preprocessing).__name__}",
        )
    return content


def _write(content: bytes | str, path: Path | None) -> Preview:
    if path is None:
        return Preview(content)
    if (path.suffix == ".png") != isinstance(content, bytes):
        kind, suffix = ("an image", ".png") if isinstance(content, bytes) else ("a text", ".txt")
        raise UserError(
            f"the path does not fit the preview: expected a name for {kind}, got {path.name!r}",
            where=str(path),
            fix=f"use a path that ends in {suffix}",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"the preview cannot be written: {error.strerror}", where=str(path), fix="choose another path"
        ) from error
    return Preview(content, path)


def _outputs(model: Model, loader: Loader, train: TrainConfig, device: torch.device) -> Tensor:
    """Return the outputs for every example of a split, float32 (N, C) on the CPU, in the order of the split."""
    place(model, device, deterministic=train.deterministic)
    precision = resolve_precision(train.precision, device)
    outputs, indices = [], []
    for batch, values in forward_batches(model, loader.epoch(), device=device, precision=precision):
        outputs.append(values.float())
        indices.append(batch.indices)
    # The loader sorts texts by length: put the outputs back into the order of the split.
    return torch.cat(outputs).cpu()[torch.from_numpy(np.argsort(np.concatenate(indices)))]


def _groups(
    task: Task, data: DataSpec, split: Split, outputs: Tensor, predictions: Sequence[Mapping[str, Any]]
) -> dict[str, list[int]]:
    """Return the indices of the examples to show, by the heading of their group."""
    losses = task.loss(outputs, torch.as_tensor(split.targets)).numpy()
    smallest, largest = (np.argsort(values, kind="stable") for values in (losses, -losses))
    if not all("label" in prediction for prediction in predictions):
        groups = {"smallest loss": smallest, "largest loss": largest}
        return {heading: indices[:PREDICTIONS_PER_GROUP].tolist() for heading, indices in groups.items()}
    # Without probabilities, the loss ranks confidence: small for correct predictions, large for wrong ones.
    for_correct, for_wrong, uncertain = smallest, largest, {}
    if all("probability" in prediction for prediction in predictions):
        least = np.argsort([prediction["probability"] for prediction in predictions], kind="stable")
        for_correct = for_wrong = least[::-1]
        uncertain = {"least certain": least}
    labels = [describe(data, target) for target in split.targets]
    correct = np.array([prediction["label"] == label for prediction, label in zip(predictions, labels, strict=True)])
    order = f"of {len(split):,}, the most confident first"
    groups = {
        f"correct: {correct.sum():,} {order}": for_correct[correct[for_correct]],
        f"wrong: {(~correct).sum():,} {order}": for_wrong[~correct[for_wrong]],
        **uncertain,
    }
    return {heading: indices[:PREDICTIONS_PER_GROUP].tolist() for heading, indices in groups.items()}


def _caption(data: DataSpec, target: Any, prediction: Mapping[str, Any]) -> str:
    lines = [f"true: {describe(data, target)}"]
    if "label" in prediction:
        lines.append(f"predicted: {prediction['label']}")
    else:
        values = [_named(name, value) for name, value in prediction.items() if not isinstance(value, Mapping)]
        lines.append(f"predicted: {', '.join(values)}")
    if "probability" in prediction:
        lines.append(f"probability: {prediction['probability']:.3f}")
    return "\n".join(lines)


def _named(name: str, value: Any) -> str:
    if isinstance(value, list):  # the labels of an example, which need no name
        return " and ".join(map(str, value)) or "none"
    return f"{name} {format_value(value)}"
