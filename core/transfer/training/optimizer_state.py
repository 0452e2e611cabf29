"""Optimizer state as flat, named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from transfer.storage.tensor_files import Tensors


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer: tensors, and values of other types, both by ``parameter name/key``."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{key}"] = value
            else:
                values[f"{names[parameter]}/{key}"] = value
    return tensors, values


def load_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Tensors,
    values: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Restore the state and the group options of an optimizer.

    Args:
        model: Model whose parameters the optimizer trains.
        optimizer: Optimizer with the same parameter groups.
        tensors: Tensors that :func:`optimizer_tensors` returned.
        values: Values of other types that :func:`optimizer_tensors` returned.
        groups: Options that :func:`group_options` returned.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Any]] = {}
    for path, value in {**tensors, **values}.items():
        name, _, key = path.rpartition("/")
        # Cloned, because safetensors maps the tensors from the file, which the next checkpoint replaces.
        states.setdefault(name, {})[key] = value.clone() if isinstance(value, Tensor) else value
    # torch numbers the parameters over all groups; the state dict refers to them by number.
    packed = optimizer.state_dict()
    numbers = {
        names[parameter]: number
        for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True)
        for parameter, number in zip(group["params"], packed_group["params"], strict=True)
    }
    packed["state"] = {numbers[name]: state for name, state in states.items()}
    for group, saved in zip(packed["param_groups"], groups, strict=True):
        # JSON has no tuples: a list stands for one, as in betas.
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    optimizer.load_state_dict(packed)


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each parameter group, including the current learning rates, without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
