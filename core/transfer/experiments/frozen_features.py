"""The features of the frozen backbone of a config, for analyses that train no layer of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.config.check import load_config
from transfer.config.run_config import Config, RunConfig
from transfer.errors import TrainingError
from transfer.models.precision import place
from transfer.training.build import BuiltExperiment
from transfer.training.events import Observer
from transfer.training.solver import head_inputs

MAX_SIMILARITIES = 2**25
"""Maximum number of cosines in memory at a time: 128 MiB."""
_FEATURE_OPTIONS = (
    *("batch_size", "max_tokens", "evaluation_batch_size", "bucket", "workers", "device", "precision"),
    *("deterministic", "cache", "cache_limit_gib"),
)
"""Options of the train block that a probe uses: those of the forward pass."""


def probing_config(source: Config, overrides: Sequence[str]) -> RunConfig:
    """Return a config whose recipe solves a linear head, with the data and the backbone of a config."""
    plain = load_config(source, overrides).resolved["train"]
    train = {name: plain[name] for name in _FEATURE_OPTIONS if name in plain}
    if train["batch_size"] == "auto":  # found by training steps, which a probe does not make
        del train["batch_size"]
    train |= {"recipe": {"name": "feature_extraction", "epochs": 1}, "augment": False, "views": None}
    # As overrides, so that errors in data and backbone still have their file and line.
    blocks = [f"train={json.dumps(train)}", "head={name: linear}", "adapter=null", "trackers=[]"]
    return load_config(source, [*overrides, *blocks])


@dataclass(frozen=True)
class Examples:
    """Features, float64 (N, D), and targets (N, ...) of examples."""

    features: Tensor
    targets: Tensor

    def select(self, indices: npt.NDArray[np.int64] | None) -> Examples:
        """Return some of the examples; None selects all."""
        if indices is None:
            return self
        chosen = torch.from_numpy(indices).to(self.features.device)
        return Examples(self.features[chosen], self.targets[chosen])


def features_of(built: BuiltExperiment, observe: Observer) -> dict[str, Examples]:
    """Return the features of every split, in the order of the split."""
    experiment = built.experiment
    model = experiment.model
    place(model, experiment.options.device, deterministic=experiment.options.deterministic)
    examples = {}
    for name, loader in built.loaders.items():
        source = experiment.batches_for(loader, len(model) - 1, split=name, observe=observe)
        features, targets, indices = head_inputs(experiment, source)
        if not bool(torch.isfinite(features).all()):
            raise TrainingError(
                f"the features of the {name} split are not finite", fix="use train.precision: fp32, or other weights"
            )
        order = indices.argsort().to(features.device)
        examples[name] = Examples(features[order], targets.to(features.device)[order])
    return examples


def cosines(queries: Tensor, known: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the cosines of blocks of queries (N, D) and all known features (M, D), with the index of the first query.

    Args:
        queries: Normalized features.
        known: Normalized features that the queries are compared with.
    """
    size = max(1, MAX_SIMILARITIES // len(known))
    for start in range(0, len(queries), size):
        yield start, queries[start : start + size] @ known.T
