"""Torch's optimizers and schedulers by name, with the options that a config may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler


def _classes(module: Any, base: type, leave_out: set[str]) -> dict[str, type[Any]]:
    public = {name: cls for name, cls in vars(module).items() if not name.startswith("_") and name not in leave_out}
    return {
        name.lower(): c for name, c in public.items() if isinstance(c, type) and issubclass(c, base) and c is not base
    }


# LBFGS evaluates the model several times a step, SparseAdam takes sparse gradients alone, Muon matrices alone.
OPTIMIZERS = _classes(torch.optim, Optimizer, {"LBFGS", "SparseAdam", "Muon"})
# These take functions or other schedulers, which a config cannot write.
_SCHEDULERS = _classes(
    lr_scheduler,
    lr_scheduler.LRScheduler,
    {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"},
)
SCHEDULERS = _SCHEDULERS | {
    "step": lr_scheduler.StepLR,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "one_cycle": lr_scheduler.OneCycleLR,
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "linear": lr_scheduler.LinearLR,
    "exponential": lr_scheduler.ExponentialLR,
}
RESERVED_OPTIONS = {"params", "lr", "differentiable", "capturable"}
"""Of optimizers: what the framework hands over, and what needs another loop than this one."""


def options_set_by_framework(scheduler: type[Any]) -> set[str]:
    """Return the parameters of a scheduler that the framework knows, so that a config need not repeat them."""
    known = {
        lr_scheduler.CosineAnnealingLR: {"T_max"},
        lr_scheduler.OneCycleLR: {"max_lr", "total_steps", "epochs", "steps_per_epoch"},
        lr_scheduler.CyclicLR: {"max_lr", "scale_fn", "scale_mode"},
        lr_scheduler.ReduceLROnPlateau: {"mode"},
    }
    return {"optimizer", "last_epoch", "verbose"} | known.get(scheduler, set())


@dataclass(frozen=True)
class TorchClass:
    """One of torch's optimizers or schedulers that a config names.

    Args:
        name: Its lower-case name.
        cls: Its class.
        options: Checked options as the config gives them (torch's own defaults fill in the rest), without lr.
    """

    name: str
    cls: type[Any]
    options: Mapping[str, Any]
