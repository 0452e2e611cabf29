"""The state of a run: everything that training changes, saved in checkpoints and restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from transfer.errors import RunError, TrainingError, damaged
from transfer.models.model import Model
from transfer.storage.run_directory import EpochRecord
from transfer.storage.tensor_files import Tensors, require_same_layout
from transfer.system.file_schema import FileSchema, checked
from transfer.training import optimizer_state
from transfer.training.scheduler import Schedule
from transfer.training.selection import Selection

if TYPE_CHECKING:
    from torchmetrics import Metric

_FIX_MISMATCH = "restore the original files, or start a new run with: transfer run"
_MISMATCH = "the checkpoint does not fit the run"

Count = Annotated[int, Field(ge=0, le=2**62)]
Contents = tuple[Mapping[str, Tensors], dict[str, Any]]
"""Contents of a checkpoint: tensors by file, and plain data."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class EpochSums:
    """Counts and sums over the current epoch.

    Args:
        batches: Number of trained batches.
        examples: Number of examples in these batches.
        loss_sum: Sum of the losses of these examples.
        seconds: Training time in seconds.
        waiting_seconds: Part of the training time that was spent waiting for data, in seconds.
        rates: Learning rates at the start of the epoch, by stage.
        l2: Strength of the L2 penalty of a solved head; None for an epoch of gradient steps.
    """

    batches: Count = 0
    examples: Count = 0
    loss_sum: float = 0.0
    seconds: Seconds = 0.0
    waiting_seconds: Seconds = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    l2: float | None = None


@dataclass
class Progress:
    """Counts and results of a run, plain JSON.

    Args:
        phase: Number of the current phase, from 1.
        phase_epochs: Number of completed epochs of the current phase.
        batches: Number of trained batches of all completed epochs.
        trained_examples: Number of trained examples of all completed epochs.
        trained_seconds: Training time of all completed epochs, without validation, in seconds.
        waiting_seconds: Time spent waiting for data in all completed epochs, in seconds.
        seconds: Duration of the run over all its processes, in seconds.
        records: Lines of ``metrics.jsonl``.
        best: Number and validation metrics of the best epoch of the run.
        phase_best: Number and validation metrics of the best epoch of the current phase.
        caches: Report of the feature cache for each split of each phase.
        epoch: Counts and sums over the current epoch.
    """

    phase: Annotated[int, Field(ge=1)] = 1
    phase_epochs: Count = 0
    batches: Count = 0
    trained_examples: Count = 0
    trained_seconds: Seconds = 0.0
    waiting_seconds: Seconds = 0.0
    seconds: Seconds = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    phase_best: dict[str, Any] | None = None
    caches: list[dict[str, Any]] = field(default_factory=list)
    epoch: EpochSums = field(default_factory=EpochSums)

    @property
    def epochs(self) -> int:
        """Number of completed epochs."""
        return len(self.records)

    def end_epoch(
        self,
        train_metrics: Mapping[str, float],
        validation: dict[str, float],
        validation_seconds: float,
        selection: Selection,
        facts: Mapping[str, Any],
    ) -> tuple[dict[str, Any], bool]:
        """Add the current epoch to the totals and to the records.

        Args:
            train_metrics: Metrics over the trained examples of the epoch.
            validation: Loss and metrics of the validation split.
            validation_seconds: Duration of the validation in seconds.
            selection: Rule that selects the best epoch.
            facts: Further entries of the record (:meth:`transfer.training.selection.MetricSample.facts`).

        Returns:
            The line of ``metrics.jsonl``, and whether the epoch is the best one so far.
        """
        sums, self.epoch = self.epoch, EpochSums()
        record = {
            "phase": self.phase,
            "epoch": self.epochs + 1,
            "train": {"loss": sums.loss_sum / sums.examples, **train_metrics},
            "validation": validation,
            "lr": sums.rates,
            **({} if sums.l2 is None else {"l2": sums.l2}),
            "seconds": round(sums.seconds + validation_seconds, 3),
            "examples_per_second": round(sums.examples / sums.seconds, 2),
            "waiting_for_data": round(sums.waiting_seconds / sums.seconds, 4),
            **facts,
        }
        self.records.append(record)
        self.phase_epochs += 1
        self.batches += sums.batches
        self.trained_examples += sums.examples
        self.trained_seconds += sums.seconds
        self.waiting_seconds += sums.waiting_seconds
        reached = {"epoch": self.epochs, "validation": validation}
        improved = self.best is None or selection.keeps_last or selection.is_better(self.records, self.best["epoch"])
        if improved:
            self.best = reached
        # Patience counts within a phase: a new phase may start worse than the one before it ended.
        of_phase = self.records[-self.phase_epochs :]
        if self.phase_best is None or not validation or selection.is_better(of_phase, self.phase_best["epoch"]):
            self.phase_best = reached
        return record, improved

    def reason_to_stop(self, patience: int | None, seconds_left: float) -> str | None:
        """Return the reason for which the phase ends before its last epoch, or None.

        Args:
            patience: Number of epochs without a better one after which the phase ends. None disables early stopping.
            seconds_left: Time that is left for training, in seconds. Another epoch is expected to last as long as the
                last one. The first epoch of a run is always trained.
        """
        if patience is not None and self.phase_best is not None and self.epochs - self.phase_best["epoch"] >= patience:
            return f"no better for {patience} epochs"
        if self.records and seconds_left < self.records[-1]["seconds"]:
            return "another epoch would end after train.max_minutes"
        return None

    def record_caches(self, phase: int, reports: Mapping[str, Mapping[str, Any]]) -> bool:
        """Record the cache reports of a phase; return whether the phase was interrupted with other splits cached.

        Args:
            phase: Number of the phase, from 1.
            reports: Report of the feature cache for each split.
        """
        # A phase that was interrupted has recorded its caches already: these records are replaced.
        before = [report["cached"] for report in self.caches if report["phase"] == phase]
        self.caches = [report for report in self.caches if report["phase"] < phase]
        self.caches += [{"phase": phase, "split": split, **report} for split, report in reports.items()]
        return bool(before) and before != [report["cached"] for report in reports.values()]


