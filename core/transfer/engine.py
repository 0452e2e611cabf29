"""The one training loop, read downward: phases, epochs, steps; then the test split, once."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transfer import checkpoint, freezing
from transfer.errors import TrainingError
from transfer.events import EpochEnded, EpochStarted, EvaluationStarted, EvaluationStep, Note, Observer, StepEnded
from transfer.feature_cache import FeatureCache, Prefix, Source, source
from transfer.freezing import Frozen
from transfer.interfaces import PrimaryMetric, Task
from transfer.loading import Batch, Loader, Timed
from transfer.mixing import blend
from transfer.model import Model
from transfer.optim import Group, Schedule, TorchPart, build_optimizer
from transfer.precision import Precision, autocast
from transfer.run_directory import RunDirectory
from transfer.settings import TrainConfig

TELL_SECONDS = 0.2
"""Observers hear of steps this often: computing a metric for them waits for the device."""
QUICK_BATCHES = 3
"""Batches of each part in a quick try."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase, worked out for one model.

    Args:
        epochs: Passes over the training split, at most.
        frozen: What does not change.
        groups: What is trained, and how fast.
        scheduler: How the learning rates move, if they do.
        patience: End after so many epochs without a better validation metric.
    """

    epochs: int
    frozen: Frozen
    groups: list[Group]
    scheduler: TorchPart | None
    patience: int | None = None


@dataclass(frozen=True)
class Experiment:
    """Everything that the engine needs.

    Args:
        model: With its pretrained weights.
        task: Loss and metrics.
        train, validation, test: The splits' batches; without a test split the validation figures stand alone.
        phases: In order.
        optimizer: Which, with its options.
        settings: How to train.
        seed: Of everything random during training.
        assets: What the backbone learned from the training split, for the keys of the feature cache.
        most_batches: No more than so many batches of each part (a quick try).
    """

    model: Model
    task: Task
    train: Loader
    validation: Loader
    test: Loader | None
    phases: tuple[PhasePlan, ...]
    optimizer: TorchPart
    settings: TrainConfig
    seed: int
    assets: Mapping[str, str]
    most_batches: int | None = None

    def features(self, loader: Loader, stages: int, *, training: bool = False) -> Source:
        """Return a split's batches, from the feature cache where the first ``stages`` stages are frozen."""
        if self.most_batches is not None:
            return Source(loader, 0, {"cached": False, "why": "a quick try takes a few batches, not every example"})
        prefix = Prefix(self.model, stages, self.assets, self.settings.precision)
        cache = None
        if self.settings.cache != "off":
            limit_bytes = int(self.settings.cache_limit_gib * 2**30)
            cache = FeatureCache(limit_bytes, verify=self.settings.cache == "verify")
        mixed = training and self.settings.mix is not None
        return source(cache, prefix, loader, views=self.settings.views, mixed=mixed)

    def always_frozen(self) -> int:
        """Return how many stages, from the input on, stay frozen through all phases: the test split's prefix."""
        return min(freezing.prefix_length(self.model, phase.frozen) for phase in self.phases)


