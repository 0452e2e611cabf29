"""One config with several seeds: a folder of runs, and a summary with mean, deviation and interval of every metric.

The splits do not depend on the seed (:mod:`transfer.data.splits`): every run is trained, selected and scored on the
same examples. The seed changes the initial weights, the order of batches, augmentation and dropout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from transfer.config.check import config_of_moved_run, load_config
from transfer.config.older_versions import add_missing_options
from transfer.config.run_config import Config, RunConfig
from transfer.config.tracker_variables import read_tracker_variables, stored_config
from transfer.errors import RunError, UserError
from transfer.experiments.intervals import Spread, metric_bounds, spread
from transfer.interfaces import Task
from transfer.models.recorded_plugins import load_run_config
from transfer.models.saved_model import read_task
from transfer.runs.train import Run, resume, run_in
from transfer.storage.run_directory import FORMAT, RunDirectory
from transfer.system.atomic_files import read_json, write_json
from transfer.system.file_schema import FileSchema, checked
from transfer.system.formatting import quote_for_shell
from transfer.system.ranks import refuse_several
from transfer.training.build import with_found_batch_size
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import preflight

MANIFEST = "seeds.json"
"""File in a folder of seeds that lists its seeds and contains their config."""


Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=2)]
"""Seeds in the file of a folder of runs."""


class _Manifest(FileSchema):
    """The file ``seeds.json``."""

    format: Literal[1]
    seeds: Seeds
    quick: bool
    config: dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """One complete run, or the runs of a folder of seeds.

    Args:
        folder: Run directory, or folder of seeds.
        directories: Directory of each run.
        seeds: Seed of each run.
        summaries: Summary of each run, as in its ``summary.json``.
    """

    folder: Path
    directories: tuple[RunDirectory, ...]
    seeds: tuple[int, ...]
    summaries: tuple[Mapping[str, Any], ...]


def run_seeds(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    seeds: int,
    output: str | Path = "runs",
    quick: bool = False,
    observe: Observer = ignore_events,
) -> Run:
    """Train a config with several seeds: the config's own seed and the following ones.

    Args:
        config: Path of a YAML file, or the config as a mapping.
        overrides: Changes to the config, each ``path.to.key=value``.
        seeds: Number of seeds, 2 or more.
        output: Folder in which the folder of seeds is created.
        quick: Whether to run one epoch per phase over a few batches of each split only.
        observe: Function that is called with every event of every run (:mod:`transfer.training.events`).

    Returns:
        The folder of seeds and its summary. The summary's ``test`` contains ``mean``, ``standard_deviation``,
        ``interval`` and ``values`` of every metric.

    Raises:
        UserError: The config, the data or the weights are wrong.
        TrainingError: Training failed; :func:`resume_seeds` continues it.
    """
    refuse_several("training with several seeds")
    checked = load_config(config, overrides)
    # Wrong configs are refused before a folder is created and a batch size is searched.
    preflight(checked)
    numbers = seeds_of(checked, seeds)
    # With `batch_size: auto`, all seeds use the same size: a search per seed could find different ones.
    checked = with_found_batch_size(checked, observe)
    folder = RunDirectory.create(Path(output), checked.name, "-seeds")
    with removed_if_nothing_ran(folder.path):
        return train_seeds(checked, numbers, folder.path, quick=quick, observe=observe)


def resume_seeds(folder: str | Path, overrides: Sequence[str] = (), *, observe: Observer = ignore_events) -> Run:
    """Resume a folder of seeds that was interrupted. Complete runs stay; an incomplete run is resumed.

    Args:
        folder: Folder of seeds.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved. They are stored in the
            folder. Other data is refused.
        observe: Function that is called with every event of every run (:mod:`transfer.training.events`).

    Raises:
        UserError: The folder is not a folder of seeds, or another process writes into it.
        TrainingError: Training failed.
    """
    refuse_several("training with several seeds")
    path = Path(folder)
    manifest = _read_manifest(path)
    plain, _ = read_tracker_variables(manifest.config)
    config = config_of_moved_run(plain, overrides)
    return train_seeds(config, manifest.seeds, path, overrides, quick=manifest.quick, observe=observe)


def _read_manifest(folder: Path) -> _Manifest:
    fix = "give the folder that `transfer run --seeds` printed last"
    content = read_json(folder / MANIFEST, f"{folder} is not a folder of seeds", fix)
    manifest = checked(content, _Manifest, str(folder / MANIFEST))
    manifest.config = add_missing_options(content["config"])  # with paths as they are, which need not be UTF-8
    return manifest


def seeds_of(config: RunConfig, count: int) -> list[int]:
    """Return ``count`` consecutive seeds that start with the config's own.

    Raises:
        UserError: The count is below 2: one run has no standard deviation.
    """
    if count < 2:
        raise UserError(f"the number of seeds is too small: expected 2 or more, got {count}", fix="use 5, for example")
    return list(range(config.seed, config.seed + count))


def train_seeds(
    config: RunConfig,
    seeds: Sequence[int],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    quick: bool,
    observe: Observer,
) -> Run:
    """Train the seeds that are not complete in a folder yet, and write the summary of all seeds.

    Args:
        config: Checked config.
        seeds: Seed of each run.
        path: Folder of the runs.
        overrides: Changes to the data block of a run that is resumed, each ``data.key=value``.
        quick: Whether to run one epoch per phase over a few batches of each split only.
        observe: Function that is called with every event of every run.
    """
    path.mkdir(parents=True, exist_ok=True)
    folder = RunDirectory(path)
    with folder.locked(), recorded_outcome(folder, observe, folder.write_summary):
        manifest = {"format": FORMAT, "name": config.name, "seeds": list(seeds), "quick": quick}
        # Written before the first run, so that an interrupted folder can be resumed.
        write_json(path / MANIFEST, {**manifest, "config": stored_config(config.resolved)})
        for number, seed in enumerate(seeds, 1):
            observe(Note(f"seed {seed}, run {number} of {len(seeds)}"))
            _train_one(config.with_seed(seed), path / f"seed-{seed}", overrides, quick=quick, observe=observe)
        runs = _open_seeds(path)
        summary = _sum_up(runs, quick)
        folder.write_summary(summary)
    return Run(path, summary)


@contextmanager
def recorded_outcome(
    folder: RunDirectory, observe: Observer, write: Callable[[Mapping[str, Any]], None]
) -> Iterator[None]:
    """Write the status of several runs if an error or an interruption ends them, and report how to resume them.

    Args:
        folder: Folder of the runs.
        observe: Function that is called with the note.
        write: Function that writes the status to the folder.
    """
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # if the disk is full, the original error still has to be raised
            write({"status": status, "error": f"{type(error).__name__}: {error}"})
        if isinstance(error, KeyboardInterrupt):
            observe(Note(f"resume all of them with: {folder.resume_command}"))
        raise


def open_runs(path: str | Path) -> Runs:
    """Open a complete run, or all runs of a folder of seeds.

    Raises:
        RunError: The folder is neither, or a run is not complete.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _open_seeds(path)
    directory = RunDirectory.open(path)
    summary = _summary(directory, path)
    return Runs(path, (directory,), (load_run_config(directory).seed,), (summary,))


