"""Evaluation of a trained model on a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer.config.check import config_of_moved_run
from transfer.config.component import error_location
from transfer.config.run_config import RunConfig
from transfer.data.in_memory import InMemoryTable
from transfer.data.splits import count_classes, digest
from transfer.errors import DataError, RunError, unknown_name
from transfer.interfaces import SPLITS, Dataset, DataSpec, Split
from transfer.models.precision import place
from transfer.models.recorded_plugins import changes, changes_note, recorded_plugins, run_config
from transfer.models.saved_model import LoadedModel, read_model
from transfer.runs.data import align_classes, changed_split, read_splits, require_same_table
from transfer.runs.evaluations import Evaluation, config_on, evaluation_name, select_split, write_evaluation
from transfer.runs.inference_device import inference_device
from transfer.storage.run_directory import RunDirectory
from transfer.training.build import encoding_progress, make_experiment, make_loader
from transfer.training.evaluation import PredictionCollector, evaluate as score
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import resolve_phases


def evaluate(
    run: str | Path,
    split: str | None = None,
    overrides: Sequence[str] = (),
    *,
    on: str | Path | Mapping[str, Any] | InMemoryTable | None = None,
    data: InMemoryTable | None = None,
    device: str | None = None,
    observe: Observer = ignore_events,
) -> dict[str, float]:
    """Return the loss and the metrics of a run's model on a split of its data, or on other data.

    On the machine and the device of the training, they are exactly those in the summary of the run. A note is reported
    if the split has changed since the training. Classes are compared by name: their order may change.

    Args:
        run: Run directory.
        split: Name of the split: ``train``, ``validation`` or ``test``. None selects ``test``; other data without a
            test split is scored as a whole.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved.
        on: Other labeled data with classes of the model: the path of a table or folder, the data block of a config, or
            data in memory (:func:`transfer.table`). The results are stored in the folder ``evaluations`` of the run.
            None uses the data of the run.
        data: Data in memory that the run was started with (:func:`transfer.table`). None reads the data of the config.
        device: Device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None uses the run's
            ``train.device``, or ``auto`` if this machine does not have that device.
        observe: Function that is called with the events of the evaluation.

    Raises:
        UserError: The run or its data are damaged, the data has a class that the model does not have, or the split or
            the device does not exist.
    """
    directory = RunDirectory.open(run)
    if data is not None:
        require_same_table(directory, data)
    # The table must exist until the end: the dataset of its block finds it by the digest.
    _table, on = on, on.block if isinstance(on, InMemoryTable) else on
    summary = directory.summary()
    plain, loaded = run_config(directory), read_model(directory.model)
    quick = bool(summary.get("quick")) and on is None
    if on is None:
        config = config_of_moved_run(plain, overrides)
        config = config.quick() if quick else config
    else:
        config = config_on(plain, on, loaded.backbone.fields, overrides)
    components = (config.data, config.backbone, config.head, config.task)[0 if on is None else 1 :]
    if changed := changes(recorded_plugins(directory), components):
        observe(Note(changes_note(changed)))
    if on is None:
        splits = read_splits(config, loaded.data, directory.path)
        split = split or "test"
        if split not in splits:
            raise RunError.of([unknown_name("split", split, splits, where=str(directory.path))])
        if (note := changed_split(summary, split, splits[split])) is not None:
            observe(Note(note))
        examples = splits[split]
    else:
        split, examples = _other_data(config, split, loaded, on, observe)
    torch_device = inference_device(device, config.train.device, observe)
    place(loaded.model, torch_device, deterministic=config.train.deterministic)
    loader = make_loader(config, examples, loaded.backbone, progress=encoding_progress(split, observe))
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
    collector = None if on is None else PredictionCollector()
    limit = experiment.max_batches
    metrics = score(loaded.model, loaded.task, source, precision, observe, split, limit, collector=collector)
    if on is not None and collector is not None:
        block = dict(config.data.resolved)
        evaluation = Evaluation(
            name=evaluation_name(directory, on, block),
            data=block,
            split=split,
            examples=len(examples),
            digest=digest({split: examples}),
            missing=_missing_classes(examples, loaded.data),
            metrics=metrics,
        )
        try:
            write_evaluation(directory, evaluation, collector.in_order_of(examples))
            observe(Note(f"stored as {evaluation.name}: transfer compare RUN RUN --on {evaluation.name}"))
        except OSError as error:  # the run may belong to somebody else
            observe(Note(f"the results are not stored in the run: {error.strerror}"))
    return metrics


def _other_data(
    config: RunConfig, split: str | None, loaded: LoadedModel, on: str | Path | Mapping[str, Any], observe: Observer
) -> tuple[str, Split]:
    """Read other data. Return the name of the scored split, and the split with the classes of the model.

    Raises:
        UserError: The data is wrong, lacks a field, or has a class that the model does not have.
    """
    dataset: Dataset = config.data.make()
    where = config.data.where if isinstance(on, Mapping) else str(on)
    with error_location(where):
        data = dataset.load()
        name, examples = select_split(data, split, where)
        if lacking := [field for field in loaded.backbone.fields if field not in data.spec.fields]:
            raise DataError(
                f"the data has no field {lacking[0]!r}: expected it for the model", available=data.spec.fields
            )
        examples = align_classes(data, {name: examples}, loaded.data, where)[name]
    if missing := _missing_classes(examples, loaded.data):
        observe(Note(f"the data has no example of {len(missing)} of the model's classes: {', '.join(missing[:10])}"))
    return name, examples


def _missing_classes(split: Split, trained: DataSpec) -> list[str]:
    return [name for name, count in count_classes(split, trained).items() if not count]
