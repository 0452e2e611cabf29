"""The pretrained backbone of a config, before any training, with the interface of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from transfer.config.check import load_config
from transfer.config.run_config import Config
from transfer.models.assemble import assemble
from transfer.models.precision import place, resolve_precision
from transfer.models.saved_backbone import build_backbone, load_pretrained
from transfer.models.saved_model import LoadedModel
from transfer.runs.inference_device import inference_device
from transfer.runs.predictor import Predictor, load
from transfer.training.build import read_data
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import preflight


class PretrainedPredictor(Predictor):
    """Predictor whose head has random weights: it gives features only."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages of the backbone, from input to output."""
        return super().stages[:-1]

    def _stage(self, stage: str | None) -> str:
        return super()._stage(stage or self.stages[-1])


def load_pretrained_predictor(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    observe: Observer = ignore_events,
) -> PretrainedPredictor:
    """Read the pretrained weights of a config's backbone. The data is read, because a vocabulary may depend on it.

    Args:
        config: Path of a YAML file, the config as a mapping, or a checked config.
        overrides: Changes to the config, each ``path.to.key=value``.
        device: Device to compute on. None uses ``train.device``.
        observe: Function that is called with notes.

    Raises:
        UserError: The config, the data or the weights are wrong.
    """
    checked = load_config(config, overrides)
    fields = preflight(checked).backbone.fields
    data, splits = read_data(checked)
    torch.manual_seed(checked.seed)
    backbone = build_backbone(checked.backbone, splits["train"].column(*fields))
    pretrained = load_pretrained(checked.backbone, backbone) if checked.pretrained else {}
    if not pretrained:
        observe(Note("warning: the backbone has no pretrained weights, so its features are random"))
    task, model = assemble(backbone, checked.head, checked.task, data.spec, checked.adapter)
    torch_device = inference_device(device, checked.train.device, observe)
    place(model, torch_device)
    loaded = LoadedModel(model.eval(), backbone, task, data.spec)
    source = Path(checked.document.source)
    return PretrainedPredictor(source, loaded, resolve_precision(checked.train.precision, torch_device))


def load_run_or_config(source: str, *, device: str | None = None, observe: Observer = ignore_events) -> Predictor:
    """Return the predictor of a run directory or model folder, or that of a config with a suffix of YAML."""
    if Path(source).suffix.lower() in (".yaml", ".yml") and not Path(source).is_dir():
        return load_pretrained_predictor(source, device=device, observe=observe)
    return load(source, device=device, observe=observe)
