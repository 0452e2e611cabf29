"""Score a split with the model of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from transfer.config.check import load_config
from transfer.errors import RunError
from transfer.interfaces import SPLITS
from transfer.models.saved_model import read_model
from transfer.storage.run_directory import RunDirectory
from transfer.training.build import make_experiment, make_loader, read_data
from transfer.training.evaluation import evaluate as score
from transfer.training.events import Observer, ignore_events
from transfer.training.preflight import resolve_phases


def evaluate(run: str | Path, split: str = "test", *, observe: Observer = ignore_events) -> dict[str, float]:
    """Score a split with the model of a run: on the same machine exactly the figures of its summary.

    Args:
        run: A run directory.
        split: ``train``, ``validation`` or ``test``.
        observe: Is called with the events of the evaluation.

    Raises:
        UserError: The run or its data are not right, or there is no such split.
    """
    directory = RunDirectory.open(run)
    config = load_config(directory.config())
    loaded = read_model(directory.model)
    _, splits = read_data(config)
    if split not in splits:
        raise RunError(f"the data has no split {split!r}", where=str(directory.path), available=list(splits))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    loader = make_loader(config, splits[split], loaded.backbone)
    # One split is scored, so only that one is encoded and stands where the engine would have all three.
    loaders = dict.fromkeys(SPLITS, loader)
    quick = bool(directory.summary().get("quick"))
    experiment = make_experiment(
        config,
        loaded.model,
        loaded.task,
        loaded.backbone,
        loaders,
        phases=resolve_phases(config, loaded.model),
        device=device,
        quick=quick,
    )
    source = experiment.batches_for(loader, experiment.frozen_prefix_length())
    precision = config.train.precision
    return score(loaded.model, loaded.task, source, precision, observe, split, experiment.max_batches)
