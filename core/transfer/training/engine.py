"""The one training loop, read downward: phases, epochs, steps; then the test split, once."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transfer.data.batch import Batch, TimedIterator
from transfer.data.loader import Loader
from transfer.errors import TrainingError
from transfer.feature_cache.loader import StageInputs
from transfer.interfaces import PrimaryMetric
from transfer.models.forward import explain_out_of_memory
from transfer.models.model import BATCH_NORM, Model
from transfer.models.precision import autocast
from transfer.storage import checkpoint
from transfer.storage.run_directory import Predictions, RunDirectory
from transfer.system.memory import peak_memory_bytes
from transfer.system.signals import Interrupted, Signals
from transfer.training import freezing
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup, ProcessLostError
from transfer.training.evaluation import device_metrics, evaluate
from transfer.training.events import (
    EpochEnded,
    EpochStarted,
    Note,
    Observer,
    StepEnded,
)
from transfer.training.experiment import Experiment, Phase
from transfer.training.freezing import Frozen
from transfer.training.mixup import mix_batch
from transfer.training.optimizer import build_optimizer
from transfer.training.scheduler import Schedule
from transfer.training.state import EpochSums, Progress, TrainingState

PROGRESS_INTERVAL_SECONDS = 0.2
"""Observers hear of steps this often: computing a metric for them waits for the device."""
MIN_CHECKPOINT_SECONDS = 2.0
"""So much training is done again sooner than it is worth a checkpoint: shorter epochs do not each end with one."""


@dataclass
class _Training:
    """What the steps of the loop share.

    Args:
        experiment, run, observe, signals, processes, device: As handed to :func:`fit`, or made by it.
        forward: The model, compiled where that is wanted.
        state: All that training changes.
        scored: The model that is validated: the moving average where there is one.
        seconds_before: Of the run, in the processes before this one.
    """

    experiment: Experiment
    run: RunDirectory
    observe: Observer
    signals: Signals
    processes: ProcessGroup
    device: torch.device
    forward: Callable[..., Tensor]
    state: TrainingState
    scored: Model
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.monotonic)
    unsaved: bool = False
    pending: tuple[Tensor, npt.NDArray[np.int64]] | None = None

    @property
    def seconds(self) -> float:
        """Of the run so far."""
        return self.seconds_before + time.perf_counter() - self.started

    def features(self, loader: Loader, stages: int, *, training: bool = False) -> StageInputs:
        """Return a split's batches; of several processes the first of each machine fills the feature cache."""
        with self.signals.immediate(), self.processes.local_main_first():
            return self.experiment.batches_for(loader, stages, training=training)


