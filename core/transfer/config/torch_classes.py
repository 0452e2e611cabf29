"""torch's optimizers and schedulers by name, with the options that a config may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from transfer.errors import PluginError, unknown_name
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind


def _classes(module: Any, base: type, excluded: set[str]) -> dict[str, type[Any]]:
    """Return the public subclasses of a class in a module, by lower-case name."""
    public = {name: cls for name, cls in vars(module).items() if not name.startswith("_") and name not in excluded}
    return {
        name.lower(): c for name, c in public.items() if isinstance(c, type) and issubclass(c, base) and c is not base
    }


# LBFGS evaluates the model several times per step, SparseAdam accepts only sparse gradients, Muon only matrices.
OPTIMIZERS = _classes(torch.optim, Optimizer, {"LBFGS", "SparseAdam", "Muon"})
# The excluded schedulers take functions or other schedulers, which a config cannot contain.
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
"""Optimizer options that a config may not set: the framework passes them, or its loop does not support them."""


LENGTHS = frozenset({"total_steps", "epochs"})
"""Parameters of a plugin's scheduler that the framework passes: number of optimizer steps and epochs of the phase."""


def find_class(what: Kind, name: str) -> type[Any]:
    """Return torch's optimizer or scheduler of a name, otherwise the plugin of that name.

    Raises:
        PluginError: torch has no such class, and the plugin is unknown or cannot be loaded.
    """
    classes = OPTIMIZERS if what == "optimizer" else SCHEDULERS
    if name in classes:
        return classes[name]
    installed = {plugin.name for plugin in entry_points.plugins(what)}
    if name not in installed and ":" not in name:
        fix = f"choose one of torch's {what}s" + (", or one of a plugin" if installed else "")
        raise PluginError.of([unknown_name(what, name, {*classes, *installed}, fix=fix)])
    return entry_points.load(what, name)


def options_set_by_framework(scheduler: type[Any]) -> set[str]:
    """Return the parameters of a scheduler that the framework derives from the run, so that a config omits them."""
    if scheduler not in SCHEDULERS.values():
        return {"optimizer", "last_epoch", "verbose", *LENGTHS}
    derived = {
        lr_scheduler.CosineAnnealingLR: {"T_max"},
        lr_scheduler.OneCycleLR: {"max_lr", "total_steps", "epochs", "steps_per_epoch"},
        lr_scheduler.CyclicLR: {"max_lr", "scale_fn", "scale_mode"},
        lr_scheduler.ReduceLROnPlateau: {"mode"},
    }
    return {"optimizer", "last_epoch", "verbose"} | derived.get(scheduler, set())


def owner_and_name(torch_class: TorchClass) -> str:
    """Return the class in words, for messages (``torch's SGD``)."""
    is_torchs = torch_class.cls in OPTIMIZERS.values() or torch_class.cls in SCHEDULERS.values()
    return f"torch's {torch_class.cls.__name__}" if is_torchs else f"{torch_class.cls.__name__} of a plugin"


@dataclass(frozen=True)
class TorchClass:
    """One of torch's optimizers or schedulers, or one of a plugin, with the options of a config.

    Args:
        name: Name of the class in lower case, or its alias; for a plugin, its name.
        cls: Class of torch or of the plugin.
        options: Checked options that the config sets, without lr. torch's defaults apply to the others.
    """

    name: str
    cls: type[Any]
    options: Mapping[str, Any]
