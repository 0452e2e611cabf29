"""Where a run stands: all that training changes, put into a checkpoint and taken out again, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

from transfer.errors import RunError, TrainingError, damaged
from transfer.models.model import Model
from transfer.storage import checkpoint
from transfer.training import optimizer_state
from transfer.training.scheduler import Schedule

_BEGIN_AGAIN = "bring back what was there before, or begin again with: transfer run"


@dataclass
class EpochSums:
    """The epoch that is going on.

    Args:
        batches: Done so far.
        examples: In these batches.
        loss_sum: Over these examples.
        seconds: That they took.
        waiting_seconds: Of these, spent waiting for data.
        rates: Learning rates when the epoch began, by stage.
    """

    batches: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)


@dataclass
class Progress:
    """What the loop counts; JSON alone.

    Args:
        phase: The phase that is going on, from 1.
        phase_epochs: Its epochs that have ended.
        batches: Of all epochs that have ended.
        trained_examples, trained_seconds, waiting_seconds: Of all epochs that have ended, without validation.
        seconds: Of the run, in all its processes.
        records: The lines of ``metrics.jsonl``.
        best, phase_best: The best epoch of the run and of the phase: its number and its validation figures.
        caches: What was cached and why not.
        epoch: The epoch that is going on.
    """

    phase: int = 1
    phase_epochs: int = 0
    batches: int = 0
    trained_examples: int = 0
    trained_seconds: float = 0.0
    waiting_seconds: float = 0.0
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    phase_best: dict[str, Any] | None = None
    caches: list[dict[str, Any]] = field(default_factory=list)
    epoch: EpochSums = field(default_factory=EpochSums)

    @property
    def epochs(self) -> int:
        """Epochs that have ended."""
        return len(self.records)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Progress:
        """Take what ``asdict`` gave."""
        return cls(**{**plain, "epoch": EpochSums(**plain["epoch"])})


@dataclass
class TrainingState:
    """The parts of a run that training changes.

    Between two steps of the optimizer this is all: gradients are zero then, and what is random is a function of the
    seed and of the counts in ``progress``.

    Args:
        model: The weights.
        unchanged: Stages that no phase changes: checkpoints leave them out.
        origin: Digests of what the run was built from; a checkpoint goes on with the same alone.
        average: The moving average of the weights, if there is one.
        scaler: Of the gradients, under fp16.
        metrics: Over the epoch that is going on.
        progress: The counts.
        optimizer, schedule: Of the phase that is going on.
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
    _found: tuple[dict[str, dict[str, Tensor]], dict[str, Any], Path] | None = None

    def begin_phase(self, optimizer: Optimizer, schedule: Schedule) -> None:
        """Take the optimizer and the schedule of a phase, as they are or as they stood in the checkpoint."""
        if self._found is not None:
            (tensors, state, folder), self._found = self._found, None
            with damaged("the checkpoint does not fit the run", str(folder), _BEGIN_AGAIN):
                groups = state["groups"]
                optimizer_state.load_optimizer(self.model, optimizer, tensors["optimizer"], state["optimizer"], groups)
                schedule.load_state_dict(state["schedule"])
        self.optimizer, self.schedule = optimizer, schedule

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint from which the run can go on.

        Raises:
            TrainingError: The weights are not finite, or the checkpoint cannot be written.
        """
        assert self.optimizer is not None
        assert self.schedule is not None
        weights = self.weights(self.model)
        self._refuse_what_is_not_finite(weights)
        tensors, rest = optimizer_state.optimizer_tensors(self.model, self.optimizer)
        counts, states = _metric_states(self.metrics)
        parts: dict[str, Mapping[str, Tensor]] = {"model": weights, "optimizer": tensors, "metrics": states}
        if self.average is not None:
            parts["average"] = self.weights(self.average.module) | {"n_averaged": self.average.n_averaged}
        state = {
            "epoch": self.progress.epochs,
            "origin": self.origin,
            "progress": asdict(self.progress),
            "optimizer": rest,
            "groups": optimizer_state.group_options(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "metric_updates": counts,
            "scaler": self.scaler.state_dict() or None,  # empty unless the precision is fp16
        }
        checkpoint.save(folder, parts, state, keep=keep)

    def save_best(self, folder: Path) -> None:
        """Write the weights that were scored, with the figures that they reached."""
        scored = self.model if self.average is None else self.average.module
        state = {"origin": self.origin, **(self.progress.best or {})}
        checkpoint.save(folder, {"model": self.weights(scored)}, state)

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], folder: Path) -> str | None:
        """Go back to a checkpoint; return why it was not the newest, if so.

        Optimizer and schedule are put back when their phase begins.

        Args:
            tensors: What :func:`transfer.storage.checkpoint.load` has read.
            state: The same.
            folder: From where.

        Raises:
            RunError: It was written by a run of other data or other base weights.
        """
        with damaged("the checkpoint does not fit the run", str(folder), _BEGIN_AGAIN):
            self._take(tensors, state, folder)
        recovered: str | None = state.get("recovered")
        return recovered

    def _take(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], folder: Path) -> None:
        different = [name for name, value in self.origin.items() if state["origin"].get(name) != value]
        if different:
            raise RunError(
                f"the run began with other {' and other '.join(different)}, so its checkpoint does not fit",
                where=str(folder),
                fix=_BEGIN_AGAIN,
            )
        load_weights(self.model, tensors["model"], self.weights(self.model), folder)
        if self.average is not None:
            averaged = dict(tensors["average"])
            self.average.n_averaged.copy_(averaged.pop("n_averaged"))
            load_weights(self.average.module, averaged, self.weights(self.average.module), folder)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress.of(state["progress"])
        for path, metric in nested(self.metrics):
            _restore_metric(metric, path, tensors["metrics"], state["metric_updates"][path])
        self._found = tensors, state, folder

    def weights(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """Return the weights and buffers, of the model or of its average, in the stages that some phase changes."""
        changed = {name for name in module.state_dict() if self.model.stage_of(name) not in self.unchanged}
        return {name: tensor for name, tensor in module.state_dict().items() if name in changed}

    def _refuse_what_is_not_finite(self, weights: Mapping[str, Tensor]) -> None:
        broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise TrainingError(
                f"{len(broken)} weights are not finite ({broken[0]}) after epoch {self.progress.epochs}, batch "
                f"{self.progress.epoch.batches} of the next; the checkpoint before is kept",
                fix="lower the learning rate, or set train.clip_norm",
            )


def load_weights(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path
) -> None:
    """Copy weights into a module.

    Raises:
        RunError: They are those of another model.
    """
    same = tensors.keys() == expected.keys() and all(tensors[n].shape == t.shape for n, t in expected.items())
    if not same:
        raise RunError("the checkpoint is of another model than the run's config describes", where=str(folder))
    module.load_state_dict(tensors, strict=False)  # without the stages that never change


def nested(metrics: Mapping[str, Metric]) -> Iterator[tuple[str, Metric]]:
    """Yield metrics and the metrics inside them by path."""
    for name, metric in metrics.items():
        for path, module in metric.named_modules():
            if isinstance(module, Metric):
                yield f"{name}/{path}", module


def _metric_states(metrics: Mapping[str, Metric]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return how often metrics were updated, with the lengths of states that are lists, and the states' tensors."""
    counts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path, metric in nested(metrics):
        lengths = {}
        for name, value in metric.metric_state.items():
            if isinstance(value, list):
                lengths[name] = len(value)
                tensors |= {f"{path}/{name}/{place}": item for place, item in enumerate(value)}
            else:
                tensors[f"{path}/{name}"] = value
        counts[path] = {"updates": metric.update_count, "lengths": lengths}
    return counts, tensors


def _restore_metric(metric: Metric, path: str, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
    metric.reset()
    for name in metric.metric_state:
        if name in counts["lengths"]:
            items = [tensors[f"{path}/{name}/{place}"] for place in range(counts["lengths"][name])]
            getattr(metric, name).extend(item.clone().to(metric.device) for item in items)
        else:
            setattr(metric, name, tensors[f"{path}/{name}"].clone().to(metric.device))
    metric._update_count = counts["updates"]
