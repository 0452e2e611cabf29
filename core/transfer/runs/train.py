"""What one does with a config or a run: check, run, resume, evaluate, predict. The command line calls these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer.config.check import load_config
from transfer.config.run_config import Config, RunConfig
from transfer.data.splits import digest
from transfer.errors import ConfigError, StoppedByObserver
from transfer.models.saved_model import LoadedModel, write_model
from transfer.runs.artifacts import CompletedRun, write_artifacts
from transfer.runs.facts import length_quantiles, run_environment, run_facts
from transfer.runs.tracking import Tracking
from transfer.storage.environment import environment_diff
from transfer.storage.run_directory import RunDirectory
from transfer.system.devices import device_name
from transfer.system.ranks import lacks_a_launcher
from transfer.system.signals import Signals
from transfer.training.build import BuiltExperiment, build
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from transfer.training.engine import fit
from transfer.training.events import Note, Observer, RunEnded, RunStarted, ignore_events


@dataclass(frozen=True)
class Run:
    """A run that ended.

    Args:
        folder: Its run directory.
        summary: As in ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]


def run(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "runs",
    quick: bool = False,
    observe: Observer = ignore_events,
) -> Run:
    """Train what a config says and return the run.

    Several processes that a launcher started (``torchrun``) train it together; the first one alone writes and observes.

    Args:
        config: The path of a YAML file, or the config as plain data.
        overrides: ``path.to.key=value`` each.
        output: The folder in which the run makes its own.
        quick: One epoch per phase over a few batches of each part, to prove a config before a long run.
        observe: Is called with every event of the run (:mod:`transfer.training.events`).

    Raises:
        UserError: The config, the data or the weights are not right; nothing has been written.
        TrainingError: Training cannot go on; the run directory holds what was reached.
    """
    with process_group() as processes:
        checked = load_config(config, overrides)

        def make() -> RunDirectory:
            return RunDirectory.create(Path(output), checked.name)

        return run_in(make, checked, quick=quick, observe=observe, processes=processes)


def run_in(
    make_directory: Callable[[], RunDirectory],
    config: RunConfig,
    *,
    quick: bool,
    observe: Observer,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Run:
    """Train what a checked config says in the folder that is made once everything is loaded (:func:`run`)."""
    if quick:
        config = config.quick()
    built, observe = _build(config, observe, processes, quick=quick)
    config = built.config
    directory = RunDirectory(processes.broadcast_object(lambda: make_directory().path))
    with directory.locked() if processes.is_main else nullcontext():
        if processes.is_main:
            # The config comes last: a folder without it is no run.
            directory.write_environment(run_environment(config, processes), quick=quick)
            directory.write_config(config.resolved)
        return _train(config, built, directory, observe, processes, quick=quick, resume=False)


def _build(
    config: RunConfig, observe: Observer, processes: ProcessGroup, *, quick: bool
) -> tuple[BuiltExperiment, Observer]:
    """Build an experiment, and return it with who is told of it: nobody, of all processes but the first."""
    observe = observe if processes.is_main else ignore_events
    if processes.is_distributed and config.train.batch_size == "auto":
        raise ConfigError(
            "train.batch_size: auto looks at the memory of one process, and there are several",
            where=config.document.location(("train", "batch_size")),
            fix="find it in one process, with --quick say, and set the number",
        )
    if lacks_a_launcher():
        text = "accelerate launch --cpu starts several processes through mpirun alone: this one trains by itself"
        observe(Note(f"{text}; torchrun --nproc-per-node N -m transfer ... starts N"))
    with processes.local_main_first():  # what it downloads or prepares the others find
        return build(config, observe, quick=quick), observe


def resume(run: str | Path, *, observe: Observer = ignore_events) -> Run:
    """Go on with a run that was interrupted, as if nothing had happened: on the CPU its result is the same to the bit.

    A run that was stopped before its first checkpoint begins again in its folder; of one that is complete nothing is
    done.

    Args:
        run: A run directory.
        observe: Is called with every event of the run (:mod:`transfer.training.events`).

    Raises:
        UserError: The folder is no run's, another process writes into it, or data, base weights or all checkpoints are
            not what they were.
        TrainingError: Training cannot go on.
    """
    with process_group() as processes, ExitStack() as stack:

        def find() -> tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any] | None]:
            directory = RunDirectory.open(run)
            stack.enter_context(directory.locked())
            if directory.complete:
                return directory.path, {}, {}, directory.summary()
            return directory.path, directory.config(trackers=True), directory.environment(), None

        path, plain, before, summary = processes.broadcast_object(find)
        directory = RunDirectory(path)
        if summary is not None:
            if processes.is_main:
                observe(Note(f"{path} is complete: there is nothing to do"))
            return Run(path, summary)
        config = load_config(plain)
        quick = bool(before.get("quick"))
        if quick:
            config = config.quick()
        different = environment_diff(before, run_environment(config, processes))
        if different and processes.is_main:
            observe(
                Note("not the same as when the run began; results may differ in the last bits: " + "; ".join(different))
            )
        built, observe = _build(config, observe, processes, quick=quick)
        if processes.is_main:
            directory.remove_temporary_files()
            directory.note_resume(different)
        return _train(config, built, directory, observe, processes, quick=quick, resume=True)


def _train(
    config: RunConfig,
    built: BuiltExperiment,
    directory: RunDirectory,
    observe: Observer,
    processes: ProcessGroup,
    *,
    quick: bool,
    resume: bool,
) -> Run:
    """Train in a run directory, from the beginning or from its checkpoint, to its summary."""
    epochs = sum(phase.epochs for phase in built.experiment.phases)
    primary_metric = built.experiment.task.primary_metric.name
    device = device_name(built.experiment.options.device)
    if processes.is_distributed:
        device += f", {processes.rank.world_size} processes"
    tracking = Tracking(config, directory, observe)
    if processes.is_main:
        observe = tracking
    observe(RunStarted(directory.path, run_facts(config, built, device), epochs, primary_metric))
    with Signals(processes.all_reduce_max if processes.is_distributed else None) as signals:
        try:
            fitted = fit(built.experiment, directory, observe, signals, resume=resume, processes=processes)
            summary = {"status": "complete", "quick": quick, **fitted}
            summary |= {"examples": {name: len(loader.split) for name, loader in built.loaders.items()}}
            summary |= {"data": built.classes, "learned": built.learned, "pretrained": built.pretrained}
            summary |= {
                "lengths": {
                    name: length_quantiles(loader)
                    for name, loader in built.loaders.items()
                    if loader.lengths is not None
                }
            }
            summary |= {"digests": {name: digest({name: loader.split}) for name, loader in built.loaders.items()}}
            with signals.deferred():
                if processes.is_main:
                    write_model(directory.model, config, built.data, built.backbone, built.experiment.model)
                    directory.write_summary(summary)
                processes.barrier()
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            status = "stopped" if isinstance(error, StoppedByObserver) else status
            broken = {"status": status, "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):  # the disk may be full: what happened is said all the same
                if processes.is_main:
                    directory.write_summary(broken)
            tracking.end(broken)
            if isinstance(error, KeyboardInterrupt):
                observe(Note(f"interrupted; go on with: {directory.resume_command}"))
            raise
    if config.train.report and not quick and processes.is_main:
        experiment = built.experiment
        test = built.loaders["test"].split if "test" in built.loaders else None
        trained = LoadedModel(experiment.model, built.backbone, experiment.task, built.data)
        write_artifacts(CompletedRun(directory, config, experiment.phases, trained, test), observe)
    observe(RunEnded(directory.path, summary))
    return Run(directory.path, summary)
