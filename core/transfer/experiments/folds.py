"""Cross-validation: a run for each fold, and one file with a prediction for every example.

The training split is divided into folds (:func:`transfer.data.splits.fold_numbers`). Each is the test split of a run
that is trained on the others, so every example is predicted by a model that has not seen it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from transfer.config.check import config_of_moved_run, load_config
from transfer.config.older_versions import add_missing_options
from transfer.config.run_config import Config, RunConfig
from transfer.config.tracker_variables import read_tracker_variables, stored_config
from transfer.config.train_settings import Fold
from transfer.data.splits import fold_numbers
from transfer.errors import UserError
from transfer.experiments.intervals import metric_bounds, spread_of_folds
from transfer.experiments.seeds import (
    complete_summary,
    recorded_outcome,
    removed_if_nothing_ran,
    spread_json,
    train_one,
)
from transfer.interfaces import Data
from transfer.models.saved_model import read_task
from transfer.runs.prediction_files import write_predictions
from transfer.runs.train import Run
from transfer.storage.predictions import Predictions
from transfer.storage.run_directory import FORMAT, RunDirectory
from transfer.system.atomic_files import read_json, write_json
from transfer.system.file_schema import FileSchema, checked
from transfer.system.ranks import refuse_several
from transfer.training.build import read_data, with_found_batch_size
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import preflight

MANIFEST = "folds.json"
"""File in a folder of folds that contains their number and their config."""
PREDICTIONS = "out_of_fold.csv"
"""File with a prediction for every example in every repetition."""


class _Manifest(FileSchema):
    """The file ``folds.json``."""

    format: Literal[1]
    folds: Annotated[int, Field(ge=2)]
    repeats: Annotated[int, Field(ge=1)]
    quick: bool
    config: dict[str, Any]


def run_folds(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    folds: int,
    repeats: int = 1,
    output: str | Path = "runs",
    quick: bool = False,
    observe: Observer = ignore_events,
) -> Run:
    """Train a config once for each fold of its training split, tested on that fold.

    A test split of the dataset is not used: it remains for the final model. Folds keep the proportions of the classes,
    and do not divide a group. The features of frozen stages are computed once for all folds.

    Args:
        config: Path of a YAML file, or the config as a mapping.
        overrides: Changes to the config, each ``path.to.key=value``.
        folds: Number of folds, 2 or more.
        repeats: Number of repetitions, each with other folds.
        output: Folder in which the folder of folds is created.
        quick: Whether to run one epoch per phase over a few batches of each split only.
        observe: Function that is called with every event of every run (:mod:`transfer.training.events`).

    Returns:
        The folder of folds and its summary. The summary's ``test`` contains ``mean``, ``standard_deviation``,
        ``interval`` and ``values`` of every metric. The interval takes into account that training splits overlap
        (Nadeau and Bengio 2003). The file ``out_of_fold.csv`` contains a prediction for every example.

    Raises:
        UserError: The config, the data or the weights are wrong, or there are fewer examples than folds.
        TrainingError: Training failed; :func:`resume_folds` continues it.
    """
    refuse_several("cross-validation")
    if folds < 2 or repeats < 1:
        problem = f"expected 2 folds or more, repeated once or more, got {folds} and {repeats}"
        raise UserError(f"the number of folds is too small: {problem}", fix="use --folds 5, for example")
    checked_config = load_config(config, overrides)
    preflight(checked_config)  # wrong configs are refused before a folder is created
    checked_config = with_found_batch_size(checked_config.with_fold(Fold(number=1, of=folds)), observe)
    folder = RunDirectory.create(Path(output), checked_config.name, "-folds")
    with removed_if_nothing_ran(folder.path):
        return _train_folds(checked_config, folds, repeats, folder.path, quick=quick, observe=observe)


def resume_folds(folder: str | Path, overrides: Sequence[str] = (), *, observe: Observer = ignore_events) -> Run:
    """Resume a folder of folds that was interrupted. Complete runs stay; an incomplete run is resumed.

    Args:
        folder: Folder of folds.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved. They are stored in the
            folder. Other data is refused.
        observe: Function that is called with every event of every run (:mod:`transfer.training.events`).

    Raises:
        UserError: The folder is not a folder of folds, or another process writes into it.
        TrainingError: Training failed.
    """
    refuse_several("cross-validation")
    path = Path(folder)
    fix = "give the folder that `transfer run --folds` printed last"
    content = read_json(path / MANIFEST, f"{folder} is not a folder of folds", fix)
    manifest = checked(content, _Manifest, str(path / MANIFEST))
    plain, _ = read_tracker_variables(add_missing_options(deepcopy(content["config"])))
    config = config_of_moved_run(plain, overrides)
    return _train_folds(
        config, manifest.folds, manifest.repeats, path, overrides, quick=manifest.quick, observe=observe
    )


def _train_folds(
    config: RunConfig,
    folds: int,
    repeats: int,
    path: Path,
    overrides: Sequence[str] = (),
    *,
    quick: bool,
    observe: Observer,
) -> Run:
    """Train the folds that are not complete yet, and write the summary and the predictions of all folds."""
    folder = RunDirectory(path)
    parts = [Fold(number=number, of=folds, repeat=1 + r) for r in range(repeats) for number in range(1, folds + 1)]
    with folder.locked(), recorded_outcome(folder, observe, folder.write_summary):
        manifest = {"format": FORMAT, "name": config.name, "folds": folds, "repeats": repeats, "quick": quick}
        # Written before the first run, so that an interrupted folder can be resumed.
        write_json(path / MANIFEST, {**manifest, "config": stored_config(config.resolved)})
        for number, part in enumerate(parts, 1):
            observe(Note(f"{_title(part, repeats)}, run {number} of {len(parts)}"))
            train_one(config.with_fold(part), path / _name(part, repeats), overrides, quick=quick, observe=observe)
        directories = [RunDirectory(path / _name(part, repeats)) for part in parts]
        summaries = [complete_summary(directory, path) for directory in directories]
        if not quick:  # whose runs score a few batches only
            data, _ = read_data(config)
            rows = list(_rows(data, directories, parts))
            write_predictions(path / PREDICTIONS, rows, list(dict.fromkeys(name for row in rows for name in row)))
            observe(Note(f"a prediction for every example: {path / PREDICTIONS}"))
        summary = {
            "status": "complete",
            "quick": quick,
            "folds": folds,
            "repeats": repeats,
            "primary_metric": summaries[0]["primary_metric"],
            "test": _spreads(summaries, directories[0], folds),
            "parameters": summaries[0]["parameters"],
            "examples": summaries[0]["examples"],
            "seconds": round(sum(summary["seconds"] for summary in summaries), 3),
            "runs": [directory.path.name for directory in directories],
        }
        folder.write_summary(summary)
    return Run(path, summary)


def _name(fold: Fold, repeats: int) -> str:
    """Return the name of the run directory of a fold."""
    return (f"repeat-{fold.repeat}-" if repeats > 1 else "") + f"fold-{fold.number}"


def _title(fold: Fold, repeats: int) -> str:
    return f"fold {fold.number} of {fold.of}" + (f", repetition {fold.repeat} of {repeats}" if repeats > 1 else "")


def _spreads(summaries: Sequence[Mapping[str, Any]], run: RunDirectory, folds: int) -> dict[str, Any]:
    """Return the spread of every metric over the folds."""
    task, scores = read_task(run.model), [summary["test"] for summary in summaries]
    return {
        name: spread_json(spread_of_folds([score[name] for score in scores], folds, metric_bounds(task, name)))
        for name in scores[0]
    }


def _rows(data: Data, directories: Sequence[RunDirectory], parts: Sequence[Fold]) -> Iterator[dict[str, Any]]:
    """Yield a row for every example in every repetition, in the order of the training split."""
    split = data.splits["train"]
    for repeat in sorted({part.repeat for part in parts}):
        rows: dict[int, dict[str, Any]] = {}
        for directory, part in zip(directories, parts, strict=True):
            scored = directory.predictions()
            if part.repeat != repeat or scored is None:
                continue
            members = np.flatnonzero(fold_numbers(split, part.of, repeat) == part.number).tolist()
            # The targets of the run have the order of its model's classes: that of the data, which has not changed.
            for row, index in enumerate(members):
                names = {"index": index, "name": split.name(index), "repeat": repeat, "fold": part.number}
                rows[index] = names | _answer(data, scored, row)
        yield from (rows[index] for index in sorted(rows))


def _answer(data: Data, scored: Predictions, row: int) -> dict[str, Any]:
    """Return the target, the prediction and the scores of one example, by the names of classes, labels or numbers."""
    classes = data.spec.classes
    target: Any = scored.targets[row].tolist()
    predicted: Any = scored.predictions[row].tolist()
    if data.spec.target == "number":
        return {f"target_{n}": t for n, t in zip(classes, target, strict=True)} | dict(
            zip(classes, predicted, strict=True)
        )
    scores = predicted if scored.scores is None else scored.scores[row].tolist()
    answer: dict[str, Any] = {}
    if data.spec.target == "class":
        answer = {"target": classes[target], "label": classes[predicted]}
    else:
        answer = {"target": [name for name, present in zip(classes, target, strict=True) if present]}
    if isinstance(scores, list) and len(scores) == len(classes):
        answer |= {f"probability_{name}": score for name, score in zip(classes, scores, strict=True)}
    return answer | ({} if scored.losses is None else {"loss": float(scored.losses[row])})