class _BestEpoch(FileSchema):
    epoch: Count
    validation: dict[str, float]


class _CacheReport(FileSchema):
    phase: int
    split: str
    cached: bool


class _MetricUpdates(FileSchema):
    updates: Count
    lengths: dict[str, Count]


class _CheckpointState(FileSchema):
    """The file ``state.json`` of the checkpoint ``last``."""

    origin: dict[str, str]
    progress: Progress
    optimizer: dict[str, bool | int | float | str | None]
    groups: list[dict[str, Any]]
    schedule: dict[str, Any]
    metric_updates: dict[str, _MetricUpdates]
    scaler: dict[str, float] | None


class BestCheckpointState(_BestEpoch):
    """The file ``state.json`` of the checkpoint ``best``."""


@dataclass
class TrainingState:
    """Everything that training changes.

    Between two optimizer steps the state is complete: gradients are zero, and random numbers are a function of the seed
    and the counts in ``progress``.

    Args:
        model: Model that is trained.
        unchanged: Names of the stages that no phase changes. Checkpoints leave them out.
        origin: Digests of the inputs of the run. A checkpoint is restored only into a run with the same digests.
        average: Exponential moving average of the model. None if ``train.ema`` is not set.
        scaler: Gradient scaler, enabled in fp16 only.
        metrics: Metrics over the trained examples of the current epoch.
        progress: Counts and results.
        optimizer: Optimizer of the current phase. None before the first phase.
        schedule: Learning-rate schedule of the current phase. None before the first phase.
    """

    model: Model
    unchanged: frozenset[str]
    origin: Mapping[str, str]
    average: AveragedModel | None
    scaler: torch.amp.GradScaler
    metrics: dict[str, Metric]
    progress: Progress = field(default_factory=Progress)
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    # A restored checkpoint whose optimizer and schedule wait for the start of their phase.
    _restored: tuple[Mapping[str, Tensors], _CheckpointState, Path] | None = None

    @property
    def has_group_per_stage(self) -> bool:
        """Whether a restored checkpoint has a parameter group for each stage, as the first versions wrote them."""
        return self._restored is not None and not all("stages" in group for group in self._restored[1].groups)

    def start_phase(self, optimizer: Optimizer, schedule: Schedule) -> None:
        """Set the optimizer and the schedule of a phase; load their state if a checkpoint was restored."""
        if self._restored is not None:
            (tensors, state, folder), self._restored = self._restored, None
            with damaged(_MISMATCH, str(folder), _FIX_MISMATCH):
                optimizer_state.load_optimizer(
                    self.model, optimizer, tensors["optimizer"], state.optimizer, state.groups, str(folder)
                )
                schedule.load_state_dict(state.schedule)
        self.optimizer, self.schedule = optimizer, schedule

    def contents(self) -> Contents:
        """Return the contents of a checkpoint from which the run can resume. The tensors are not copied."""
        assert self.optimizer is not None
        assert self.schedule is not None
        optimizer_tensors, optimizer_values = optimizer_state.optimizer_tensors(self.model, self.optimizer)
        updates, metric_tensors = _metric_states(self.metrics)
        tensors: dict[str, Tensors] = {
            "model": self.changed_weights(self.model),
            "optimizer": optimizer_tensors,
            "metrics": metric_tensors,
        }
        if self.average is not None:
            average = self.changed_weights(self.average.module)
            tensors["average"] = average | {"n_averaged": self.average.n_averaged}
        state = {
            "epoch": self.progress.epochs,
            "origin": self.origin,
            "progress": asdict(self.progress),
            "optimizer": optimizer_values,
            "groups": optimizer_state.group_options(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "metric_updates": updates,
            "scaler": self.scaler.state_dict() or None,  # a disabled scaler has an empty state
        }
        return tensors, state

    def best_contents(self) -> Contents:
        """Return the validated weights and their validation metrics. The tensors are not copied."""
        scored = self.model if self.average is None else self.average.module
        return {"model": self.changed_weights(scored)}, {"origin": self.origin, **(self.progress.best or {})}

    def restore(self, tensors: Mapping[str, Tensors], state: dict[str, Any], folder: Path) -> str | None:
        """Restore a checkpoint; return why it is not the newest one, or None if it is.

        The optimizer and the schedule are restored at the start of their phase.

        Args:
            tensors: Tensors that :func:`transfer.storage.checkpoint.load` returned.
            state: Plain data that :func:`transfer.storage.checkpoint.load` returned.
            folder: Folder of the checkpoint, for errors.

        Raises:
            RunError: The checkpoint belongs to a run with other data or other base weights.
        """
        where = str(folder)
        with damaged(_MISMATCH, where, _FIX_MISMATCH):
            self._restore(tensors, checked(state, _CheckpointState, where, _MISMATCH, _FIX_MISMATCH), folder)
        recovered: str | None = state.get("recovered")
        return recovered

    def _restore(self, tensors: Mapping[str, Tensors], state: _CheckpointState, folder: Path) -> None:
        # Checked first: with other data, the counts of batches below would refer to other examples.
        different = [name for name, value in self.origin.items() if state.origin.get(name) != value]
        if different:
            raise RunError(
                f"the run began with other {' and other '.join(different)}, so its checkpoint does not fit",
                where=str(folder),
                fix=_FIX_MISMATCH,
            )
        self._require_consistent(state.progress, str(folder))
        load_weights(self.model, tensors["model"], self.changed_weights(self.model), folder)
        if self.average is not None:
            # n_averaged is the number of updates, a buffer of AveragedModel besides the averaged weights.
            averaged = dict(tensors["average"])
            count = {"n_averaged": averaged.pop("n_averaged")}
            require_same_layout(count, {"n_averaged": self.average.n_averaged}, _MISMATCH, str(folder), _FIX_MISMATCH)
            self.average.n_averaged.copy_(count["n_averaged"])
            load_weights(self.average.module, averaged, self.changed_weights(self.average.module), folder)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler or {})
        self.progress = state.progress
        paths = [path for path, _ in named_metrics(self.metrics)]
        if paths != list(state.metric_updates):
            raise RunError(f"{_MISMATCH}: it has other metrics", where=str(folder), fix=_FIX_MISMATCH)
        for path, metric in named_metrics(self.metrics):
            _restore_metric(metric, path, tensors["metrics"], state.metric_updates[path])
        for metric in self.metrics.values():
            if metric.update_count:
                float(metric.compute())  # raises if the restored tensors do not fit together
        self._restored = tensors, state, folder

    def _require_consistent(self, progress: Progress, where: str) -> None:
        """Require that the parts of a restored progress fit together: the engine relies on them."""
        for record in progress.records:
            checked(record, EpochRecord, where, _MISMATCH, _FIX_MISMATCH)
        for report in progress.caches:
            checked(report, _CacheReport, where, _MISMATCH, _FIX_MISMATCH)
        best = [
            checked(b, _BestEpoch, where, _MISMATCH, _FIX_MISMATCH) for b in (progress.best, progress.phase_best) if b
        ]
        # Without a validation split, no epoch has metrics of it.
        is_validated = any(record["validation"] for record in progress.records)
        consistent = (
            all(not is_validated or epoch.validation.keys() >= {"loss", *self.metrics} for epoch in best)
            and bool(progress.best) == bool(progress.records)
            and progress.phase_epochs <= progress.epochs
            and bool(progress.epoch.batches) == bool(progress.epoch.examples)
            and (progress.trained_seconds > 0 if progress.records else progress.phase == 1)
        )
        if not consistent:
            raise RunError(f"{_MISMATCH}: its counts contradict each other", where=where, fix=_FIX_MISMATCH)

    def changed_weights(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """Return the weights and buffers of the stages that some phase changes, without the weights under an adapter.

        Args:
            module: The model or its moving average.
        """
        return {
            name: tensor
            for name, tensor in module.state_dict().items()
            if self.model.stage_of(name) not in self.unchanged and name not in self.model.fixed
        }


def require_finite(weights: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Require that the weights of a checkpoint are finite.

    Args:
        weights: Weights on the CPU: on a GPU, each check would wait for the device.
        progress: The progress with these weights, as in :meth:`TrainingState.contents`, for the error.

    Raises:
        TrainingError: Weights are NaN or infinite.
    """
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise TrainingError(
            f"{len(broken)} weights are not finite ({broken[0]}) after epoch {len(progress['records'])}, batch "
            f"{progress['epoch']['batches']} of the next; the checkpoint before is kept",
            fix="lower the learning rate, or set train.clip_norm",
        )


def load_weights(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path
) -> None:
    """Copy weights into a module.

    Args:
        module: The model or its moving average.
        tensors: Weights of the checkpoint.
        expected: Weights of the module that the checkpoint must contain.
        folder: Folder of the checkpoint, for errors.

    Raises:
        RunError: The checkpoint contains the weights of another model.
    """
    what = "the checkpoint is of another model than the run's config describes"
    require_same_layout(tensors, expected, what, str(folder), _FIX_MISMATCH)
    module.load_state_dict(tensors, strict=False)  # checkpoints leave out the stages that no phase changes


def named_metrics(metrics: Mapping[str, Metric]) -> Iterator[tuple[str, Metric]]:
    """Yield metrics, and the metrics that they contain, with their paths."""
    from torchmetrics import Metric

    for name, metric in metrics.items():
        for path, module in metric.named_modules():
            if isinstance(module, Metric):
                yield f"{name}/{path}", module


def _metric_states(metrics: Mapping[str, Metric]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state of metrics: update counts with the lengths of list states, and tensors."""
    updates: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path, metric in named_metrics(metrics):
        lengths = {}
        for name, value in metric.metric_state.items():
            if isinstance(value, list):
                lengths[name] = len(value)
                # Cloned, because several metrics may have the same batch: safetensors refuses shared memory.
                tensors |= {f"{path}/{name}/{index}": item.clone() for index, item in enumerate(value)}
            else:
                tensors[f"{path}/{name}"] = value
        updates[path] = {"updates": metric.update_count, "lengths": lengths}
    return updates, tensors


def _restore_metric(metric: Metric, path: str, tensors: Mapping[str, Tensor], saved: _MetricUpdates) -> None:
    metric.reset()
    for name, default in metric._defaults.items():
        if isinstance(default, list):
            items = [tensors[f"{path}/{name}/{index}"] for index in range(saved.lengths[name])]
            if len({(item.dtype, item.shape[1:]) for item in items}) > 1:  # metrics concatenate them
                raise ValueError(f"the parts of the metric {path}/{name} differ in dtype or shape")
            getattr(metric, name).extend(item.clone().to(metric.device) for item in items)
            continue
        value = tensors[f"{path}/{name}"]
        # A state that starts as a single number may take the shape of the first batch's outputs.
        same_shape = value.shape == default.shape or default.numel() == 1
        same_type = value.dtype == default.dtype or (value.is_floating_point() and default.is_floating_point())
        if not same_shape or not same_type:
            raise ValueError(f"the metric {path}/{name} has the dtype {value.dtype} and the shape {list(value.shape)}")
        setattr(metric, name, value.clone().to(metric.device))
    # Otherwise compute() would warn that the metric has never been updated.
    metric._update_count = saved.updates
