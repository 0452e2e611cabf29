"""One config with several seeds: a folder of runs, and one summary with mean, spread and interval of every figure.

The splits do not depend on the seed (:mod:`transfer.data.splits`): every run is trained, selected and scored on the
same examples. What the seed changes is the random initial weights, the order of batches, augmentation and dropout.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transfer.config.check import load_config
from transfer.config.run_config import Config, RunConfig
from transfer.errors import RunError, UserError
from transfer.experiments.intervals import Spread, spread
from transfer.runs.train import Run, resume, run_in
from transfer.storage.run_directory import FORMAT, RunDirectory
from transfer.system.atomic_files import read_json, write_json
from transfer.system.ranks import refuse_several
from transfer.training.build import with_found_batch_size
from transfer.training.events import Note, Observer, ignore_events
from transfer.training.preflight import preflight

MANIFEST = "seeds.json"
"""Says which runs a folder of seeds holds or is to hold."""


@dataclass(frozen=True)
class Runs:
    """One complete run, or those of a folder of seeds.

    Args:
        folder: Of the run, or of the seeds.
        directories: The runs.
        seeds: Of each.
        summaries: Of each, as in its ``summary.json``.
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
    """Train what a config says once with each of several seeds, its own and those after it.

    Args:
        config: The path of a YAML file, or the config as plain data.
        overrides: ``path.to.key=value`` each.
        seeds: How many, 2 or more.
        output: The folder in which the runs get one of their own.
        quick: One epoch per phase over a few batches of each part.
        observe: Is called with every event of every run (:mod:`transfer.training.events`).

    Returns:
        The folder of seeds, and its summary: ``test`` holds ``mean``, ``standard_deviation``, ``interval`` and
        ``values`` of every metric.

    Raises:
        UserError: The config, the data or the weights are not right.
        TrainingError: Training cannot go on; :func:`resume_seeds` does.
    """
    refuse_several("training with several seeds")
    checked = load_config(config, overrides)
    preflight(checked)
    numbers = seeds_of(checked, seeds)
    checked = with_found_batch_size(checked, observe)
    folder = RunDirectory.create(Path(output), checked.name, "-seeds")
    with removed_if_nothing_ran(folder.path):
        return train_seeds(checked, numbers, folder.path, quick=quick, observe=observe)


def resume_seeds(folder: str | Path, *, observe: Observer = ignore_events) -> Run:
    """Go on with a folder of seeds that was interrupted: runs that are complete stay, one that is not goes on.

    Raises:
        UserError: It is no folder of seeds, or another process writes into it.
        TrainingError: Training cannot go on.
    """
    refuse_several("training with several seeds")
    path = Path(folder)
    manifest = read_json(path / MANIFEST, f"{path} is no folder of seeds", "give the folder that was printed last")
    return train_seeds(
        load_config(manifest["config"]), manifest["seeds"], path, quick=bool(manifest["quick"]), observe=observe
    )


def seeds_of(config: RunConfig, count: int) -> list[int]:
    """Return so many seeds, beginning with the config's own.

    Raises:
        UserError: One seed has no spread.
    """
    if count < 2:
        raise UserError(f"{count} seeds have no spread", fix="ask for 2 or more; 5 are usual")
    return list(range(config.seed, config.seed + count))


def train_seeds(config: RunConfig, seeds: Sequence[int], path: Path, *, quick: bool, observe: Observer) -> Run:
    """Train, in a folder, whatever of some seeds is not there yet, and sum all up."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunDirectory(path)
    with folder.locked(), saying_how_it_ended(folder, observe, folder.write_summary):
        manifest = {"format": FORMAT, "name": config.name, "seeds": list(seeds), "quick": quick}
        write_json(path / MANIFEST, {**manifest, "config": config.resolved})
        for number, seed in enumerate(seeds, 1):
            observe(Note(f"seed {seed}, run {number} of {len(seeds)}"))
            _train_one(config.with_seed(seed), path / f"seed-{seed}", quick=quick, observe=observe)
        runs = _open_seeds(path)
        summary = _sum_up(runs, quick)
        folder.write_summary(summary)
    return Run(path, summary)


@contextmanager
def saying_how_it_ended(
    folder: RunDirectory, observe: Observer, write: Callable[[Mapping[str, Any]], None]
) -> Iterator[None]:
    """Write and tell what kept several runs from their end, and how to go on."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # the disk may be full: what happened is said all the same
            write({"status": status, "error": f"{type(error).__name__}: {error}"})
        if isinstance(error, KeyboardInterrupt):
            observe(Note(f"go on with all of it: {folder.resume_command}"))
        raise


def open_runs(path: str | Path) -> Runs:
    """Take a run, or the runs of a folder of seeds.

    Raises:
        RunError: It is neither, or it has not ended.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _open_seeds(path)
    directory = RunDirectory.open(path)
    return Runs(path, (directory,), (int(directory.config().get("seed", 0)),), (_summary(directory, path),))


def _open_seeds(path: Path) -> Runs:
    seeds = tuple(read_json(path / MANIFEST, f"{path} is no folder of seeds")["seeds"])
    directories = tuple(RunDirectory(path / f"seed-{seed}") for seed in seeds)
    return Runs(path, directories, seeds, tuple(_summary(directory, path) for directory in directories))


def _summary(run: RunDirectory, folder: Path) -> Mapping[str, Any]:
    if not run.complete:
        fix = f"transfer resume {shlex.quote(str(folder))}"
        raise RunError(f"{run.path} has not ended", where=str(run.path), fix=fix)
    return run.summary()


def _train_one(config: RunConfig, path: Path, *, quick: bool, observe: Observer) -> Run:
    directory = RunDirectory(path)
    if directory.complete:
        return Run(path, directory.summary())
    if (path / "config.yaml").is_file():
        return resume(path, observe=observe)

    def make() -> RunDirectory:
        shutil.rmtree(path, ignore_errors=True)  # killed before its config was written: it is no run yet
        path.mkdir()
        return directory

    return run_in(make, config, quick=quick, observe=observe)


@contextmanager
def removed_if_nothing_ran(path: Path) -> Iterator[None]:
    """Leave no folder behind where a mistake of the user kept even the first run from beginning."""
    try:
        yield
    except UserError:
        if not any(path.rglob("config.yaml")):
            shutil.rmtree(path)
        raise


def _sum_up(runs: Runs, quick: bool) -> dict[str, Any]:
    first = runs.summaries[0]
    splits = {split: _spreads([summary[split] for summary in runs.summaries]) for split in ("validation", "test")}
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


def _spreads(figures: Sequence[Mapping[str, float] | None]) -> dict[str, Any] | None:
    """Return the spread of every metric of a split; None where the data has no such split."""
    known = [figure for figure in figures if figure is not None]
    return {name: spread_json(spread([figure[name] for figure in known])) for name in known[0]} if known else None


def spread_json(spread: Spread) -> dict[str, Any]:
    """Return a spread as JSON has it."""
    interval = None if spread.interval is None else list(spread.interval)
    return {**asdict(spread), "interval": interval, "values": list(spread.values)}