def fit(
    experiment: Experiment,
    run: RunDirectory,
    observe: Observer,
    signals: Signals,
    *,
    resume: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train, keep the best epoch by the validation split, score the test split once with it.

    The model ends with the weights of the best epoch. Every epoch writes a line of metrics and, unless one was written
    just before, the checkpoint ``last``.

    Args:
        experiment: What to train.
        run: Where the run is written.
        observe: Is told what happens.
        signals: Are heard between two steps of the optimizer; the state is saved then.
        resume: Go on from the checkpoint ``last``.
        processes: That train together; each calls this function, and the first one alone writes the run.

    Returns:
        The summary: ``best_epoch``, ``validation``, ``test``, ``parameters``, ``cache``, throughput, time and memory.

    Raises:
        TrainingError: The loss is not finite, memory ran out, a checkpoint cannot be written, or another process is
            gone.
        RunError: The checkpoint is damaged, or does not fit the experiment.
        Interrupted: A signal came.
    """
    try:
        training = _prepare(experiment, run, observe, signals, processes)
        if resume:
            _restore(training)
        return _train(training)
    except ProcessLostError as error:
        message = error.problems[0].message
        raise ProcessLostError(
            message, fix=f"go on, in as many processes or in one, with: {run.resume_command}"
        ) from error


def _train(training: _Training) -> dict[str, Any]:
    """Run what is left of the phases, and score the test split."""
    experiment, run = training.experiment, training.run
    try:
        for number in range(training.state.progress.phase, len(experiment.phases) + 1):
            _train_phase(training, number)
        if training.unsaved:
            with training.signals.deferred():
                _save(training)
    except Interrupted as interruption:
        if training.unsaved and not interruption.at_once:
            _save(training)
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a loader process was killed, perhaps because memory ran out: {error}",
            fix=f"set fewer train.workers in another run, or go on as it was with: {run.resume_command}",
        ) from error
    return _finish(training)


def _prepare(
    experiment: Experiment, run: RunDirectory, observe: Observer, signals: Signals, processes: ProcessGroup
) -> _Training:
    """Put the model on its device and what training changes beside it."""
    options, model = experiment.options, experiment.model
    device = experiment.options.device
    model.to(device)
    average = None
    if options.ema is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))  # type: ignore[no-untyped-call]
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    metrics = device_metrics(experiment.task, device)
    unchanged = experiment.unchanged_stages()
    base = {name: tensor for name, tensor in model.state_dict().items() if model.stage_of(name) in unchanged}
    origin = {**experiment.origin, "base weights": checkpoint.digest(base)}
    if processes.is_distributed:
        processes.require_equal({**origin, "initial weights": checkpoint.digest(model.state_dict())})
    return _Training(
        experiment,
        run,
        observe,
        signals,
        processes,
        device,
        torch.compile(model) if options.compile else model,
        TrainingState(model, unchanged, origin, average, scaler, metrics),
        model if average is None else cast("Model", average.module),
    )


def _restore(training: _Training) -> None:
    """Go back to the newest checkpoint that is whole; where none was written yet, to the beginning."""
    run, state, observe = training.run, training.state, training.observe
    folder, processes = run.checkpoints / "last", training.processes
    # Only the first process need see the run directory.
    found = processes.broadcast_object(lambda: checkpoint.load(folder) if checkpoint.exists(folder) else None)
    if found is not None:
        recovered = state.restore(*found, folder)
        if recovered is not None:
            observe(Note(f"the checkpoint before is used, because the newest is damaged: {recovered}"))
        progress = state.progress
        observe(Note(f"goes on after epoch {progress.epochs}, and batch {progress.epoch.batches} of the next"))
    else:
        observe(Note("no checkpoint was written yet: begins again"))
    training.seconds_before = state.progress.seconds
    if not processes.is_main:
        return
    repaired = run.restore_metrics(state.progress.records)
    if repaired is not None:
        observe(Note(repaired))


def _train_phase(training: _Training, number: int) -> None:
    experiment, state, observe = training.experiment, training.state, training.observe
    options, model, progress = experiment.options, experiment.model, state.progress
    phase, primary = experiment.phases[number - 1], experiment.task.primary_metric
    freezing.apply(model, phase.frozen)
    if state.average is not None:
        _hold_still(state.average, model, phase.frozen)
    stages = freezing.prefix_length(model, phase.frozen)
    train = training.features(experiment.train, stages, training=True)
    validation = training.features(experiment.validation, stages)
    _report_caches(training, number, train, validation)
    if stages:
        observe(Note(f"phase {number}: training examples {train}; validation examples {validation}"))

    optimizer = build_optimizer(model, phase.groups, experiment.optimizer, previous=state.optimizer)
    begins = number > progress.phase
    most, first = experiment.max_batches or sys.maxsize, progress.epochs - (0 if begins else progress.phase_epochs)
    counts = [min(train.loader.count(first + ahead), most) for ahead in range(phase.epochs)]
    schedule = Schedule(
        phase.scheduler,
        optimizer,
        epochs=phase.epochs,
        steps_per_epoch=[math.ceil(batches / options.accumulate) for batches in counts],
        warmup_epochs=options.warmup_epochs,
        higher_is_better=primary.higher_is_better,
    )
    with training.signals.deferred():  # a checkpoint names the phase whose optimizer it holds
        if begins:
            progress.phase, progress.phase_epochs, progress.phase_best = number, 0, None
        state.begin_phase(optimizer, schedule)
    total_epochs = sum(phase.epochs for phase in experiment.phases)

    while progress.phase_epochs < phase.epochs and not _gives_up(progress, phase.patience):
        batches = counts[progress.phase_epochs]
        observe(EpochStarted(progress.epochs + 1, total_epochs, number, len(experiment.phases), batches))
        _train_epoch(training, train, optimizer)
        validation_started = time.perf_counter()
        scores = evaluate(
            training.scored,
            experiment.task,
            validation,
            options.precision,
            observe,
            "validation",
            experiment.max_batches,
            processes=training.processes,
            signals=training.signals,
        )
        with training.signals.deferred():
            _end_epoch(training, scores, time.perf_counter() - validation_started)
    if progress.phase_epochs < phase.epochs:
        observe(Note(f"phase {number} ends after epoch {progress.epochs}: no better for {phase.patience} epochs"))


def _train_epoch(training: _Training, train: StageInputs, optimizer: Any) -> None:
    """Train what is left of the epoch that is going on."""
    experiment, progress, signals = training.experiment, training.state.progress, training.signals
    metrics, primary = training.state.metrics, experiment.task.primary_metric.name
    options, sums = experiment.options, progress.epoch
    sizes = [len(batch) for batch in experiment.train.batch_indices(progress.epochs)[: experiment.max_batches]]
    if not sums.batches:
        sums.rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        for metric in metrics.values():
            metric.reset()
    experiment.model.train()
    seconds_before, waiting_before, examples_before = sums.seconds, sums.waiting_seconds, sums.examples
    started = told = time.perf_counter()
    left = len(sizes) - sums.batches
    share = training.processes.shard if training.processes.is_distributed else None
    batches = TimedIterator(train.loader.epoch(progress.epochs, first=sums.batches, most=left, share=share))

    for batch in batches:  # waiting for it may be interrupted: nothing is half done then
        with signals.deferred():
            _optimizer_step(
                training, train.first_stage, optimizer, chain([batch], islice(batches, options.accumulate - 1)), sizes
            )
            now = time.perf_counter()
            sums.seconds = seconds_before + now - started
            sums.waiting_seconds = waiting_before + batches.seconds
            if _save_is_due(training, sums.batches) and sums.batches < len(sizes):
                _save(training)
        known = sums.examples - (len(training.pending[1]) if training.pending else 0)
        if known and now - told >= PROGRESS_INTERVAL_SECONDS:
            told = now
            value = (primary, float(metrics[primary].compute()))
            speed = (sums.examples - examples_before) / (now - started)
            training.observe(StepEnded(sums.batches, sums.loss_sum / known, value, speed))
        signals.raise_if_any_rank_interrupted()
    _settle(training)
    sums.seconds = seconds_before + time.perf_counter() - started


def _optimizer_step(
    training: _Training, first_stage: int, optimizer: Any, batches: Iterable[Batch], sizes: Sequence[int]
) -> None:
    """Make one step of the optimizer from the gradients of one or more batches, and count them."""
    experiment, device, state = training.experiment, training.device, training.state
    processes, model = training.processes, experiment.model
    options, task, sums = experiment.options, experiment.task, state.progress.epoch
    # The batches between two steps of the optimizer weigh as one batch of all their examples.
    together = sum(sizes[sums.batches : sums.batches + options.accumulate])
    for on_cpu in batches:
        batch = on_cpu.to(device)
        # Dropout is a function of the seed and the batch, whatever has drawn random numbers in between.
        _seed_step(device, experiment.seed, state.progress.batches + sums.batches + 1, processes.rank.index)
        with explain_out_of_memory(len(batch.indices)):
            inputs, mixed = batch.inputs, None
            if options.mix is not None:
                mixed = mix_batch(inputs, options.mix)
                inputs = mixed.inputs
            with autocast(options.precision, device):
                outputs = training.forward(inputs, first_stage)
            outputs = outputs.float()
            losses = task.loss(outputs, batch.targets)
            if mixed is not None:
                losses = mixed.loss(losses, task.loss(outputs, batch.targets[mixed.permutation]))
            if batch.global_indices is not None:
                losses = losses[: processes.shard_size(len(batch.global_indices))]
            loss = losses.sum() / together
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        losses, predictions = losses.detach(), task.predictions(outputs.detach())
        targets, indices = batch.targets, batch.indices
        if batch.global_indices is not None:
            indices = batch.global_indices
            losses, predictions, targets = processes.gather(len(indices), losses, predictions, targets)
        for metric in state.metrics.values():
            metric.update(predictions, targets)
        # .item() waits for the device, so it reads the loss of the batch before, which has long been computed.
        _settle(training)
        training.pending = (losses.sum(), indices)
        sums.batches, sums.examples = sums.batches + 1, sums.examples + len(indices)

    if processes.is_distributed:
        # Running statistics move by a linear rule: the mean of the processes' is that of their batches' statistics.
        norms = [module for module in model.modules() if isinstance(module, BATCH_NORM) and module.training]
        statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
        processes.all_reduce([parameter for parameter in model.parameters() if parameter.requires_grad], statistics)
    if options.clip_norm is not None:
        state.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
    state.scaler.step(optimizer)
    state.scaler.update()
    optimizer.zero_grad()
    assert state.schedule is not None
    state.schedule.after_step()
    if state.average is not None:
        state.average.update_parameters(model)
    training.unsaved = True


def rehearse(experiment: Experiment, phase: Phase) -> Callable[[Batch, Batch], None]:
    """Return a function that makes a training step of a phase as :func:`fit` does, and evaluates another batch.

    The experiment's model is trained, and nothing is written. The function raises MemoryRanOut.
    """
    training = _prepare(experiment, RunDirectory(Path()), lambda _: None, Signals(), SINGLE_PROCESS)
    model, device = experiment.model, training.device
    freezing.apply(model, phase.frozen)
    optimizer = build_optimizer(model, phase.groups, experiment.optimizer, previous=None)
    training.state.begin_phase(optimizer, Schedule(None, optimizer, epochs=1, steps_per_epoch=1, higher_is_better=True))

    def step(trained: Batch, evaluated: Batch) -> None:
        model.train()
        training.pending, training.state.progress.epoch = None, EpochSums()
        for metric in training.state.metrics.values():
            metric.reset()
        with explain_out_of_memory(len(trained.indices)):
            _optimizer_step(training, 0, optimizer, [trained], [len(trained.indices)])
        model.eval()
        with (
            explain_out_of_memory(len(evaluated.indices)),
            torch.inference_mode(),
            autocast(experiment.options.precision, device),
        ):
            model(evaluated.to(device).inputs, 0)

    return step


def _end_epoch(training: _Training, scores: dict[str, float], validation_seconds: float) -> None:
    """Count a validated epoch, write its checkpoints and its line of metrics."""
    experiment, run, state = training.experiment, training.run, training.state
    progress, sums, primary = state.progress, state.progress.epoch, experiment.task.primary_metric
    assert state.schedule is not None
    state.schedule.after_epoch(scores[primary.name])
    trained = {name: float(metric.compute()) for name, metric in state.metrics.items()}
    record = {
        "phase": progress.phase,
        "epoch": progress.epochs + 1,
        "train": {"loss": sums.loss_sum / sums.examples, **trained},
        "validation": scores,
        "lr": sums.rates,
        "seconds": round(sums.seconds + validation_seconds, 3),
        "examples_per_second": round(sums.examples / sums.seconds, 2),
        "waiting_for_data": round(sums.waiting_seconds / sums.seconds, 4),
    }
    progress.records.append(record)
    progress.phase_epochs += 1
    progress.batches += sums.batches
    progress.trained_examples += sums.examples
    progress.trained_seconds += sums.seconds
    progress.waiting_seconds += sums.waiting_seconds
    progress.epoch = EpochSums()
    reached = {"epoch": progress.epochs, "validation": scores}
    improved = progress.best is None or _better(primary, scores, progress.best["validation"])
    if progress.phase_best is None or _better(primary, scores, progress.phase_best["validation"]):
        progress.phase_best = reached
    if improved:
        progress.best = reached
        if training.processes.is_main:
            # Before `last`, which names it: killed in between, the epoch is trained again and ends the same.
            state.save_best(run.checkpoints / "best")
    if experiment.options.checkpoint.every_steps or time.monotonic() - training.saved >= MIN_CHECKPOINT_SECONDS:
        _save(training)
    if training.processes.is_main:
        run.append_metrics(record)
    training.observe(EpochEnded(record, improved))


def _save(training: _Training) -> None:
    """Write the checkpoint ``last``."""
    _settle(training)
    training.state.progress.seconds = training.seconds
    if training.processes.is_main:
        training.state.save(training.run.checkpoints / "last", training.experiment.options.checkpoint.keep)
    training.saved, training.unsaved = time.monotonic(), False


def _save_is_due(training: _Training, batches: int) -> bool:
    options = training.experiment.options
    every = options.checkpoint.every_steps
    if every is not None and batches // options.accumulate % every == 0:
        return True
    minutes = options.checkpoint.every_minutes
    return minutes is not None and time.monotonic() - training.saved >= 60 * minutes


def _gives_up(progress: Progress, patience: int | None) -> bool:
    best = progress.phase_best
    return patience is not None and best is not None and progress.epochs - int(best["epoch"]) >= patience


def _report_caches(training: _Training, number: int, train: StageInputs, validation: StageInputs) -> None:
    """Note what of a phase is cached; a run that goes on should find what it found before."""
    progress = training.state.progress
    found = [
        {"phase": number, "split": "train", **train.report},
        {"phase": number, "split": "validation", **validation.report},
    ]
    before = [report for report in progress.caches if report["phase"] == number]
    if before and [report["cached"] for report in before] != [report["cached"] for report in found]:
        text = "the feature cache holds other splits than before the interruption: results may differ in the last bits"
        training.observe(Note(text))
    progress.caches = [report for report in progress.caches if report["phase"] < number] + found


def _finish(training: _Training) -> dict[str, Any]:
    """Score the test split with the best epoch's weights, and sum up."""
    experiment, progress, processes = training.experiment, training.state.progress, training.processes
    model, task = experiment.model, experiment.task
    tensors, best = processes.broadcast_object(lambda: checkpoint.load(training.run.checkpoints / "best"))
    if progress.best is None or best["epoch"] != progress.best["epoch"]:
        text = f"the weights of the best epoch are damaged: those of epoch {best['epoch']} are taken"
        training.observe(Note(f"{text}: {best.get('recovered')}"))
    model.load_state_dict(tensors["model"], strict=False)  # without the stages that never changed
    caches, test = progress.caches, None
    if experiment.test is not None:
        loader = training.features(experiment.test, experiment.frozen_prefix_length())
        caches = [*caches, {"split": "test", **loader.report}]
        kept: list[tuple[Tensor, ...]] = []
        precision, most = experiment.options.precision, experiment.max_batches
        test = evaluate(
            model,
            task,
            loader,
            precision,
            training.observe,
            "test",
            most,
            kept if processes.is_main else None,
            processes=processes,
            signals=training.signals,
        )
        if most is None and processes.is_main:
            indices, *found = (torch.cat(parts) for parts in zip(*kept, strict=True))
            order = indices.argsort()
            training.run.write_predictions(Predictions(*(tensor[order] for tensor in found)))
    ever_trained = {name for phase in experiment.phases for group in phase.groups for name in group.parameters}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "best_epoch": best["epoch"],
        "epochs": progress.epochs,
        "validation": best["validation"],
        "test": test,
        "primary_metric": task.primary_metric.name,
        "parameters": {"total": sum(sizes.values()), "trainable": sum(sizes[name] for name in ever_trained)},
        "examples_per_second": round(progress.trained_examples / progress.trained_seconds, 2),
        "waiting_for_data": round(progress.waiting_seconds / progress.trained_seconds, 4),
        "seconds": round(training.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(training.device),
        "cache": caches,
        "device": str(training.device),
    }


def _hold_still(average: AveragedModel, model: Model, frozen: Frozen) -> None:
    """Give the average the frozen weights as they are: what is trained from now on is trained on top of these."""
    averaged: dict[str, Tensor] = dict(average.module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in frozen.parameters:
                averaged[name].copy_(parameter)


def _seed_step(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Seed the generators that a model draws from; torch.manual_seed would look for every kind of device."""
    parts = (seed, step, rank) if rank else (seed, step)
    value = int(np.random.SeedSequence(parts).generate_state(1)[0])
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        # torch.cuda.manual_seed seeds the current device, which need not be this one.
        torch.cuda.default_generators[device.index].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def _settle(training: _Training) -> None:
    """Add the loss of the batch before to the sum, and stop where it is not finite."""
    if training.pending is None:
        return
    (total, indices), training.pending = training.pending, None
    value, progress = total.item(), training.state.progress
    if not math.isfinite(value):
        assert training.state.optimizer is not None
        rates = {group["name"]: group["lr"] for group in training.state.optimizer.param_groups}
        raise TrainingError(
            f"the loss of epoch {progress.epochs + 1}, step {progress.epoch.batches} is {value}: "
            f"learning rates {rates}, "
            f"examples {indices[:16].tolist()}{'...' if len(indices) > 16 else ''} of the training split",
            fix="lower the learning rate, or look at these examples"
            + ("; the checkpoint `best` holds the best epoch so far" if progress.epochs else ""),
        )
    progress.epoch.loss_sum += value


def _better(primary: PrimaryMetric, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Compare by the primary metric; where that is equal, as it often is on a small split, by the loss."""
    if new[primary.name] != old[primary.name]:
        return (new[primary.name] > old[primary.name]) == primary.higher_is_better
    return new["loss"] < old["loss"]