def fit(experiment: Experiment, run: RunDirectory, observe: Observer) -> dict[str, Any]:
    """Train, keep the best epoch by the validation split, score the test split once with it.

    The model ends with the weights of the best epoch. Every epoch writes a line of metrics and the checkpoint ``last``.

    Returns:
        The summary: ``best_epoch``, ``validation``, ``test``, ``parameters``, ``cache``, throughput, time and memory.

    Raises:
        TrainingError: The loss is not finite, or memory ran out.
    """
    settings, model, task = experiment.settings, experiment.model, experiment.task
    # Accelerate keeps its state for the whole process, and refuses a second run of another precision otherwise.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no" if settings.precision == "fp32" else settings.precision)
    if accelerator.num_processes > 1:
        raise TrainingError("training in several processes is not supported yet", fix="start it without a launcher")
    model.to(accelerator.device)
    average = None
    if settings.ema is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))  # type: ignore[no-untyped-call]
    scored = model if average is None else cast("Model", average.module)
    prepared_model = accelerator.prepare_model(model)
    forward = torch.compile(prepared_model) if settings.compile else prepared_model
    primary = task.primary_metric
    total_epochs = sum(phase.epochs for phase in experiment.phases)
    started, trained_seconds, waiting_seconds, trained_examples = time.perf_counter(), 0.0, 0.0, 0
    optimizer: Optimizer | None = None
    best: dict[str, Any] | None = None
    caches: list[dict[str, Any]] = []
    epoch = steps_done = 0
    still = [phase.frozen.stages if phase.frozen.batch_norm == "frozen" else frozenset() for phase in experiment.phases]
    always_frozen: frozenset[str] = frozenset.intersection(*still)

    for number, phase in enumerate(experiment.phases, 1):
        freezing.apply(model, phase.frozen)
        if average is not None:
            _hold_still(average, model, phase.frozen)
        stages = freezing.prefix_length(model, phase.frozen)
        train = experiment.features(experiment.train, stages, training=True)
        validation = experiment.features(experiment.validation, stages)
        caches += [{"phase": number, "split": "train", **train.report}]
        caches += [{"phase": number, "split": "validation", **validation.report}]
        if stages:
            observe(Note(f"phase {number}: training examples {train}; validation examples {validation}"))

        optimizer = build_optimizer(model, phase.groups, experiment.optimizer, before=optimizer)
        most = experiment.most_batches or sys.maxsize
        counts = [min(train.loader.count(epoch + ahead), most) for ahead in range(phase.epochs)]
        schedule = Schedule(
            phase.scheduler,
            optimizer,
            epochs=phase.epochs,
            steps_per_epoch=[math.ceil(batches / settings.accumulate) for batches in counts],
            warmup_epochs=0.0 if experiment.most_batches else settings.warmup_epochs,
            higher_is_better=primary.higher_is_better,
        )
        prepared_optimizer = optimizer if accelerator.scaler is None else accelerator.prepare_optimizer(optimizer)
        phase_best: dict[str, Any] | None = None

        for batches in counts:
            observe(EpochStarted(epoch + 1, total_epochs, number, len(experiment.phases), batches))
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            epoch_started = time.perf_counter()
            trained = _train_epoch(
                experiment,
                train,
                accelerator,
                forward,
                prepared_optimizer,
                schedule,
                average,
                epoch,
                steps_done,
                observe,
            )
            seconds = time.perf_counter() - epoch_started
            scores = evaluate(
                scored, task, validation, settings.precision, observe, "validation", experiment.most_batches
            )
            schedule.after_epoch(scores[primary.name])
            examples, waiting = int(trained.pop("examples")), trained.pop("waiting_seconds")
            waiting_seconds += waiting
            epoch, steps_done = epoch + 1, steps_done + batches
            trained_seconds, trained_examples = trained_seconds + seconds, trained_examples + examples
            record = {
                "phase": number,
                "epoch": epoch,
                "train": trained,
                "validation": scores,
                "lr": rates,
                "seconds": round(time.perf_counter() - epoch_started, 3),
                "examples_per_second": round(examples / seconds, 2),
                "waiting_for_data": round(waiting / seconds, 4),
            }
            improved = best is None or _better(primary, scores, best["validation"])
            if best is None or improved:
                best = {"epoch": epoch, "validation": scores}
            run.append_metrics(record)
            _save(run, model, average, optimizer, schedule, record, best, improved, always_frozen)
            observe(EpochEnded(record, improved))
            if phase_best is None or _better(primary, scores, phase_best["validation"]):
                phase_best = {"epoch": epoch, "validation": scores}
            if phase.patience is not None and epoch - phase_best["epoch"] >= phase.patience:
                observe(Note(f"phase {number} ends after epoch {epoch}: no better for {phase.patience} epochs"))
                break

    assert best is not None, "a config has at least one phase of at least one epoch"
    tensors, _ = checkpoint.load(run.checkpoints / "best")
    model.load_state_dict(tensors["model"], strict=False)  # without the stages that never changed
    test = None
    if experiment.test is not None:
        loader = experiment.features(experiment.test, experiment.always_frozen())
        caches += [{"split": "test", **loader.report}]
        test = evaluate(model, task, loader, settings.precision, observe, "test", experiment.most_batches)
    ever_trained = {name for phase in experiment.phases for group in phase.groups for name in group.parameters}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "best_epoch": best["epoch"],
        "epochs": epoch,
        "validation": best["validation"],
        "test": test,
        "primary_metric": primary.name,
        "parameters": {"total": sum(sizes.values()), "trainable": sum(sizes[name] for name in ever_trained)},
        "examples_per_second": round(trained_examples / trained_seconds, 2),
        "waiting_for_data": round(waiting_seconds / trained_seconds, 4),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "cache": caches,
        "device": str(accelerator.device),
    }


