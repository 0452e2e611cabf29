"""Learning-rate schedules with warm-up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.optim import Optimizer, lr_scheduler

from transfer.config.torch_classes import TorchClass
from transfer.errors import ConfigError


class Schedule:
    """One of torch's schedulers over a phase, stepped where torch says it should be, after a linear warm-up.

    OneCycleLR and CyclicLR step after every batch, ReduceLROnPlateau after every validation, all others after every
    epoch; no scheduler is a constant learning rate. During the warm-up the rates rise linearly from a small share, and
    the scheduler begins when it is over (Goyal et al. 2017).

    Args:
        part: Which scheduler, if any.
        optimizer: Of the phase.
        epochs: Of the phase.
        steps_per_epoch: Optimizer steps; those of each epoch of the phase, where they differ.
        warmup_epochs: The warm-up's length, in whole epochs or parts of one.
        higher_is_better: Direction of the metric that ReduceLROnPlateau watches.

    Raises:
        ConfigError: Torch refuses the options, or the warm-up leaves nothing of the phase.
    """

    def __init__(
        self,
        part: TorchClass | None,
        optimizer: Optimizer,
        *,
        epochs: int,
        steps_per_epoch: int | Sequence[int],
        warmup_epochs: float = 0.0,
        higher_is_better: bool,
    ) -> None:
        self.warmup: lr_scheduler.LinearLR | None = None
        steps = [steps_per_epoch] * epochs if isinstance(steps_per_epoch, int) else list(steps_per_epoch)
        # Where the epochs' ends lie, in steps; a part of an epoch is that part of its steps.
        ends = np.cumsum([0, *steps])
        self.warmup_steps = round(float(np.interp(warmup_epochs, range(epochs + 1), ends)))
        warming_epochs = int(np.searchsorted(ends, self.warmup_steps))
        self.warming = False  # some of this epoch's steps were warm-up
        self.scheduler: Any = None
        if part is not None:
            options = dict(part.options)
            if part.cls is lr_scheduler.CosineAnnealingLR:
                options["T_max"] = max(1, epochs - warming_epochs)
            elif part.cls is lr_scheduler.OneCycleLR:
                options["max_lr"] = [group["lr"] for group in optimizer.param_groups]
                options["total_steps"] = sum(steps) - self.warmup_steps
                options.setdefault("cycle_momentum", {"momentum", "betas"} & set(optimizer.defaults) != set())
            elif part.cls is lr_scheduler.ReduceLROnPlateau:
                options["mode"] = "max" if higher_is_better else "min"
            elif part.cls is lr_scheduler.CyclicLR:
                options["max_lr"] = [group["lr"] for group in optimizer.param_groups]
                options.setdefault("cycle_momentum", "momentum" in optimizer.defaults)
            try:
                self.scheduler = part.cls(optimizer, **options)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"torch's {part.cls.__name__} refuses its options: {error}") from error
        if self.warmup_steps:
            if isinstance(self.scheduler, _BY_STEP):
                raise ConfigError(
                    f"{type(self.scheduler).__name__} has a warm-up of its own", fix="remove warmup_epochs"
                )
            if self.warmup_steps >= sum(steps):
                fix = "warm up for less than the shortest phase"
                raise ConfigError(f"warmup_epochs of {warmup_epochs:g} leaves nothing of a phase of {epochs}", fix=fix)
            start = 1 / (self.warmup_steps + 1)
            self.warmup = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=self.warmup_steps)

    def after_step(self) -> None:
        """Follow an optimizer step."""
        if self.warmup_steps and self.warmup is not None:
            self.warmup.step()
            self.warmup_steps -= 1
            self.warming = True
        elif isinstance(self.scheduler, _BY_STEP):
            self.scheduler.step()

    def after_epoch(self, metric: float) -> None:
        """Follow an epoch whose validation gave ``metric``."""
        warming, self.warming = self.warming, False
        if warming or self.scheduler is None or isinstance(self.scheduler, _BY_STEP):
            return
        with warnings.catch_warnings():
            # The steps before may have been taken by the process that was interrupted, which torch cannot know.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(metric)
            else:
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what moves in scheduler and warm-up; JSON alone. All else follows from the config."""
        parts = {"scheduler": self.scheduler, "warmup": self.warmup}
        states = {
            name: {key: value for key, value in part.state_dict().items() if _is_plain(value)}
            for name, part in parts.items()
            if part is not None
        }
        return {"warmup_steps": self.warmup_steps, "warming": self.warming, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        self.warmup_steps, self.warming = state["warmup_steps"], state["warming"]
        for name, part in {"scheduler": self.scheduler, "warmup": self.warmup}.items():
            if part is not None:
                part.load_state_dict(part.state_dict() | state[name])


def _is_plain(value: object) -> bool:
    """Tell what JSON can say: the best value so far, say, is infinite until there is one."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (bool, int, str)) or (isinstance(value, list) and all(map(_is_plain, value)))


_BY_STEP = (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)
