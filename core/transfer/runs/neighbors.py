"""The nearest training examples of new inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from transfer.config.check import config_of_moved_run
from transfer.data.in_memory import InMemoryTable
from transfer.data.targets import describe
from transfer.errors import UserError
from transfer.interfaces import SPLITS
from transfer.models.forward import forward_batches
from transfer.models.recorded_plugins import run_config
from transfer.runs.data import changed_split, read_splits, require_same_table
from transfer.runs.inputs import Input
from transfer.runs.predictor import Predictor, load
from transfer.runs.stage_outputs import pooled
from transfer.storage.run_directory import RunDirectory
from transfer.training.build import encoding_progress, make_experiment, make_loader
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import resolve_phases


def neighbors(
    run: str | Path,
    values: Any,
    *,
    k: int = 5,
    column: str | None = None,
    overrides: Sequence[str] = (),
    data: InMemoryTable | None = None,
    device: str | None = None,
    observe: Observer = ignore_events,
) -> list[dict[str, Any]]:
    """Return the nearest training examples of values, by the cosine distance of the features before the head.

    Args:
        run: Run directory.
        values: Strings, ``pathlib.Path`` objects of files or folders, or raw values (PIL images, arrays). With
            ``column``, a table.
        k: Number of neighbors of each value.
        column: Name of the column of the table with the values.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved.
        data: Data in memory that the run was started with (:func:`transfer.table`). None reads the data of the config.
        device: Device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None uses the run's
            ``train.device``, or ``auto`` if this machine does not have that device.
        observe: Function that is called with notes and progress.

    Returns:
        For each value the ``input`` and its ``neighbors``, nearest first: the ``name``, the ``label`` and the ``text``
        (if it is one) of a training example, its ``index`` in the training split, and its ``distance`` from 0 to 2.

    Raises:
        UserError: The run is damaged, its data is not available, a value cannot be read, or ``k`` is wrong.
    """
    if data is not None:
        require_same_table(RunDirectory.open(run), data)
    predictor = load(run, device=device, observe=observe)
    return neighbors_of_inputs(
        run, predictor, list(predictor.inputs(values, column)), k=k, overrides=overrides, observe=observe
    )


def neighbors_of_inputs(
    run: str | Path,
    predictor: Predictor,
    inputs: Sequence[Input],
    *,
    k: int = 5,
    overrides: Sequence[str] = (),
    observe: Observer = ignore_events,
) -> list[dict[str, Any]]:
    """Return the nearest training examples of inputs; :func:`neighbors` describes them."""
    rows = list(predictor.embeddings(inputs))
    if not rows:
        raise UserError("there are no values: expected at least one")
    if blank := [index for index, (_, vector) in enumerate(rows) if vector is None]:
        raise UserError("the input is blank: expected a value", where=inputs[blank[0]].where)
    queries = torch.stack([vector for _, vector in rows if vector is not None])
    loaded, directory = predictor.loaded, RunDirectory.open(run)
    summary = directory.summary()
    config = config_of_moved_run(run_config(directory), overrides)
    config = config.quick() if summary.get("quick") else config
    train = read_splits(config, loaded.data, directory.path)["train"]
    if not 1 <= k <= len(train):
        raise UserError(f"k is wrong: expected 1 to {len(train):,}, the number of training examples, got {k}")
    if (note := changed_split(summary, "train", train)) is not None:
        observe(Note(note))
    device = next(loaded.model.parameters()).device
    loader = make_loader(config, train, loaded.backbone, progress=encoding_progress("train", observe))
    experiment = make_experiment(
        config,
        loaded.model,
        loaded.task,
        loaded.backbone,
        dict.fromkeys(SPLITS, loader),
        phases=resolve_phases(config, loaded.model),
        device=device,
        quick=False,
    )
    stages = len(loaded.model) - 1
    source = experiment.batches_for(loader, stages, split="train", observe=observe)
    queries = _normalized(queries.to(device))
    # Only the nearest so far are kept: the features of a large split do not fit into the memory of a GPU.
    similarity = queries.new_full((len(queries), 0), 0.0)
    nearest = torch.zeros((len(queries), 0), dtype=torch.int64, device=device)
    batches = source.loader.epoch()
    forward = forward_batches(
        loaded.model,
        batches,
        device=device,
        precision=predictor.precision,
        first_stage=source.first_stage,
        end_stage=stages,
    )
    for batch, features in forward:
        indices = torch.as_tensor(batch.indices, device=device).expand(len(queries), -1)
        similarity = torch.cat([similarity, queries @ _normalized(pooled(features)).T], 1)
        nearest = torch.cat([nearest, indices], 1)
        similarity, order = similarity.topk(min(k, similarity.shape[1]), sorted=True)
        nearest = nearest.gather(1, order)
    answers = []
    for (row, _), close, distances in zip(rows, nearest.tolist(), (1 - similarity).tolist(), strict=True):
        examples = []
        for index, distance in zip(close, distances, strict=True):
            value = train.column(*loaded.backbone.fields)[index]
            text = {"text": value} if isinstance(value, str) else {}
            label = describe(loaded.data, train.targets[index])
            # Rounding may give a similarity slightly above 1.
            example = {"name": train.name(index), "label": label, "distance": max(distance, 0.0), "index": index}
            examples.append(example | text)
        answers.append({**row, "neighbors": examples})
    return answers


def _normalized(features: Tensor) -> Tensor:
    return normalize(features.float().flatten(1), dim=1)
