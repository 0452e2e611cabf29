"""Looking at what the model sees: a training batch as it comes in, and predictions beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.config.check import load_config
from transfer.config.component import error_location
from transfer.config.run_config import Config
from transfer.config.train_settings import MixupCutmix, Precision
from transfer.data.encoding import encode
from transfer.data.loader import Loader
from transfer.data.targets import describe
from transfer.errors import RunError, UserError
from transfer.interfaces import Backbone, DataSpec, Split, Task
from transfer.models.model import Model
from transfer.models.precision import autocast
from transfer.models.saved_model import read_model
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import write_atomically
from transfer.training.build import make_loader, read_data
from transfer.training.mixup import mix_batch
from transfer.training.preflight import preflight

MAX_EXAMPLES = 64
"""Of a batch that are shown."""
PREDICTIONS_EACH = 8
"""Of the predictions that are right, wrong and least sure."""


@dataclass(frozen=True)
class Preview:
    """What there is to see.

    Args:
        content: A PNG file, or text.
        path: Where it was written; None where it was not.
    """

    content: bytes | str
    path: Path | None = None


def preview_batch(config: Config, overrides: Sequence[str] = (), *, output: str | Path | None = None) -> Preview:
    """Show the first training batch of a config as the model sees it: encoded, augmented, collated and mixed.

    Nothing is trained, and no weights are read.

    Args:
        config: The path of a YAML file, or the config as plain data.
        overrides: ``path.to.key=value`` each.
        output: Where to write the picture (``.png``) or the text; by default a picture goes to ``NAME-batch.png``, and
            a text nowhere.

    Raises:
        UserError: The config or the data are not right, or the backbone's field has no picture.
    """
    checked = load_config(config, overrides)
    fields = preflight(checked).backbone.fields
    data, splits = read_data(checked)
    split = splits["train"]
    backbone_class: type[Backbone] = checked.backbone.cls
    with error_location(checked.backbone.where):
        backbone = backbone_class.from_data(split.column(*fields), **checked.backbone.options)
    batch = next(make_loader(checked, split, backbone, training=True).epoch(limit=1))
    captions = [describe(data.spec, target) for target in batch.targets]
    inputs = batch.inputs
    if checked.train.mix is not None:
        inputs, captions = _mixed(inputs, captions, checked.train.mix, checked.seed)
    shown = min(len(captions), MAX_EXAMPLES)
    of = "" if shown == len(captions) else f" (the first {shown})"
    heading = f"{checked.name}: the first training batch, {len(captions)} examples{of}"
    column = split.column(*fields)
    values = [column[int(i)] for i in batch.indices[:shown]]
    content = _show(backbone, _first(inputs, shown), values, captions[:shown], {heading: range(shown)})
    path = Path(output).expanduser() if output is not None else None
    if path is None and isinstance(content, bytes):
        path = Path(f"{checked.name}-batch.png")
    return _write(content, path)


def preview_predictions(run: str | Path, split: str = "test") -> Preview:
    """Show predictions of a run's model: those that are right and wrong with most confidence, and the least sure.

    Where the task names no single label, those with the smallest and the largest loss. The picture or text goes to
    ``RUN/plots/``.

    Args:
        run: A run directory.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        UserError: The run or its data are not right, there is no such split, or the backbone's field has no picture.
    """
    directory = RunDirectory.open(run)
    directory.refuse_links()
    config = load_config(directory.config())
    loaded = read_model(directory.model)
    _, splits = read_data(config)
    if split not in splits:
        raise RunError(f"the data has no split {split!r}", where=str(directory.path), available=list(splits))
    examples = splits[split]
    outputs = _outputs(loaded.model, make_loader(config, examples, loaded.backbone), config.train.precision)
    meanings = loaded.task.interpret(outputs)
    chosen = _chosen(loaded.task, loaded.data, examples, outputs, meanings)
    places = [index for _, indices in chosen for index in indices]
    groups, start = {}, 0
    for heading, indices in chosen:
        groups[heading] = range(start, start + len(indices))
        start += len(indices)
    captions = [_caption(loaded.data, examples.targets[i], meanings[i]) for i in places]
    preprocessing = loaded.backbone.preprocessing
    column = examples.column(*loaded.backbone.fields)
    inputs = preprocessing.collate(encode(preprocessing, column, places, examples.name))
    content = _show(loaded.backbone, inputs, [column[i] for i in places], captions, groups)
    suffix = "png" if isinstance(content, bytes) else "txt"
    return _write(content, directory.path / "plots" / f"predictions.{suffix}")


def _mixed(inputs: Any, captions: Sequence[str], mix: MixupCutmix, seed: int) -> tuple[Any, list[str]]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))
        mixed = mix_batch(inputs, mix)
    share, rest = f"{mixed.lam:.2f}", f"{1 - mixed.lam:.2f}"
    partners = [captions[partner] for partner in mixed.permutation.tolist()]
    return mixed.inputs, [f"{share} {own}\n{rest} {other}" for own, other in zip(captions, partners, strict=True)]


def _first(inputs: Any, count: int) -> Any:
    return inputs[:count] if isinstance(inputs, Tensor) else tuple(_first(item, count) for item in inputs)


def _show(
    backbone: Backbone,
    inputs: Any,
    values: Sequence[Any],
    captions: Sequence[str],
    groups: Mapping[str, Sequence[int]],
) -> bytes | str:
    content = backbone.preprocessing.render_batch(inputs, values, captions, groups)
    if content is None:
        raise UserError(
            f"backbone {type(backbone).__name__} has no picture of {' and '.join(backbone.fields)}",
            fix=f"define show() in {type(backbone.preprocessing).__name__}",
        )
    return content


def _write(content: bytes | str, path: Path | None) -> Preview:
    if path is None:
        return Preview(content)
    if (path.suffix == ".png") != isinstance(content, bytes):
        what, suffix = ("a picture", ".png") if isinstance(content, bytes) else ("a text", ".txt")
        raise UserError(f"what there is to see is {what}", where=str(path), fix=f"give a path that ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), fix="choose another path") from error
    return Preview(content, path)


def _outputs(model: Model, loader: Loader, precision: Precision) -> Tensor:
    """Return the outputs for every example of a split, float32 (N, C), in the split's order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    found, order = [], []
    with torch.inference_mode():
        for batch in loader.epoch():
            with autocast(precision, device):
                outputs = model(batch.to(device).inputs)
            found.append(outputs.float().cpu())
            order.append(batch.indices)
    return torch.cat(found)[torch.from_numpy(np.argsort(np.concatenate(order)))]


