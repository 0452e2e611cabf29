"""The frozen prefix of a model and its cache key."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transfer.config.train_settings import Precision
from transfer.data.batch import move
from transfer.data.loader import Loader
from transfer.models.model import Model
from transfer.models.precision import autocast

FORMAT = 1
BATCH_SIZE = 64
"""Features are always computed in batches of this size, so that a key stands for the same bits whatever a run's own."""
KEY_DIGITS = 40


@dataclass(frozen=True)
class FrozenPrefix:
    """The stages of a model that are frozen from the input on.

    Args:
        model: Whose first stages they are.
        count: How many.
        assets: What the backbone learned from the training split: it decides how values are encoded.
        precision: What the features are computed in.
    """

    model: Model
    count: int
    assets: Mapping[str, str]
    precision: Precision

    @property
    def stages(self) -> list[str]:
        """Their names."""
        return list(self.model.stages)[: self.count]

    def key(self, loader: Loader, view: int | None) -> str:
        """Return the digest of everything that decides the features."""
        digest = hashlib.sha256()

        def add(*parts: object) -> None:
            digest.update(json.dumps(parts, sort_keys=True, default=str).encode())

        preprocessing = loader.preprocessing
        device = next(self.model.parameters()).device.type
        add(FORMAT, torch.__version__, device, self.precision, loader.fields)
        add(view, None if view is None else loader.seed)
        add(_settings(preprocessing), dict(preprocessing.describe()), dict(self.assets))
        add(self.digest, loader.split.fingerprint(*loader.fields))
        return digest.hexdigest()[:KEY_DIGITS]

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the stages: their code, settings, weights and buffers."""
        digest = hashlib.sha256()
        for name in self.stages:
            stage = self.model.stages[name]
            digest.update(repr((name, stage, [_settings(module) for module in stage.modules()])).encode())
            for key, tensor in stage.state_dict().items():
                digest.update(repr((key, tensor.dtype, list(tensor.shape))).encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.inference_mode()
    def run(
        self, loader: Loader, view: int | None, most: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], Any]]:
        """Yield indices and features, on the CPU, of a split's examples, in batches of a fixed size and order."""
        device = next(self.model.parameters()).device
        stages = list(self.model)[: self.count]
        training = self.model.training
        self.model.eval()
        try:
            for on_cpu in loader.in_fixed_order(BATCH_SIZE, augment=view is not None).epoch(view or 0, limit=most):
                features = on_cpu.to(device).inputs
                with autocast(self.precision, device):
                    for stage in stages:
                        features = stage(features)
                yield on_cpu.indices, move(features, torch.device("cpu"))
        finally:
            self.model.train(training)


def _settings(part: object) -> list[object]:
    """Return a module's or a preprocessing's class and attributes of plain data: they may change what it does."""
    values = {name: value for name, value in vars(part).items() if name != "training" and _is_plain(value)}
    return [type(part).__module__, type(part).__qualname__, _source(type(part).__module__), values]


@functools.cache
def _source(module: str) -> str:
    """Return a module's source code, so that features of a plugin that was changed are computed anew."""
    if module.startswith("torch."):
        return ""  # torch's version is in the key
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # defined where there is no file: in a notebook's cell that has gone
        return ""


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
