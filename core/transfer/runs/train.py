"""What one does with a config or a run: check, run, resume, evaluate, predict. The command line calls these."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfer.config.run_config import RunConfig, load_config
from transfer.data.loader import Loader
from transfer.data.splits import digest
from transfer.errors import ConfigError, DataError, RunError, Stopped
from transfer.interfaces import SPLITS, Preprocessing
from transfer.models.model_json import DESCRIPTION
from transfer.models.saved_model import LoadedModel, find_model, read_model, write_model
from transfer.registry.entry_points import IN_PROCESS
from transfer.reports.report import Subject, write_report
from transfer.runs.occlusion import explain_output, outputs_of
from transfer.runs.tracking import Tracking
from transfer.storage.run_directory import RunDirectory, changes, environment, read_json
from transfer.system.ranks import lacks_a_launcher
from transfer.system.signals import Signals
from transfer.training.build import Built, Parts, build, make_experiment, make_loader, preflight, read_data
from transfer.training.distributed import ALONE, Processes, joined
from transfer.training.engine import evaluate as score
from transfer.training.engine import fit
from transfer.training.events import Note, Observer, RunEnded, RunStarted

PREDICTION_BATCH = 64
MOST_CLASSES_SHOWN = 6
REPORT_SECONDS = 0.2
"""Of the processor, for explanations in the report at the end of a run; `transfer report` takes its time."""

Config = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that ended.

    Args:
        folder: Its run directory.
        summary: As in ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]


def silent(_: object) -> None:
    """Observe nothing."""
    return


def check(config: Config, overrides: Sequence[str] = ()) -> tuple[RunConfig, Parts]:
    """Check a config and fit its parts together on the meta device: no data, no weights, seconds.

    Raises:
        UserError: With every problem found.
    """
    checked = load_config(config, overrides)
    return checked, preflight(checked)


def run(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "runs",
    quick: bool = False,
    observe: Observer = silent,
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
    with joined() as processes:
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
    processes: Processes = ALONE,
) -> Run:
    """Train what a checked config says in the folder that is made once everything is loaded (:func:`run`)."""
    if quick:
        config = config.quick()
    built, observe = _build(config, observe, processes, quick=quick)
    config = built.config
    directory = RunDirectory(processes.from_first(lambda: make_directory().path))
    with directory.locked() if processes.leads else nullcontext():
        if processes.leads:
            # The config comes last: a folder without it is no run.
            directory.write_environment(_environment(config, processes), quick=quick)
            directory.write_config(config.plain)
        return _train(config, built, directory, observe, processes, quick=quick, resume=False)


def _build(config: RunConfig, observe: Observer, processes: Processes, *, quick: bool) -> tuple[Built, Observer]:
    """Build an experiment, and return it with who is told of it: nobody, of all processes but the first."""
    observe = observe if processes.leads else silent
    if processes.several and config.train.batch_size == "auto":
        raise ConfigError(
            "train.batch_size: auto looks at the memory of one process, and there are several",
            where=config.document.where(("train", "batch_size")),
            fix="find it in one process, with --quick say, and set the number",
        )
    if lacks_a_launcher():
        text = "accelerate launch --cpu starts several processes through mpirun alone: this one trains by itself"
        observe(Note(f"{text}; torchrun --nproc-per-node N -m transfer ... starts N"))
    with processes.first_here():  # what it downloads or prepares the others find
        return build(config, observe, quick=quick), observe


def resume(run: str | Path, *, observe: Observer = silent) -> Run:
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
    with joined() as processes, ExitStack() as stack:

        def find() -> tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any] | None]:
            directory = RunDirectory.open(run)
            stack.enter_context(directory.locked())
            if directory.complete:
                return directory.path, {}, {}, directory.summary()
            return directory.path, directory.config(trackers=True), directory.environment(), None

        path, plain, before, summary = processes.from_first(find)
        directory = RunDirectory(path)
        if summary is not None:
            if processes.leads:
                observe(Note(f"{path} is complete: there is nothing to do"))
            return Run(path, summary)
        config = load_config(plain)
        quick = bool(before.get("quick"))
        if quick:
            config = config.quick()
        different = changes(before, _environment(config, processes))
        if different and processes.leads:
            observe(
                Note("not the same as when the run began; results may differ in the last bits: " + "; ".join(different))
            )
        built, observe = _build(config, observe, processes, quick=quick)
        if processes.leads:
            directory.sweep()
            directory.note_resume(different)
        return _train(config, built, directory, observe, processes, quick=quick, resume=True)


def _train(
    config: RunConfig,
    built: Built,
    directory: RunDirectory,
    observe: Observer,
    processes: Processes,
    *,
    quick: bool,
    resume: bool,
) -> Run:
    """Train in a run directory, from the beginning or from its checkpoint, to its summary."""
    epochs = sum(phase.epochs for phase in built.experiment.phases)
    primary_metric = built.experiment.task.primary_metric.name
    device = _device() + (f", {processes.own.count} processes" if processes.several else "")
    tracking = Tracking(config, directory, observe)
    if processes.leads:
        observe = tracking
    observe(RunStarted(directory.path, _facts(config, built, device), epochs, primary_metric))
    with Signals(processes.largest if processes.several else None) as signals:
        try:
            fitted = fit(built.experiment, directory, observe, signals, resume=resume, processes=processes)
            summary = {"status": "complete", "quick": quick, **fitted}
            summary |= {"examples": {name: len(loader.split) for name, loader in built.loaders.items()}}
            summary |= {"data": built.classes, "learned": built.learned, "pretrained": built.pretrained}
            summary |= {
                "lengths": {
                    name: _lengths(loader) for name, loader in built.loaders.items() if loader.lengths is not None
                }
            }
            summary |= {"digests": {name: digest({name: loader.split}) for name, loader in built.loaders.items()}}
            with signals.held():
                if processes.leads:
                    write_model(directory.model, config, built.data, built.backbone, built.experiment.model)
                    directory.write_summary(summary)
                processes.wait()
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            status = "stopped" if isinstance(error, Stopped) else status
            broken = {"status": status, "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):  # the disk may be full: what happened is said all the same
                if processes.leads:
                    directory.write_summary(broken)
            tracking.end(broken)
            if isinstance(error, KeyboardInterrupt):
                observe(Note(f"interrupted; go on with: {directory.resume_command}"))
            raise
    if config.train.report and not quick and processes.leads:
        _report(config, built, directory, observe)
    observe(RunEnded(directory.path, summary))
    return Run(directory.path, summary)


def _lengths(loader: Loader) -> dict[str, int]:
    """Return how long a split's examples are."""
    marks = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
    found = np.quantile(loader.lengths, list(marks.values())) if loader.lengths is not None else ()
    return {name: round(float(length)) for name, length in zip(marks, found, strict=True)}