def _chosen(
    task: Task, data: DataSpec, split: Split, outputs: Tensor, meanings: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Sequence[int]]]:
    """Return the examples to show under each heading, the most telling first."""
    losses = task.loss(outputs, torch.as_tensor(split.targets)).numpy()
    low, high = (np.argsort(values, kind="stable") for values in (losses, -losses))
    if not all("label" in meaning for meaning in meanings):
        groups = [("smallest loss", low), ("largest loss", high)]
    else:
        least_sure = None
        if all("probability" in meaning for meaning in meanings):
            least_sure = np.argsort([meaning["probability"] for meaning in meanings], kind="stable")
            low = high = least_sure[::-1]
        right = np.array([meaning["label"] == describe(data, split.targets[i]) for i, meaning in enumerate(meanings)])
        of = f"of {len(split):,}, the most sure first"
        groups = [
            (f"right: {right.sum():,} {of}", low[right[low]]),
            (f"wrong: {(~right).sum():,} {of}", high[~right[high]]),
        ]
        if least_sure is not None:
            groups.append(("least sure", least_sure))
    return [(heading, indices[:PREDICTIONS_EACH].tolist()) for heading, indices in groups]


def _caption(data: DataSpec, target: Any, meaning: Mapping[str, Any]) -> str:
    lines = [f"true: {describe(data, target)}"]
    if "label" in meaning:
        lines.append(f"said: {meaning['label']}")
    else:
        said = [_words(name, value) for name, value in meaning.items() if not isinstance(value, Mapping)]
        lines.append(f"said: {', '.join(said)}")
    if "probability" in meaning:
        lines.append(f"probability: {meaning['probability']:.3f}")
    return "\n".join(lines)


def _words(name: str, value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value)) or "none"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