def _train_epoch(
    experiment: Experiment,
    train: Source,
    accelerator: Accelerator,
    forward: Callable[..., Tensor],
    optimizer: Any,
    schedule: Schedule,
    average: AveragedModel | None,
    epoch: int,
    steps_done: int,
    observe: Observer,
) -> dict[str, float]:
    """Train one epoch; return loss and metrics over it (as the model was at each step), examples and time waited."""
    task, settings, device = experiment.task, experiment.settings, accelerator.device
    metrics = {name: metric.to(device) for name, metric in task.metrics().items()}
    primary = task.primary_metric.name
    sizes = [len(batch) for batch in experiment.train.plan(epoch)[: experiment.most_batches]]
    experiment.model.train()
    started = told = time.perf_counter()
    examples, known, loss_sum = 0, 0, 0.0
    before: tuple[Tensor, Batch] | None = None

    batches = Timed(train.loader.epoch(epoch, most=experiment.most_batches))
    for step, on_cpu in enumerate(batches, 1):
        batch = on_cpu.to(device)
        # Dropout is a function of the seed and the step, whatever has drawn random numbers in between.
        _seed_step(device, experiment.seed, steps_done + step)
        # The batches between two steps of the optimizer weigh as one batch of all their examples.
        group = (step - 1) // settings.accumulate * settings.accumulate
        together = sum(sizes[group : group + settings.accumulate])
        with _memory(len(batch.indices)):
            inputs, mixed = batch.inputs, None
            if settings.mix is not None:
                mixed = blend(inputs, settings.mix)
                inputs = mixed.inputs
            with autocast(settings.precision, device):
                outputs = forward(inputs, train.first_stage)
            outputs = outputs.float()
            losses = task.loss(outputs, batch.targets)
            if mixed is not None:
                losses = mixed.loss(losses, task.loss(outputs, batch.targets[mixed.partners]))
            loss = losses.sum() / together
            # Without loss scaling accelerate's backward and step only add checks, at half a millisecond each.
            if accelerator.scaler is None:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                accelerator.backward(loss)
        if step % settings.accumulate == 0 or step == len(sizes):
            if settings.clip_norm is not None:
                if accelerator.scaler is not None:
                    # Of this optimizer alone: accelerate's own clipping unscales those of earlier phases with it.
                    accelerator.unscale_gradients(optimizer)
                torch.nn.utils.clip_grad_norm_(experiment.model.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.after_step()
            if average is not None:
                average.update_parameters(experiment.model)

        outputs = outputs.detach()
        for metric in metrics.values():
            metric.update(task.predictions(outputs), batch.targets)
        # .item() waits for the device, so it reads the loss of the step before, which has long been computed.
        if before is not None:
            loss_sum += _finite_sum(before, epoch, step - 1, optimizer)
            known = examples
        before = (losses.detach().sum(), batch)
        examples += len(batch.indices)
        now = time.perf_counter()
        if known and now - told >= TELL_SECONDS:
            told = now
            value = (primary, float(metrics[primary].compute()))
            observe(StepEnded(step, loss_sum / known, value, examples / (now - started)))
    assert before is not None, "a split without examples was refused when the data was read"
    loss_sum += _finite_sum(before, epoch, step, optimizer)
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    return {"loss": loss_sum / examples, **values, "examples": examples, "waiting_seconds": batches.seconds}


def evaluate(
    model: Model,
    task: Task,
    source: Source,
    precision: Precision,
    observe: Observer,
    split: str,
    most_batches: int | None = None,
) -> dict[str, float]:
    """Return the mean loss and the metrics of a split, in eval mode and without gradients."""
    device = next(model.parameters()).device
    metrics = {name: metric.to(device) for name, metric in task.metrics().items()}
    examples, loss_sum = 0, torch.zeros((), dtype=torch.float64, device=device)
    observe(EvaluationStarted(split, min(len(source.loader), most_batches or sys.maxsize)))
    model.eval()
    with torch.inference_mode():
        for step, on_cpu in enumerate(source.loader.epoch(most=most_batches), 1):
            batch = on_cpu.to(device)
            with _memory(len(batch.indices)), autocast(precision, device):
                outputs = model(batch.inputs, source.first_stage)
            outputs = outputs.float()
            loss_sum += task.loss(outputs, batch.targets).sum()
            for metric in metrics.values():
                metric.update(task.predictions(outputs), batch.targets)
            examples += len(batch.indices)
            observe(EvaluationStep(step))
    scores = {"loss": loss_sum.item() / examples, **{name: float(metric.compute()) for name, metric in metrics.items()}}
    broken = [name for name, value in scores.items() if not math.isfinite(value)]
    if broken:
        raise TrainingError(
            f"{' and '.join(broken)} of the {split} split is not finite",
            fix="look for values that are not finite in the data, or lower the learning rate",
        )
    return scores


def _hold_still(average: AveragedModel, model: Model, frozen: Frozen) -> None:
    """Give the average the frozen weights as they are: what is trained from now on is trained on top of these."""
    averaged: dict[str, Tensor] = dict(average.module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in frozen.parameters:
                averaged[name].copy_(parameter)


def _seed_step(device: torch.device, seed: int, step: int) -> None:
    """Seed the generators that a model draws from; torch.manual_seed would look for every kind of device."""
    value = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def _stage(name: str) -> str:
    """Return the stage that a parameter or buffer belongs to."""
    return name.partition(".")[0]


def _finite_sum(before: tuple[Tensor, Batch], epoch: int, step: int, optimizer: Any) -> float:
    total, batch = before
    value = total.item()
    if not math.isfinite(value):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        raise TrainingError(
            f"the loss of epoch {epoch + 1}, step {step} is {value}: learning rates {rates}, "
            f"examples {batch.indices[:16].tolist()}{'...' if len(batch.indices) > 16 else ''} of the training split",
            fix="lower the learning rate, or look at these examples; the checkpoint `best` holds the best epoch so far",
        )
    return value


@contextmanager
def _memory(examples: int) -> Iterator[None]:
    """Say what to do when memory runs out."""
    try:
        yield
    except RuntimeError as error:  # torch.cuda.OutOfMemoryError is one; the CPU's allocator raises a plain one
        if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise TrainingError(
                f"memory ran out on a batch of {examples} examples",
                fix="set a smaller train.batch_size (or train.evaluation_batch_size, or train.max_tokens)",
            ) from error
        raise


def _better(primary: PrimaryMetric, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Compare by the primary metric; where that is equal, as it often is on a small split, by the loss."""
    if new[primary.name] != old[primary.name]:
        return (new[primary.name] > old[primary.name]) == primary.higher_is_better
    return new["loss"] < old["loss"]


def _save(
    run: RunDirectory,
    model: Model,
    average: AveragedModel | None,
    optimizer: Optimizer,
    schedule: Schedule,
    record: Mapping[str, Any],
    best: Mapping[str, Any],
    improved: bool,
    always_frozen: frozenset[str],
) -> None:
    """Write the checkpoints; stages that no phase changes are in the model folder alone, not in every checkpoint."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if _stage(name) not in always_frozen}
    scored = weights
    if average is not None:
        scored = {name: tensor for name, tensor in average.module.state_dict().items() if name in weights}
    tensors, rest = checkpoint.optimizer_tensors(model, optimizer)
    state = {"epoch": record["epoch"], "phase": record["phase"], "record": record, "best": best}
    progress = {"optimizer": rest, "scheduler": schedule.state_dict()}
    parts: dict[str, Mapping[str, Tensor]] = {"model": weights, "optimizer": tensors}
    if average is not None:
        parts["average"] = scored
    checkpoint.save(run.checkpoints / "last", parts, state | progress)
    if improved:
        checkpoint.save(run.checkpoints / "best", {"model": scored}, state)


def peak_memory_bytes() -> int:
    """Return the most memory in use so far: the device's on a GPU, the process's on the CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