def _report(config: RunConfig, built: Built, directory: RunDirectory, observe: Observer) -> None:
    """Write the report of a run that is complete, and stays so whatever goes wrong here."""
    experiment = built.experiment
    test = built.loaders["test"].split if "test" in built.loaders else None
    trained = LoadedModel(experiment.model, built.backbone, experiment.task, built.data)
    try:
        write_report(Subject(directory, config, experiment.phases, trained, test), REPORT_SECONDS)
    except Exception as error:
        command = f"transfer report {shlex.quote(str(directory.path))}"
        observe(Note(f"the report was not written: {error}; to try again: {command}"))


def evaluate(run: str | Path, split: str = "test", *, observe: Observer = silent) -> dict[str, float]:
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
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    loader = make_loader(config, splits[split], loaded.backbone)
    # One split is scored, so only that one is encoded and stands where the engine would have all three.
    loaders = dict.fromkeys(SPLITS, loader)
    quick = bool(directory.summary().get("quick"))
    experiment = make_experiment(config, loaded.model, loaded.task, loaded.backbone, loaders, quick=quick)
    source = experiment.features(loader, experiment.always_frozen())
    precision = config.train.precision
    return score(loaded.model, loaded.task, source, precision, observe, split, experiment.most_batches)


def predict(run: str | Path, sources: Iterable[str], *, explain: bool = False) -> Iterator[dict[str, Any]]:
    """Say what a run's model makes of some inputs, in batches, in order.

    Args:
        run: A run directory, or a model folder (an export as ``safetensors``).
        sources: For each the path of a file, a pattern of paths, or what the backbone's field is made of (a text).
        explain: Say which pieces of an input moved its score, by taking out one at a time (occlusion, Zeiler and Fergus
            2014; erasure, Li et al. 2016).

    Yields:
        ``input`` and what the task says of it (for classification ``label``, ``probability``, ``probabilities``), and
        with ``explain`` the ``explanation``: ``of`` which output (the class predicted), its ``score``, and the
        ``pieces`` in order, each with its ``change``: the score less what it is without that piece.

    Raises:
        UserError: The run is not right, an input cannot be read, or the backbone cannot take its inputs apart.
    """
    folder = find_model(run)
    loaded = read_model(folder)
    if explain and not loaded.backbone.preprocessing.explains:
        name = read_json(folder / DESCRIPTION, "there is no model here")["backbone"]["name"]
        fix = "predict without an explanation"
        raise RunError(f"backbone {name!r} does not say how to take an input apart", where=str(folder), fix=fix)
    names: list[str] = []
    for name in _expand(sources):
        names.append(name)
        if len(names) == PREDICTION_BATCH:
            yield from _predict(loaded, names, explain)
            names = []
    if names:
        yield from _predict(loaded, names, explain)


