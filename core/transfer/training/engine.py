"""The training engine: phases, epochs and steps, then the test split once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transfer.data.batch import Batch, TimedIterator, copied_ahead
from transfer.data.loader import Loader
from transfer.errors import TrainingError
from transfer.feature_cache.loader import StageInputs
from transfer.models.forward import explain_out_of_memory, forward_batches
from transfer.models.model import Model
from transfer.models.precision import autocast, compiled, place
from transfer.storage.checkpoint import digest
from transfer.storage.run_directory import RunDirectory
from transfer.system.signals import Interrupted, Signals
from transfer.training import evaluation, freezing, solver
from transfer.training.batch_loss import BatchLoss, BatchRecorder
from transfer.training.checkpoints import Checkpoints
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup, ProcessLostError
from transfer.training.events import EpochEnded, EpochStarted, Note, Observer, StepEnded, ignore_events
from transfer.training.experiment import Experiment, Phase
from transfer.training.mixup import mix_batch
from transfer.training.optimizer import build_optimizer, learning_rates
from transfer.training.parallel import MetricMessages, Replicas
from transfer.training.scheduler import Schedule
from transfer.training.seeding import seed_generators
from transfer.training.state import EpochSums, TrainingState
from transfer.training.summary import summarize

PROGRESS_INTERVAL_SECONDS = 0.2
"""Minimum time between two progress events: computing the metric for one waits for the device."""
MIN_CHECKPOINT_SECONDS = 2.0
"""No checkpoint is written after an epoch if the last one is younger: training again is cheaper than writing it."""


def fit(
    experiment: Experiment,
    run: RunDirectory,
    observe: Observer,
    signals: Signals,
    *,
    resume: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train an experiment, keep the best epoch by the validation split, and score the test split once with it.

    The model ends with the weights of the best epoch. Every epoch appends a line of metrics and writes the checkpoint
    ``last``, unless a checkpoint was written just before.

    Args:
        experiment: Experiment to train.
        run: Run directory.
        observe: Function that is called with every event.
        signals: Signal handlers. A signal is handled between two optimizer steps, after the state has been saved.
        resume: Whether to continue from the checkpoint ``last``.
        processes: Processes that train together. Each calls this function; only rank 0 writes the run directory.

    Returns:
        The summary: ``best_epoch``, ``validation``, ``test``, ``parameters``, ``cache``, throughput, time and memory.

    Raises:
        TrainingError: The loss is not finite, memory ran out, a checkpoint cannot be written, or a process was lost.
        RunError: The checkpoint is damaged, or does not fit the experiment.
        Interrupted: SIGINT or SIGTERM was received.
    """
    try:
        return Trainer(experiment, run, observe, signals, processes).fit(resume=resume)
    except ProcessLostError as error:
        message = error.problems[0].message
        fix = f"resume, with the same number of processes or with one: {run.resume_command}"
        raise ProcessLostError(message, fix=fix) from error


