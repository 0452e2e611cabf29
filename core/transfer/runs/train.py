"""Train a config to a run directory, and resume a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from transfer.config.check import config_of_moved_run, load_config
from transfer.config.run_config import Config, RunConfig
from transfer.config.tracker_variables import mask_trackers, read_tracker_variables, stored_config
from transfer.data.in_memory import InMemoryTable, require_table
from transfer.data.splits import digest
from transfer.errors import ConfigError, RunError, StoppedByObserver
from transfer.models.recorded_plugins import changes as plugin_changes, recorded_plugins, run_config
from transfer.models.saved_model import LoadedModel, write_model
from transfer.runs.artifacts import CompletedRun, write_artifacts
from transfer.runs.class_metrics import class_metrics
from transfer.runs.data import require_same_table
from transfer.runs.facts import length_quantiles, run_environment, run_facts
from transfer.runs.predictor import Predictor, load
from transfer.runs.summary_html import run_html
from transfer.runs.tracking import Tracking
from transfer.storage.environment import environment_diff
from transfer.storage.run_directory import RunDirectory
from transfer.system.devices import busy_cores_warning, device_name, slow_precision_warning
from transfer.system.ranks import lacks_a_launcher
from transfer.system.signals import Signals
from transfer.training.build import BuiltExperiment, build
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from transfer.training.engine import fit
from transfer.training.events import Note, Observer, RunEnded, RunStarted, ignore_events

_SETTLED = frozenset({("train", "batch_size"), ("train", "recipe", "solver"), ("train", "recipe", "batch_norm")})
"""Options that a run replaces by values that depend on the machine, the model and the data."""
_MISSING = object()


@dataclass(frozen=True)
class Run:
    """A completed run.

    Args:
        folder: Run directory.
        summary: Content of ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]

    @cached_property
    def predictor(self) -> Predictor:
        """The trained model with its preprocessing, read from the run directory once."""
        return load(self.folder)

    @property
    def model(self) -> nn.Module:
        """The trained model, in eval mode."""
        return self.predictor.loaded.model

    def predict(self, values: Any, **options: Any) -> list[dict[str, Any]]:
        """Predict a list of values, or the rows of a table.

        Args:
            values: Texts, PIL images, arrays, ``pathlib.Path`` objects, or a table.
            **options: Options of :meth:`transfer.Predictor.predict`.
        """
        return self.predictor.predict(values, **options)

    def _repr_html_(self) -> str:
        """Return a table of the settings and results, which notebooks show."""
        return run_html(self.folder, self.summary)


def run(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    data: InMemoryTable | None = None,
    output: str | Path = "runs",
    into: str | Path | None = None,
    quick: bool = False,
    observe: Observer = ignore_events,
) -> Run:
    """Train a config and return the run.

    If a launcher (``torchrun``) started several processes, they train one model together. Only rank 0 writes files and
    reports events.

    Args:
        config: Path of a YAML file, the config as a mapping, or a checked config.
        overrides: Changes to the config, each ``path.to.key=value``.
        data: Data in memory (:func:`transfer.table`), in place of the dataset of the config; its options ``validation``
            and ``limit`` apply. Only a digest is stored: resuming and evaluating the run need the same data again.
        output: Folder in which the run directory is created.
        into: Path of the run directory, so that the same call starts or resumes the run, for launchers and schedulers
            that start a command again. A complete run is left as it is. None creates a new directory in ``output``.
        quick: Whether to run one epoch per phase over a few batches of each split only, as a test of the config.
        observe: Function that is called with every event of the run (:mod:`transfer.training.events`).

    Raises:
        UserError: The config, the data or the weights are wrong, or ``into`` contains another run. No files are
            written.
        TrainingError: Training failed; the run directory contains the last checkpoint.
    """
    with process_group() as processes:
        checked = load_config(config, overrides, data=None if data is None else require_table(data).block)
        if into is not None and processes.broadcast_object(lambda: _has_run(Path(into), checked, quick=quick)):
            return _resume(into, (), observe, processes)

        def make() -> RunDirectory:
            return (
                RunDirectory.create(Path(output), checked.name) if into is None else RunDirectory.create_at(Path(into))
            )

        return run_in(make, checked, quick=quick, observe=observe, processes=processes)