def _predict(loaded: LoadedModel, names: Sequence[str], explain: bool) -> Iterator[dict[str, Any]]:
    values = [_read(loaded.backbone.preprocessing, name) for name in names]
    outputs = outputs_of(loaded, values, lambda i: names[i] or "(empty input)")
    meanings = loaded.task.interpret(outputs)
    for name, value, output, meaning in zip(names, values, outputs, meanings, strict=True):
        explanation = {"explanation": explain_output(loaded, value, output)} if explain else {}
        yield {"input": name, **meaning, **explanation}


def _read(preprocessing: Preprocessing, source: str) -> Any:
    try:
        return preprocessing.read(source)
    except (ValueError, OSError) as error:
        what = getattr(error, "strerror", None) or error
        raise DataError(f"the input cannot be read: {what}", where=source or "(empty input)") from error


def _expand(sources: Iterable[str]) -> Iterator[str]:
    """Put the files that a pattern matches in its place; a source that is no pattern, or matches nothing, stays."""
    for source in sources:
        # A text may hold a question mark; only what matches files is a pattern.
        matches = sorted(glob.glob(os.path.expanduser(source))) if glob.has_magic(source) else []
        yield from matches or [source]


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _environment(config: RunConfig, processes: Processes) -> dict[str, Any]:
    """Return what figures may depend on beside config and data, the plugins' distributions included."""
    plugins = [c.plugin for c in (config.data, config.backbone, config.head, config.task)]
    distributions = {p.distribution: p.version for p in plugins if p.distribution != IN_PROCESS}
    return environment(_device(), distributions, processes.own.count)


def _facts(config: RunConfig, built: Built, device: str) -> dict[str, str]:
    """Say what is trained, on what and how, for a table."""
    sizes = {name: len(loader.split) for name, loader in built.loaders.items()}
    model = built.experiment.model
    total = sum(p.numel() for p in model.parameters())
    return {
        "data": f"{config.data.plugin.name}: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()),
        "classes": ", ".join(built.data.classes[:MOST_CLASSES_SHOWN])
        + (f" and {more} more" if (more := len(built.data.classes) - MOST_CLASSES_SHOWN) > 0 else ""),
        "model": f"{config.backbone.plugin.name} ({' > '.join(list(model.stages)[:-1])}) + {config.head.plugin.name}",
        "parameters": f"{total:,}",
        "phases": ", then ".join(
            f"{phase.epochs} epochs of {', '.join(dict.fromkeys(group.stage for group in phase.groups))}"
            for phase in built.experiment.phases
        ),
        "optimizer": f"{config.optimizer.name}, {config.train.step}",
        "device": device,
        **({"trackers": ", ".join(tracker.plugin.name for tracker in config.trackers)} if config.trackers else {}),
    }
