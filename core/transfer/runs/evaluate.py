"""Evaluation of a trained model on a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transfer.config.check import config_of_moved_run
from transfer.errors import RunError, unknown_name
from transfer.interfaces import SPLITS
from transfer.models.precision import place
from transfer.models.recorded_plugins import changes, changes_note, recorded_plugins, run_config
from transfer.models.saved_model import read_model
from transfer.runs.data import changed_split, read_splits
from transfer.runs.inference_device import inference_device
from transfer.storage.run_directory import RunDirectory
from transfer.training.build import encoding_progress, make_experiment, make_loader
from transfer.training.evaluation import evaluate as score
from transfer.training.events import Note, Observer, ignore_events
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

    On the machine and the device of the training, they are exactly those in the summary of the run. A note is reported
    if the split has changed since the training. Classes are compared by name: their order may change.

    Args:
        run: Run directory.
        split: Name of the split: ``train``, ``validation`` or ``test``.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved.
        device: Device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None uses the run's
            ``train.device``, or ``auto`` if this machine does not have that device.
        observe: Function that is called with the events of the evaluation.

    Raises:
        UserError: The run or its data are damaged, the data has a class that the model does not have, or the split or
            the device does not exist.
    """
    directory = RunDirectory.open(run)
    summary = directory.summary()
    quick = bool(summary.get("quick"))
    config = config_of_moved_run(run_config(directory), overrides)
    config = config.quick() if quick else config
    components = (config.data, config.backbone, config.head, config.task)
    if changed := changes(recorded_plugins(directory), components):
        observe(Note(changes_note(changed)))
    loaded = read_model(directory.model)
    splits = read_splits(config, loaded.data, directory.path)
    if split not in splits:
        raise RunError.of([unknown_name("split", split, splits, where=str(directory.path))])
    if (note := changed_split(summary, split, splits[split])) is not None:
        observe(Note(note))
    torch_device = inference_device(device, config.train.device, observe)
    place(loaded.model, torch_device, deterministic=config.train.deterministic)
    loader = make_loader(config, splits[split], loaded.backbone, progress=encoding_progress(split, observe))
    # Only this split is encoded: the experiment needs a loader for each split, but only one is read.
    loaders = dict.fromkeys(SPLITS, loader)
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
    source = experiment.batches_for(loader, experiment.frozen_prefix_length(), split=split, observe=observe)
    precision = experiment.options.precision
    return score(loaded.model, loaded.task, source, precision, observe, split, experiment.max_batches)
