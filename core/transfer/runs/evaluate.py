"""Evaluation of a trained model on a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transfer.config.check import config_of_moved_run
from transfer.errors import RunError, unknown_name
from transfer.interfaces import SPLITS
from transfer.models.saved_model import read_model
from transfer.runs.inference_device import inference_device
from transfer.storage.run_directory import RunDirectory
from transfer.training.build import make_experiment, make_loader, read_data
from transfer.training.evaluation import evaluate as score
from transfer.training.events import Observer, ignore_events
from transfer.training.preflight import resolve_phases


def evaluate(
    run: str | Path,
    split: str = "test",
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    observe: Observer = ignore_events,
) -> dict[str, float]:
    """Return the loss and the metrics of a run's model on a split.

    On the machine and the device of the training, they are exactly those in the summary of the run.

    Args:
        run: Run directory.
        split: Name of the split: ``train``, ``validation`` or ``test``.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved.
        device: Device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None uses the run's
            ``train.device``, or ``auto`` if this machine does not have that device.
        observe: Function that is called with the events of the evaluation.

    Raises:
        UserError: The run or its data are damaged, or the split or the device does not exist.
    """
    directory = RunDirectory.open(run)
    config = config_of_moved_run(directory.config(), overrides)
    loaded = read_model(directory.model)
    _, splits = read_data(config)
    if split not in splits:
        raise RunError.of([unknown_name("split", split, splits, where=str(directory.path))])
    torch_device = inference_device(device, config.train.device, observe)
    loaded.model.to(torch_device)
    loader = make_loader(config, splits[split], loaded.backbone)
    # Only this split is encoded: the experiment needs a loader for each split, but only one is read.
    loaders = dict.fromkeys(SPLITS, loader)
    quick = bool(directory.summary().get("quick"))
    experiment = make_experiment(
        config,
        loaded.model,
        loaded.task,
        loaded.backbone,
        loaders,
        phases=resolve_phases(config, loaded.model),
        device=torch_device,
        quick=quick,
    )
    source = experiment.batches_for(loader, experiment.frozen_prefix_length())
    precision = config.train.precision
    return score(loaded.model, loaded.task, source, precision, observe, split, experiment.max_batches)
