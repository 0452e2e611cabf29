"""The frozen prefix of a model and its cache key."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transfer.config.train_settings import Precision
from transfer.data.batch import move
from transfer.data.loader import Loader
from transfer.models.forward import forward_batches
from transfer.models.model import Model
from transfer.system.directory_cache import KEY_DIGITS

FORMAT = 2
BATCH_SIZE = 64
"""Batch size of the forward pass. It is the same in every run, because another batch size rounds differently."""


@dataclass(frozen=True)
class FrozenPrefix:
    """The leading stages of a model that are frozen.

    Args:
        model: Model whose first stages are the prefix.
        count: Number of stages in the prefix.
        assets: Text files that the backbone learned from the training split (a vocabulary). They determine how raw
            values are encoded.
        precision: Precision of the forward pass.
    """

    model: Model
    count: int
    assets: Mapping[str, str]
    precision: Precision

    @property
    def stages(self) -> list[str]:
        """Names of the stages."""
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

    def run(
        self, loader: Loader, view: int | None, limit: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], Any]]:
        """Yield indices (B,) and features, on the CPU, of the examples of a split, in batches of fixed size and order.

        Args:
            loader: Batches of the split. Their size and order are not used.
            view: Index of an augmented view. None does not augment.
            limit: Maximum number of batches. None runs all.
        """
        batches = loader.in_fixed_order(BATCH_SIZE, augment=view is not None).epoch(view or 0)
        for batch, features in forward_batches(
            self.model,
            islice(batches, limit),
            device=next(self.model.parameters()).device,
            precision=self.precision,
            end_stage=self.count,
            out_of_memory_fix=f"set train.cache: off (cached features are computed in batches of {BATCH_SIZE})",
        ):
            yield batch.indices, move(features, torch.device("cpu"))


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