def run_in(
    make_directory: Callable[[], RunDirectory],
    config: RunConfig,
    *,
    quick: bool,
    observe: Observer,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Run:
    """Train a checked config in a new run directory (:func:`run`).

    Args:
        make_directory: Function that creates the run directory. It is called after data and weights are loaded, so that
            errors in them leave no directory behind.
        config: Checked config.
        quick: Whether to run a few batches only.
        observe: Function that is called with every event of the run.
        processes: Process group of the run.
    """
    if quick:
        config = config.quick()
    built, observe = _build(config, observe, processes, quick=quick)
    config = built.config
    # Rank 0 creates the directory, whose name contains the time; the other ranks receive its path.
    directory = RunDirectory(Path(processes.broadcast_object(lambda: str(make_directory().path))))
    with directory.locked() if processes.is_main else nullcontext():
        if processes.is_main:
            directory.refuse_existing_run()  # with a fixed path, another process may have been faster
            # The config is written last: a folder without it is not a run.
            directory.write_environment(run_environment(config, processes), quick=quick)
            directory.write_config(stored_config(config.resolved))
        return _train(config, built, directory, observe, processes, quick=quick, resume=False)


def _has_run(path: Path, config: RunConfig, *, quick: bool) -> bool:
    """Return whether a folder contains a run of this config.

    Raises:
        RunError: It contains a run of another config.
    """
    if not (path / "config.yaml").is_file():
        return False
    directory = RunDirectory.open(path)
    wanted = _values(mask_trackers((config.quick() if quick else config).resolved))
    stored = _values(directory.config(trackers=True))
    names = [
        ".".join(map(str, key))
        for key in {**stored, **wanted}
        # Options that a run settles by itself are stored with the value that it has found.
        if stored.get(key, _MISSING) != wanted.get(key, _MISSING)
        and not (key in _SETTLED and wanted.get(key) in (None, "auto"))
    ]
    names += ["--quick"] if bool(directory.environment().get("quick")) != quick else []
    if names:
        raise RunError(
            f"{path} contains a run of another config: {', '.join(names[:8])} differ{'s' * (len(names) == 1)}",
            where=str(path / "config.yaml"),
            fix="choose another folder, or continue that run with: " + directory.resume_command,
        )
    return True


def _values(plain: Any, key: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    """Return the values of nested dicts and lists by their keys."""
    if isinstance(plain, list | tuple):
        plain = dict(enumerate(plain))
    if not isinstance(plain, Mapping) or not plain:
        return {key: plain}
    return {name: value for child, inner in plain.items() for name, value in _values(inner, (*key, child)).items()}


def _build(
    config: RunConfig, observe: Observer, processes: ProcessGroup, *, quick: bool
) -> tuple[BuiltExperiment, Observer]:
    """Build the experiment. Return it with the observer: only rank 0 reports events."""
    observe = observe if processes.is_main else ignore_events
    if processes.is_distributed and config.train.batch_size == "auto":
        raise ConfigError(
            "train.batch_size is auto: expected a number in distributed training, because auto measures one process",
            where=config.document.location(("train", "batch_size")),
            fix="find the size in one process, for example with --quick, and set the number",
        )
    if lacks_a_launcher():
        text = "accelerate launch --cpu starts several processes only with mpirun: training in a single process"
        observe(Note(f"{text}; to start N processes: torchrun --nproc-per-node N -m transfer ..."))
    with processes.local_main_first():  # local rank 0 downloads and prepares files for the other ranks
        return build(config, observe, quick=quick), observe


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    data: InMemoryTable | None = None,
    observe: Observer = ignore_events,
) -> Run:
    """Resume an interrupted run. On the CPU, the result is bit-identical to that of an uninterrupted run.

    A run without a checkpoint starts again in its directory. A complete run is left as it is.

    Args:
        run: Run directory.
        overrides: Changes to the data block, each ``data.key=value``, if the data has moved. They are stored in the
            run's config. Other data is refused.
        data: Data in memory that the run was started with (:func:`transfer.table`). None reads the data of the config.
        observe: Function that is called with every event of the run (:mod:`transfer.training.events`).

    Raises:
        UserError: The folder is not a run directory, another process writes into it, the data or the base weights have
            changed, or all checkpoints are damaged.
        TrainingError: Training failed.
    """
    if data is not None:
        require_same_table(RunDirectory.open(run), data)
    with process_group() as processes:
        return _resume(run, overrides, observe, processes)


def _resume(run: str | Path, overrides: Sequence[str], observe: Observer, processes: ProcessGroup) -> Run:
    with ExitStack() as stack:

        def find() -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any] | None]:
            directory = RunDirectory.open(run)
            stack.enter_context(directory.locked())
            if directory.complete:
                return str(directory.path), {}, {}, directory.summary()
            return str(directory.path), run_config(directory, trackers=True), directory.environment(), None

        path_text, plain, before, summary = processes.broadcast_object(find)
        directory = RunDirectory(path := Path(path_text))
        if summary is not None:
            if processes.is_main:
                observe(Note(f"{path} is already complete"))
            return Run(path, summary)
        plain, missing = read_tracker_variables(plain)
        if missing and processes.is_main:
            text = (
                f"the trackers use {', '.join(missing)}, which is not set, or is not read for a run of another machine"
            )
            observe(Note(f"{text}; write the value into {path / 'config.yaml'}"))
        config = config_of_moved_run(plain, overrides)
        resolved = config.resolved
        quick = bool(before.get("quick"))
        if quick:
            config = config.quick()
        # Compared before building: the note explains errors that another environment causes.
        different = environment_diff(before, run_environment(config, processes))
        components = (config.data, config.backbone, config.head, config.task)
        different += plugin_changes(recorded_plugins(directory), components, versions=False)
        if different and processes.is_main:
            changes = "; ".join(different)
            observe(Note(f"the environment has changed, so results may differ in the last bits: {changes}"))
        built, observe = _build(config, observe, processes, quick=quick)
        if processes.is_main:
            directory.remove_temporary_files()
            directory.note_resume(different)
            if overrides:
                directory.write_config(stored_config(resolved))
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
    """Train in a run directory, from the start or from the last checkpoint, and write the model and the summary."""
    epochs = sum(phase.epochs for phase in built.experiment.phases)
    primary_metric = built.experiment.task.primary_metric.name
    device = device_name(built.experiment.options.device)
    if processes.is_distributed:
        device += f", {processes.rank.world_size} processes"
    tracking = Tracking(config, directory, observe)
    if processes.is_main:
        observe = tracking
    observe(RunStarted(directory.path, run_facts(config, built, device), epochs, primary_metric))
    options = built.experiment.options
    for warning in (busy_cores_warning(options.device), slow_precision_warning(options.precision, options.device)):
        if warning is not None:
            observe(Note(f"warning: {warning}"))
    with Signals(distributed=processes.is_distributed) as signals:
        try:
            fitted = fit(built.experiment, directory, observe, signals, resume=resume, processes=processes)
            summary = {"status": "complete", "quick": quick, **fitted}
            summary |= {"examples": {name: len(loader.split) for name, loader in built.loaders.items()}}
            summary |= {"data": built.classes, "learned": built.learned, "pretrained": built.pretrained}
            summary |= {"data_warnings": built.data_warnings}
            summary |= {
                "lengths": {
                    name: length_quantiles(loader)
                    for name, loader in built.loaders.items()
                    if loader.lengths is not None
                }
            }
            summary |= {"digests": {name: digest({name: loader.split}) for name, loader in built.loaders.items()}}
            # An interruption between the model and the summary would leave a complete run that looks incomplete.
            with signals.deferred():
                if processes.is_main:
                    scored = directory.predictions()
                    if scored and (metrics := class_metrics(built.data, built.experiment.task, scored)):
                        summary |= {"per_class": {name: asdict(one) for name, one in metrics.items()}}
                    write_model(
                        directory.model,
                        config,
                        built.data,
                        built.backbone,
                        built.experiment.task,
                        built.experiment.model,
                    )
                    directory.write_summary(summary)
                processes.barrier()
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            status = "stopped" if isinstance(error, StoppedByObserver) else status
            outcome = {"status": status, "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):  # if the disk is full, the original error still has to be raised
                if processes.is_main:
                    directory.write_summary(outcome)
            tracking.end(outcome)
            if isinstance(error, KeyboardInterrupt):
                observe(Note(f"interrupted; resume with: {directory.resume_command}"))
            raise
    if config.train.report and not quick and processes.is_main:
        experiment = built.experiment
        test = built.loaders["test"].split if "test" in built.loaders else None
        trained = LoadedModel(experiment.model, built.backbone, experiment.task, built.data)
        write_artifacts(CompletedRun(directory, config, experiment.phases, trained, test), observe)
    # Trackers finish with this event, so artifacts are written before it.
    observe(RunEnded(directory.path, summary))
    return Run(directory.path, summary)