@final
class Trainer:
    """The training loop of an experiment.

    The methods are in the order in which they run: setup, :meth:`fit`, :meth:`train_phase`, :meth:`train_epoch`,
    :meth:`train_step`, :meth:`end_epoch`, checkpoints, summary. The LR finder and the batch-size search call
    :meth:`prepare_phase` and then :meth:`train_step` or :meth:`dry_run_step`; these write nothing.

    Args:
        experiment: Experiment to train. Its model is moved to the device and trained in place.
        run: Run directory, needed by :meth:`fit` only.
        observe: Function that is called with every event.
        signals: Signal handlers. None defers no signal.
        processes: Processes that train together.
    """

    # ------------------------------------------------------------------------------------------------------- setup

    def __init__(
        self,
        experiment: Experiment,
        run: RunDirectory | None = None,
        observe: Observer = ignore_events,
        signals: Signals | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.experiment, self.model, self.options = experiment, experiment.model, experiment.options
        self.device = self.options.device
        self.observe, self.processes = observe, processes
        self.signals = signals or Signals()
        place(self.model, self.device, deterministic=self.options.deterministic)
        average = None
        if self.options.ema is not None:
            ema = get_ema_multi_avg_fn(self.options.ema)  # type: ignore[no-untyped-call]
            average = AveragedModel(self.model, multi_avg_fn=ema)
        # The model that is validated and kept: the moving average if there is one.
        self.scored_model = self.model if average is None else cast("Model", average.module)
        # Only training uses the compiled model: evaluation runs the stages one by one, as the feature cache does, so
        # that cached and uncached features are the same.
        forward = compiled(self.model, self.options.compile, varied=experiment.train.preprocessing.varies_in_length)
        # Only fp16 gradients underflow; a disabled scaler passes losses and steps through.
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.precision == "fp16")
        metrics = evaluation.device_metrics(experiment.task, self.device)
        unchanged, weights = experiment.unchanged_stages(), self.model.state_dict()
        # A resumed run reads the unchanged stages from their source again: checkpoints do not contain them, so their
        # digest must be the same.
        base = {n: t for n, t in weights.items() if n in self.model.fixed or self.model.stage_of(n) in unchanged}
        origin = {**experiment.origin, "base weights": digest(base)}
        if processes.is_distributed:
            processes.require_equal({**origin, "initial weights": digest(weights)})
        self.replicas = Replicas(processes, self.model, forward, sync_batch_norm=self.options.sync_batch_norm)
        self.state = TrainingState(self.model, unchanged, origin, average, scaler, metrics)
        self.checkpoints = Checkpoints(run, self.state, self.options, processes, observe)
        self.recorder = BatchRecorder(metrics, MetricMessages(processes, self.signals, self.checkpoints))
        self.selection = experiment.selection
        self._pending: list[BatchLoss] = []  # losses of the last step, which the device may still compute
        self._has_unsaved_steps = False

    def prepare_phase(self, phase: Phase) -> None:
        """Freeze, and build the optimizer of a phase with constant learning rates: for steps outside of a run."""
        self._freeze(phase)
        optimizer = build_optimizer(self.model, phase.groups, self.experiment.optimizer, previous=None)
        constant = Schedule(None, optimizer, epochs=1, steps_per_epoch=1, higher_is_better=True)
        self.state.start_phase(optimizer, constant)
        self.model.train()

    # --------------------------------------------------------------------------------------------------------- fit

    def fit(self, *, resume: bool = False) -> dict[str, Any]:
        """Train the remaining phases, score the test split and return the summary (:func:`fit`)."""
        if resume:
            self.checkpoints.restore_last()
        with self.checkpoints:  # waits for a write in the background, also if the training is interrupted
            self._train_phases()
            return self._finish()

    def _train_phases(self) -> None:
        try:
            for number in range(self.state.progress.phase, len(self.experiment.phases) + 1):
                if reason := self.checkpoints.reason_to_stop():
                    self.observe(Note(f"phase {number} is not trained: {reason}"))
                else:
                    self.train_phase(number)
            # The last epochs may have been too short for a checkpoint each.
            if self._has_unsaved_steps:
                with self.signals.deferred():
                    self._save_checkpoint()
        except Interrupted as interruption:
            # The second Ctrl-C ends the run without writing: the user may be waiting for a full or slow disk.
            if self._has_unsaved_steps and not interruption.at_once:
                self._save_checkpoint()
            raise
        except RuntimeError as error:
            # torch raises a plain RuntimeError if the kernel kills a loader process.
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a loader process was killed, perhaps because memory ran out: {error}",
                fix=f"set fewer train.workers in a new run, or resume this one: {self.checkpoints.run.resume_command}",
            ) from error

    def train_phase(self, number: int) -> None:
        """Train the remaining epochs of a phase, counted from 1."""
        experiment, progress = self.experiment, self.state.progress
        phase = experiment.phases[number - 1]

        # ---- freeze, and compute the frozen prefix once
        self._freeze(phase)
        prefix = freezing.prefix_length(self.model, phase.frozen)
        examples = experiment.train if (steps := phase.solver == "gradient") else solver.training_examples(experiment)
        # A solved head takes all augmented views of an example in its only epoch.
        sources = {"train": self._batches_for(examples, prefix, training=steps, epochs=phase.epochs if steps else None)}
        if experiment.validation is not None:
            sources["validation"] = self._batches_for(experiment.validation, prefix)
        if progress.record_caches(number, {split: source.report for split, source in sources.items()}):
            text = "the feature cache contains other splits than before the interruption"
            self.observe(Note(f"{text}: results may differ in the last bits"))
        if prefix:
            texts = [f"{split.replace('train', 'training')} examples {source}" for split, source in sources.items()]
            self.observe(Note(f"phase {number}: {'; '.join(texts)}"))

        # ---- optimizer and schedule
        is_new = number > progress.phase  # not resumed within the phase
        first_epoch = progress.epochs - (0 if is_new else progress.phase_epochs)
        batches_per_epoch = experiment.batches_per_epoch(first_epoch, phase.epochs)
        before = None if self.state.has_group_per_stage else experiment.trained_before(number)
        previous = self.state.optimizer
        optimizer = build_optimizer(self.model, phase.groups, experiment.optimizer, previous, trained_before=before)
        schedule = Schedule(
            phase.scheduler,
            optimizer,
            epochs=phase.epochs,
            steps_per_epoch=[math.ceil(batches / self.options.accumulate) for batches in batches_per_epoch],
            warmup_epochs=self.options.warmup_epochs,
            higher_is_better=self.selection.higher_is_better,
        )
        with self.signals.deferred():  # a checkpoint contains the phase and its optimizer: both change together
            if is_new:
                progress.phase, progress.phase_epochs, progress.phase_best = number, 0, None
            self.state.start_phase(optimizer, schedule)
        self.replicas.start_phase()

        # ---- epochs
        total_epochs = sum(phase.epochs for phase in experiment.phases)
        while progress.phase_epochs < phase.epochs and not (reason := self.checkpoints.reason_to_stop(phase.patience)):
            batches = batches_per_epoch[progress.phase_epochs]
            self.observe(EpochStarted(progress.epochs + 1, total_epochs, number, len(experiment.phases), batches))
            if steps:
                self.train_epoch(sources["train"])
            else:
                with self.signals.immediate():
                    solver.solve_epoch(experiment, self.state, sources, self.processes, self.observe)
                self._has_unsaved_steps = True
            validation_started = time.perf_counter()
            scores, facts = self.validate(sources.get("validation"))
            with self.signals.deferred():
                self.end_epoch(scores, facts, time.perf_counter() - validation_started)
        if progress.phase_epochs < phase.epochs:
            self.observe(Note(f"phase {number} ends after epoch {progress.epochs}: {reason}"))

    def train_epoch(self, train: StageInputs) -> None:
        """Train the remaining batches of the current epoch."""
        experiment, progress, accumulate = self.experiment, self.state.progress, self.options.accumulate
        metrics, sums = self.state.metrics, progress.epoch
        sizes = [len(batch) for batch in experiment.train.batch_indices(progress.epochs)[: experiment.max_batches]]
        if not sums.batches:  # not resumed within the epoch
            sums.rates = learning_rates(self.state.optimizer)
            for metric in metrics.values():
                metric.reset()
        self.model.train()  # evaluation leaves it in eval mode; frozen modules stay there
        seconds_before, waiting_before, examples_before = sums.seconds, sums.waiting_seconds, sums.examples
        started = last_progress = time.perf_counter()
        shard = self.processes.shard if self.processes.is_distributed else None
        loaded = train.loader.epoch(progress.epochs, start=sums.batches, limit=len(sizes) - sums.batches, shard=shard)
        batches = TimedIterator(copied_ahead(loaded, self.device))

        for batch in batches:  # a signal may interrupt the wait for it: no step is in progress
            with self.signals.deferred():
                # ---- one optimizer step
                losses = self.train_step(
                    chain([batch], islice(batches, accumulate - 1)),
                    examples=sum(sizes[sums.batches : sums.batches + accumulate]),
                    first_stage=train.first_stage,
                )
                # The losses of the previous step are read while the device still computes this one.
                self._record_pending_loss()
                self._pending = losses
                now = time.perf_counter()
                sums.seconds = seconds_before + now - started
                sums.waiting_seconds = waiting_before + batches.seconds
                # ---- once in a while: a checkpoint within the epoch
                if self.checkpoints.is_due(sums.batches) and sums.batches < len(sizes):
                    self._save_checkpoint()
            # ---- once in a while: progress for the observers
            # The pending losses are not in the sum yet, so the mean is over the examples before them.
            pending = sum(len(loss.indices) for loss in self._pending) + self.recorder.waiting
            if now - last_progress >= PROGRESS_INTERVAL_SECONDS and (recorded := sums.examples - pending):
                last_progress = now
                value = evaluation.metric_so_far(experiment.task, metrics)
                speed = (sums.examples - examples_before) / (now - started)
                self.observe(StepEnded(sums.batches, sums.loss_sum / recorded, value, speed))
            # ---- all ranks stop after the same step if one of them received a signal
            self.signals.raise_if_any_rank_interrupted()
        self._record_pending_loss(flush=True)
        sums.seconds = seconds_before + time.perf_counter() - started

    def train_step(self, batches: Iterable[Batch], *, examples: int, first_stage: int = 0) -> list[BatchLoss]:
        """Make one optimizer step from the gradients of one or more batches.

        Args:
            batches: Batches of the step, on any device. Their gradients are accumulated.
            examples: Total number of examples in these batches, over all processes.
            first_stage: Index of the stage that takes the inputs of the batches.

        Returns:
            The loss of each batch, not yet read from the device. With several ranks, those of the last message.

        Raises:
            MemoryRanOut: Memory ran out; the error states the batch size.
        """
        state, processes, sums = self.state, self.processes, self.state.progress.epoch
        assert state.optimizer is not None
        assert state.schedule is not None
        rates, trained = learning_rates(state.optimizer), 0

        # ---- forward and backward
        for loaded in batches:
            batch = loaded.to(self.device)
            indices = batch.indices if batch.global_indices is None else batch.global_indices
            trained += len(indices)
            trace = partial(self._losses, batch, first_stage)
            with self.replicas.step(trace, is_last=trained == examples), explain_out_of_memory(len(batch.indices)):
                # Dropout depends on the seed and the batch number only: a resumed run draws the same numbers.
                number = state.progress.batches + sums.batches + 1
                seed_generators(self.device, self.experiment.seed, number, processes.rank.index)
                losses, outputs = self._losses(batch, first_stage)
                # Divided by the examples of all batches, accumulated gradients equal those of one large batch. The mean
                # of the gradients over all ranks is then their sum divided by the examples of all ranks. Only the
                # gradient of that mean is needed, not its value, which would be more operations.
                gradient = torch.full_like(losses, processes.rank.world_size / examples)
                torch.autograd.backward(losses, state.scaler.scale(gradient))

            # ---- metrics, over the examples of all ranks
            # Detached, because metrics keep their inputs: otherwise they would keep the graph of every batch alive.
            inputs = evaluation.inputs_of_metrics(self.experiment.task, outputs.detach())
            sums.batches, sums.examples = sums.batches + 1, sums.examples + len(indices)
            self.recorder.add(indices, sums.batches, rates, losses.detach(), batch.targets, inputs)

        # ---- update
        if self.options.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)  # the norm is that of the true gradients
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        # The scaler skips a step whose fp16 gradients are not finite, and then lowers its scale.
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        state.schedule.after_step()
        if state.average is not None:
            state.average.update_parameters(self.model)
        self._has_unsaved_steps = True
        return self.recorder.losses()

    def dry_run_step(self, trained: Batch, evaluated: Batch) -> None:
        """Make a training step and an evaluation step as :meth:`fit` makes them, for the batch-size search."""
        self.model.train()
        self.state.progress.epoch = EpochSums()
        for metric in self.state.metrics.values():
            metric.reset()
        # The optimizer allocates its state in the step, outside of what train_step explains.
        with explain_out_of_memory(len(trained.indices)):
            self.train_step([trained], examples=len(trained.indices))
        for _ in forward_batches(self.model, [evaluated], device=self.device, precision=self.options.precision):
            pass

    def validate(self, source: StageInputs | None) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the metrics of the validation split, and facts about them; both are empty without the split."""
        if source is None:
            return {}, {}
        sample = evaluation.metric_sample(self.experiment.task, self.selection, self.device)
        scores = self._evaluate(self.scored_model, source, "validation", sample=sample)
        return scores, {} if sample is None else sample.facts()

    def end_epoch(self, scores: dict[str, float], facts: Mapping[str, Any], validation_seconds: float) -> None:
        """Record a validated epoch, and write its checkpoints and its line of metrics."""
        state, progress, selection = self.state, self.state.progress, self.selection
        assert state.schedule is not None
        state.schedule.after_epoch(scores.get(selection.metric, math.nan))
        train_metrics = {name: float(metric.compute()) for name, metric in state.metrics.items()}
        record, improved = progress.end_epoch(train_metrics, scores, validation_seconds, selection, facts)
        is_due = self.options.checkpoint.every_steps or self.checkpoints.age >= MIN_CHECKPOINT_SECONDS
        self._save_checkpoint(best=improved, last=bool(is_due))
        if self.processes.is_main:
            self.checkpoints.run.append_metrics(record)
        self.observe(EpochEnded(record, improved))

    def _save_checkpoint(self, *, best: bool = False, last: bool = True) -> None:
        """Write the checkpoint ``last``, ``best``, or both."""
        self._record_pending_loss(flush=True)
        self.checkpoints.save(best=best, last=last)
        self._has_unsaved_steps = self._has_unsaved_steps and not last

    # ----------------------------------------------------------------------------------------- parts of these methods

    def _freeze(self, phase: Phase) -> None:
        freezing.apply(self.model, phase.frozen)
        if self.state.average is not None:
            # The averaged head is evaluated on the backbone that it is trained with.
            freezing.copy_frozen(self.model, self.state.average.module, phase.frozen)

    def _batches_for(
        self, loader: Loader, stages: int, *, training: bool = False, epochs: int | None = None
    ) -> StageInputs:
        """Return the batches of a split. Local rank 0 fills the feature cache, then the other ranks read it."""
        with self.signals.immediate(), self.processes.local_main_first():
            return self.experiment.batches_for(loader, stages, training=training, epochs=epochs, observe=self.observe)

    def _losses(self, batch: Batch, first_stage: int) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) and the outputs (B, out_features) of a batch, float32."""
        task, inputs, mixed = self.experiment.task, batch.inputs, None
        if self.options.mix is not None:
            mixed = mix_batch(inputs, self.options.mix)
            inputs = mixed.inputs
        with autocast(self.options.precision, self.device):
            outputs = self.replicas.forward(inputs, first_stage)
        # Losses are computed in float32: exponentials and sums over classes lose too much in 16 bits.
        outputs = outputs.float()
        losses = task.loss(outputs, batch.targets)
        if mixed is not None:
            # The loss of a mixture is the mixture of the losses, which works for any task.
            losses = mixed.loss(losses, task.loss(outputs, batch.targets[mixed.permutation]))
        if batch.global_indices is not None:
            # A rank without a shard computes a few examples of another one, which must not count.
            losses = losses[: self.processes.shard_size(len(batch.global_indices))]
        return losses, outputs

    def _record_pending_loss(self, *, flush: bool = False) -> None:
        """Add the losses of the previous step to the sum of the epoch, or raise TrainingError for one not finite."""
        pending, self._pending, progress = self._pending, [], self.state.progress
        for loss in [*pending, *(self.recorder.losses(flush=True) if flush else [])]:
            progress.epoch.loss_sum += loss.finite_item(progress.epochs + 1)

    def _evaluate(self, model: Model, source: StageInputs, split: str, **collected: Any) -> dict[str, float]:
        task, precision, limit = self.experiment.task, self.options.precision, self.experiment.max_batches
        collected |= {"processes": self.processes, "signals": self.signals}
        return evaluation.evaluate(model, task, source, precision, self.observe, split, limit, **collected)

    # ------------------------------------------------------------------------------------------------------ summary

    def _finish(self) -> dict[str, Any]:
        """Load the weights of the best epoch, score the test split with them and return the summary."""
        experiment, progress = self.experiment, self.state.progress
        best = self.checkpoints.load_best()
        self.model.eval()  # also without a test split: the report and the saved model use it
        caches, test, predictions = progress.caches, None, None
        if experiment.test is not None:
            source = self._batches_for(experiment.test, experiment.frozen_prefix_length())
            caches = [*caches, {"split": "test", **source.report}]
            # A quick run scores a few batches only, so its predictions would not fit the split.
            collects = self.processes.is_main and experiment.max_batches is None
            collector = evaluation.PredictionCollector() if collects else None
            test = self._evaluate(self.model, source, "test", collector=collector)
            if collector is not None:
                self.checkpoints.run.write_predictions(scored := collector.in_order_of(experiment.test.split))
                predictions = scored.predictions
        return summarize(experiment, progress, best, test, predictions, caches=caches, seconds=self.checkpoints.seconds)
