"""Learning-rate schedules with warm-up."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.optim import Optimizer, lr_scheduler

from transfer.config.torch_classes import SCHEDULERS, TorchClass, owner_and_name
from transfer.errors import ConfigError


class Schedule:
    """A scheduler of torch over a phase, after a linear warm-up.

    CosineAnnealingLR, OneCycleLR, CyclicLR, LinearLR without options, and schedulers of plugins with a true attribute
    ``steps_per_batch`` step after every optimizer step, ReduceLROnPlateau after every validation, all others after
    every epoch. The cosine, and LinearLR without options, fall to zero at the end of the phase. During the warm-up the
    learning rates rise linearly, and the scheduler starts after it (Goyal et al. 2017).

    Args:
        torch_class: Scheduler class with its options. None keeps the learning rates constant.
        optimizer: Optimizer of the phase.
        epochs: Number of epochs of the phase.
        steps_per_epoch: Number of optimizer steps per epoch, or a number for each epoch.
        warmup_epochs: Length of the warm-up in epochs. 0 disables it.
        higher_is_better: Direction of the metric that ReduceLROnPlateau watches.

    Raises:
        ConfigError: torch refuses the options, or the warm-up is as long as the phase.
    """

    def __init__(
        self,
        torch_class: TorchClass | None,
        optimizer: Optimizer,
        *,
        epochs: int,
        steps_per_epoch: int | Sequence[int],
        warmup_epochs: float = 0.0,
        higher_is_better: bool,
    ) -> None:
        self.warmup: lr_scheduler.LinearLR | None = None
        steps = [steps_per_epoch] * epochs if isinstance(steps_per_epoch, int) else list(steps_per_epoch)
        # Epochs may differ in length: the steps before a fraction of an epoch are interpolated between epoch ends.
        epoch_ends = np.cumsum([0, *steps])
        self.warmup_steps = round(float(np.interp(warmup_epochs, range(epochs + 1), epoch_ends)))
        epochs_with_warmup = int(np.searchsorted(epoch_ends, self.warmup_steps))
        self.warming = False  # whether steps of the current epoch belonged to the warm-up
        self.scheduler: Any = None
        if torch_class is not None:
            options = dict(torch_class.options)
            steps_after_warmup = max(1, sum(steps) - self.warmup_steps)
            if torch_class.cls is lr_scheduler.CosineAnnealingLR:
                options["T_max"] = steps_after_warmup
            elif torch_class.cls is lr_scheduler.LinearLR and not options:
                # torch's defaults would raise the rates over five epochs; with options, LinearLR is torch's.
                options = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": steps_after_warmup}
            elif torch_class.cls is lr_scheduler.OneCycleLR:
                options["max_lr"] = [group["lr"] for group in optimizer.param_groups]
                options["total_steps"] = sum(steps) - self.warmup_steps
                options.setdefault("cycle_momentum", {"momentum", "betas"} & set(optimizer.defaults) != set())
            elif torch_class.cls is lr_scheduler.ReduceLROnPlateau:
                options["mode"] = "max" if higher_is_better else "min"
            elif torch_class.cls is lr_scheduler.CyclicLR:
                options["max_lr"] = [group["lr"] for group in optimizer.param_groups]
                options.setdefault("cycle_momentum", "momentum" in optimizer.defaults)
            elif torch_class.cls not in SCHEDULERS.values():  # of a plugin
                lengths = {"total_steps": sum(steps) - self.warmup_steps, "epochs": epochs - epochs_with_warmup}
                taken = inspect.signature(torch_class.cls).parameters
                options |= {name: max(1, length) for name, length in lengths.items() if name in taken}
            try:
                self.scheduler = torch_class.cls(optimizer, **options)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{owner_and_name(torch_class)} refuses its options: {error}") from error
        self._steps_per_batch = isinstance(self.scheduler, (lr_scheduler.CosineAnnealingLR, *_WITH_WARMUP)) or (
            torch_class is not None and torch_class.cls is lr_scheduler.LinearLR and not torch_class.options
        )
        self._steps_per_batch |= bool(getattr(self.scheduler, "steps_per_batch", False))
        if self.warmup_steps:
            if isinstance(self.scheduler, _WITH_WARMUP):
                raise ConfigError(
                    f"{type(self.scheduler).__name__} already contains a warm-up", fix="remove warmup_epochs"
                )
            if self.warmup_steps >= sum(steps):
                raise ConfigError(
                    f"warmup_epochs is too long: expected less than the {epochs} epochs of a phase, "
                    f"got {warmup_epochs:g}",
                    fix="set warmup_epochs to less than the shortest phase",
                )
            # n warm-up steps at 1/(n+1) ... n/(n+1) of the rate: no step is wasted on a rate of zero.
            start = 1 / (self.warmup_steps + 1)
            self.warmup = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=self.warmup_steps)

    def after_step(self) -> None:
        """Update the learning rates after an optimizer step."""
        if self.warmup_steps and self.warmup is not None:
            self.warmup.step()
            self.warmup_steps -= 1
            self.warming = True
        elif self._steps_per_batch:
            self.scheduler.step()

    def after_epoch(self, metric: float) -> None:
        """Update the learning rates after an epoch."""
        warming, self.warming = self.warming, False
        if warming or self.scheduler is None or self._steps_per_batch:
            return
        with warnings.catch_warnings():
            # In a resumed run the optimizer steps were made by the interrupted process, and torch warns of none.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(metric)
            else:
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the variable state of scheduler and warm-up, plain JSON. The config determines everything else."""
        schedulers = {"scheduler": self.scheduler, "warmup": self.warmup}
        states = {
            name: {key: value for key, value in scheduler.state_dict().items() if _is_json(value)}
            for name, scheduler in schedulers.items()
            if scheduler is not None
        }
        return {"warmup_steps": self.warmup_steps, "warming": self.warming, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            ValueError: The state is that of another schedule.
        """
        self.warmup_steps, self.warming = int(state["warmup_steps"]), bool(state["warming"])
        for name, scheduler in {"scheduler": self.scheduler, "warmup": self.warmup}.items():
            if scheduler is not None:
                fresh = scheduler.state_dict()
                # torch would set attributes of any name to any value.
                for key, value in state[name].items():
                    fits = value == fresh.get(key)
                    if key in _VARIABLE:
                        fits = _is_number(value) and (key != "T_i" or value > 0)
                    elif not type(scheduler).__module__.startswith("torch."):
                        fits = key in fresh
                    if not fits:
                        raise ValueError(f"{key} of the {name} is {value!r}, and the config has {fresh.get(key)!r}")
                scheduler.load_state_dict(fresh | state[name])


_VARIABLE = {"last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}
"""Attributes of torch's schedulers that change during training. The config determines all others."""


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number or a list of them."""
    if isinstance(value, list):
        return all(map(_is_number, value))
    return isinstance(value, int | float) and abs(value) < 2**31


def _is_json(value: object) -> bool:
    """Return whether JSON can represent a value: ReduceLROnPlateau's best value, for example, starts infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (bool, int, str)) or (isinstance(value, list) and all(map(_is_json, value)))


_WITH_WARMUP = (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)