def _open_seeds(path: Path) -> Runs:
    seeds = tuple(_read_manifest(path).seeds)
    directories = tuple(RunDirectory(path / f"seed-{seed}") for seed in seeds)
    return Runs(path, directories, seeds, tuple(_summary(directory, path) for directory in directories))


def _summary(run: RunDirectory, folder: Path) -> Mapping[str, Any]:
    if not run.complete:
        fix = f"transfer resume {quote_for_shell(folder)}"
        raise RunError(f"{run.path} is not complete", where=str(run.path), fix=fix)
    return run.summary()


def _train_one(config: RunConfig, path: Path, overrides: Sequence[str], *, quick: bool, observe: Observer) -> Run:
    directory = RunDirectory(path)
    if directory.complete:
        return Run(path, directory.summary())
    # A run writes its config last: without it, there is nothing to resume.
    if (path / "config.yaml").is_file():
        return resume(path, overrides, observe=observe)

    def make() -> RunDirectory:
        shutil.rmtree(path, ignore_errors=True)  # a process was killed before it wrote the config
        path.mkdir()
        return directory

    return run_in(make, config, quick=quick, observe=observe)


@contextmanager
def removed_if_nothing_ran(path: Path) -> Iterator[None]:
    """Remove a new folder if an error in the user's input prevents the first run from starting."""
    try:
        yield
    except UserError:
        if not any(path.rglob("config.yaml")):
            shutil.rmtree(path)
        raise


def _sum_up(runs: Runs, quick: bool) -> dict[str, Any]:
    first, task = runs.summaries[0], read_task(runs.directories[0].model)
    splits = {split: _spreads([summary[split] for summary in runs.summaries], task) for split in ("validation", "test")}
    return {
        "status": "complete",
        "quick": quick,
        "seeds": list(runs.seeds),
        "primary_metric": first["primary_metric"],
        **splits,
        "parameters": first["parameters"],
        "examples": first["examples"],
        "seconds": round(sum(summary["seconds"] for summary in runs.summaries), 3),
        "runs": [directory.path.name for directory in runs.directories],
    }


def _spreads(metrics: Sequence[Mapping[str, float] | None], task: Task) -> dict[str, Any] | None:
    """Return the spread of every metric of a split over the runs; None if the split was not scored."""
    scored = [run for run in metrics if run is not None]
    if not scored:
        return None
    return {name: spread_json(spread([run[name] for run in scored], metric_bounds(task, name))) for name in scored[0]}


def spread_json(spread: Spread) -> dict[str, Any]:
    """Return a spread as JSON data."""
    interval = None if spread.interval is None else list(spread.interval)
    return {**asdict(spread), "interval": interval, "values": list(spread.values)}
