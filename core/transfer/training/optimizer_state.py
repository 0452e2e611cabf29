"""Optimizer state as flat, named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from transfer.storage.tensor_files import Tensors


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state by parameter name: the tensors, and what is not a tensor."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{key}"] = value
            else:
                rest[f"{names[parameter]}/{key}"] = value
    return tensors, rest


def load_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Tensors,
    rest: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Put back what :func:`optimizer_tensors` returned, and the options of the parameter groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    entries: dict[str, dict[str, Any]] = {}
    for path, value in {**tensors, **rest}.items():
        name, _, key = path.rpartition("/")
        # A copy: what safetensors returns is mapped from the file, which is about to be replaced.
        entries.setdefault(name, {})[key] = value.clone() if isinstance(value, Tensor) else value
    packed = optimizer.state_dict()
    places = {
        names[parameter]: place
        for group, numbers in zip(optimizer.param_groups, packed["param_groups"], strict=True)
        for parameter, place in zip(group["params"], numbers["params"], strict=True)
    }
    packed["state"] = {places[name]: state for name, state in entries.items()}
    for group, saved in zip(packed["param_groups"], groups, strict=True):
        # JSON knows no tuples: betas is one.
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    optimizer.load_state_dict(packed)


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of the parameter groups: learning rates as the schedule has moved them, and all others."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
