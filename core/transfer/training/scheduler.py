"""Torch's optimizers and schedulers by name, over real parameter groups."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from transfer.errors import ConfigError, nearest
from transfer.models.model import BATCH_NORM, Model
from transfer.training.freezing import Frozen


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
NOT_OPTIONS = {"params", "lr", "differentiable", "capturable"}
"""Of optimizers: what the framework hands over, and what needs another loop than this one."""


def handed_over(scheduler: type[Any]) -> set[str]:
    """Return the parameters of a scheduler that the framework knows, so that a config need not repeat them."""
    known = {
        lr_scheduler.CosineAnnealingLR: {"T_max"},
        lr_scheduler.OneCycleLR: {"max_lr", "total_steps", "epochs", "steps_per_epoch"},
        lr_scheduler.CyclicLR: {"max_lr", "scale_fn", "scale_mode"},
        lr_scheduler.ReduceLROnPlateau: {"mode"},
    }
    return {"optimizer", "last_epoch", "verbose"} | known.get(scheduler, set())


NORMS = (BATCH_NORM, nn.LayerNorm, nn.GroupNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
"""RMSNorm came with torch 2.4."""


@dataclass(frozen=True)
class TorchPart:
    """One of torch's optimizers or schedulers that a config names.

    Args:
        name: Its lower-case name.
        cls: Its class.
        options: Checked options as the config gives them (torch's own defaults fill in the rest), without lr.
    """

    name: str
    cls: type[Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """One parameter group.

    Args:
        stage: The stage that its parameters belong to.
        lr: Its learning rate.
        parameters: Names of its parameters; none is frozen.
        decays: Weight decay applies to it.
    """

    stage: str
    lr: float
    parameters: tuple[str, ...]
    decays: bool = True


def groups(
    model: Model,
    frozen: Frozen,
    lr: float | Mapping[str, float],
    no_weight_decay: Collection[Literal["norm", "bias"]] = (),
) -> list[Group]:
    """Return parameter groups for every stage that has something to train, from input to output.

    A stage has one group, or two where some of its parameters are left out of weight decay.

    ``lr`` by group: a stage's own name wins, then ``head`` or ``backbone``. With ``layer_decay`` the topmost backbone
    stage with parameters has the rate ``backbone`` (or, where that is not given, ``head`` times the decay), and every
    stage below it that of the one above times the decay (ULMFiT, Howard and Ruder 2018; BEiT, Bao et al. 2021).

    Raises:
        ConfigError: A key of ``lr`` is no group of this model, or a stage that is trained has no learning rate.
    """
    stages = {
        stage: tuple(f"{stage}.{name}" for name, _ in module.named_parameters())
        for stage, module in model.stages.items()
    }
    rates = _rates([stage for stage, names in stages.items() if names or stage == "head"], list(stages), lr)
    found = []
    for stage, names in stages.items():
        trained = tuple(name for name in names if name not in frozen.parameters)
        if not trained:
            continue
        if stage not in rates:
            raise ConfigError(
                f"lr says nothing of the stage {stage!r}, which is trained",
                available=["head", "backbone", *list(stages)[:-1]],
                fix="add backbone: ..., or freeze the stage",
            )
        spared = _spared(model.stages[stage], no_weight_decay)
        for decays in (True, False):
            members = tuple(name for name in trained if (name.removeprefix(f"{stage}.") in spared) != decays)
            if members:
                found.append(Group(stage, rates[stage], members, decays))
    return found


def _spared(stage: nn.Module, kinds: Collection[str]) -> set[str]:
    """Return the names of a stage's parameters that are left out of weight decay."""
    spared = set()
    for prefix, module in stage.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            bias = name.startswith(("bias", "in_proj_bias"))  # in_proj_bias: of attention
            if ("norm" in kinds and isinstance(module, NORMS)) or ("bias" in kinds and bias):
                spared.add(f"{prefix}.{name}" if prefix else name)
    return spared


def _rates(with_parameters: list[str], stages: list[str], lr: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(lr, Mapping):
        return dict.fromkeys(stages, lr)
    groups = sorted({stage.rpartition(".")[0] for stage in stages if "." in stage})
    known = ["head", "backbone", "layer_decay", *groups, *stages[:-1]]
    for key in lr:
        if key not in known:
            close = nearest(key, known)
            fix = f"did you mean {close!r}?" if close else None
            raise ConfigError(f"lr names {key!r}, which is no group of this model", available=known, fix=fix)
    decay = lr.get("layer_decay", 1.0)
    top = lr.get("backbone", lr["head"] * decay if "layer_decay" in lr and "head" in lr else None)
    rates: dict[str, float] = {}
    if top is not None:
        below = [stage for stage in with_parameters if stage != "head"][::-1]
        rates = {stage: top * decay**depth for depth, stage in enumerate(below)}
    rates |= {stage: lr[group] for stage in stages if (group := stage.rpartition(".")[0]) in lr}
    return rates | {stage: lr[stage] for stage in stages if stage in lr}


def build_optimizer(model: Model, found: list[Group], part: TorchPart, before: Optimizer | None) -> Optimizer:
    """Build the optimizer of a phase; parameters that were trained in the phase before keep their state.

    Args:
        model: The model.
        found: What :func:`groups` returned.
        part: Which optimizer, with its options.
        before: The optimizer of the phase before.

    Raises:
        ConfigError: Torch refuses the options.
    """
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    made = [
        {"params": [parameters[name] for name in g.parameters], "lr": g.lr, "name": g.stage}
        | ({} if g.decays else {"weight_decay": 0.0})
        for g in found
    ]
    try:
        options = {**part.options, "fused": True} if _fused_on_the_cpu(model, part) else part.options
        optimizer: Optimizer = part.cls(made, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"torch's {part.cls.__name__} refuses its options: {error}") from error
    if before is not None:
        kept: dict[Tensor, Any] = {
            p: before.state[p] for g in optimizer.param_groups for p in g["params"] if p in before.state
        }
        optimizer.state.update(kept)
    return optimizer


def _fused_on_the_cpu(model: Model, part: TorchPart) -> bool:
    """Say whether to take torch's fused kernel of an optimizer, a tenth of the time: the config leaves the choice.

    On a GPU torch chooses well by itself; on the CPU it would go through the parameters one operation at a time.
    """
    if torch.__version__ < "2.4" or "fused" not in inspect.signature(part.cls).parameters:
        return False
    if any(part.options.get(key) is not None for key in ("fused", "foreach", "differentiable")):
        return False
    # Torch itself looks at the first parameter alone, and at no gradient, which an embedding may make sparse.
    dense = not any(getattr(module, "sparse", False) for module in model.modules())
    return dense and all(p.device.type == "cpu" and p.is_floating_point() for p in model.parameters())


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
        part: TorchPart | None,
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
