"""Optimizer state as flat, named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer.errors import RunError
from transfer.storage.tensor_files import Tensors, require_same_layout

KERNEL_OPTIONS = ("fused", "foreach", "capturable", "differentiable")
"""Options that select a kernel of torch."""
SCHEDULED = ("lr", "momentum", "betas")
"""Options that schedulers of torch change."""


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
    where: str,
) -> None:
    """Restore the state and the learning rates of an optimizer, after checking that they are of this optimizer.

    Args:
        model: Model whose parameters the optimizer trains.
        optimizer: Optimizer with the same parameter groups.
        tensors: Tensors that :func:`optimizer_tensors` returned.
        values: Values of other types that :func:`optimizer_tensors` returned.
        groups: Options that :func:`group_options` returned.
        where: Folder of the checkpoint, for errors.

    Raises:
        RunError: The state is that of another optimizer or of other parameters.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Any]] = {}
    for path, value in {**tensors, **values}.items():
        name, _, key = path.rpartition("/")
        # Cloned, because safetensors maps the tensors from the file, which the next checkpoint replaces.
        states.setdefault(name, {})[key] = value.clone() if isinstance(value, Tensor) else value
    _require_fitting_state(names, optimizer, states, where)
    # torch numbers the parameters over all groups; the state dict refers to them by number.
    packed = optimizer.state_dict()
    numbers = {
        names[parameter]: number
        for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True)
        for parameter, number in zip(group["params"], packed_group["params"], strict=True)
    }
    packed["state"] = {numbers[name]: state for name, state in states.items()}
    for group, saved in zip(packed["param_groups"], groups, strict=True):
        group.update(_restored_options(type(optimizer), group, saved, where))
    optimizer.load_state_dict(packed)


def _require_fitting_state(
    names: Mapping[Tensor, str], optimizer: Optimizer, states: Mapping[str, Mapping[str, Any]], where: str
) -> None:
    """Require that the state of each parameter has the names, dtypes and shapes that the optimizer creates.

    The fused kernels of torch check nothing: an ``exp_avg`` of another size makes them write over other memory.

    Args:
        names: Names of the parameters.
        optimizer: Optimizer that the state is for.
        states: State of each parameter by its name.
        where: Folder of the checkpoint, for the error.
    """
    fix = "restore the original files, or start a new run with: transfer run"
    what = "the optimizer state does not fit the run"
    parameters = {names[p]: (p, group) for group in optimizer.param_groups for p in group["params"]}
    if unknown := states.keys() - parameters.keys():
        raise RunError(f"{what}: {min(unknown)!r} is no parameter that is trained now", where=where, fix=fix)
    created: dict[Any, dict[str, Any]] = {}
    for name, state in states.items():
        parameter, group = parameters[name]
        layout = (id(group), parameter.shape, parameter.dtype, parameter.device)
        if layout not in created:
            created[layout] = _created_state(optimizer, parameter, group)
        expected = created[layout]
        if type(optimizer).__module__.startswith("torch."):
            shared = expected.keys() | state.keys()
        else:  # other optimizers may create a part of their state later than in the first step
            shared = expected.keys() & state.keys()
        tensors = {f"{key} of {name}": state[key] for key in shared if isinstance(state.get(key), Tensor)}
        wanted = {f"{key} of {name}": expected[key] for key in shared if isinstance(expected.get(key), Tensor)}
        # The second moment of a large gradient may overflow in a run whose weights stay finite.
        require_same_layout(tensors, wanted, what, where, fix, allow_infinite=True)
        for key in shared:
            if not isinstance(expected.get(key), Tensor) and not _is_like(state.get(key), expected.get(key)):
                raise RunError(f"{what}: {key} of {name} is {state.get(key)!r}", where=where, fix=fix)
        step = state.get("step")
        if step is not None and bool(step < 0):  # the bias correction of Adam divides by a power of the step
            raise RunError(f"{what}: step of {name} is negative", where=where, fix=fix)


def _created_state(optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that an optimizer creates for one parameter, from a step with a copy of it."""
    copy = nn.Parameter(torch.zeros_like(parameter))
    copy.grad = torch.zeros_like(parameter)
    # The group contains every option already: the defaults of the constructor do not apply.
    make: Callable[..., Optimizer] = type(optimizer)
    trial = make([{**group, "params": [copy]}], lr=group["lr"])
    trial.step()
    return dict(trial.state[copy])


def _restored_options(
    optimizer: type[Optimizer], fresh: Mapping[str, Any], saved: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the options of a parameter group that training has changed: those that schedulers set.

    Everything else comes from the config. That includes the kernel, which another device may not have.
    """
    # A plugin's optimizer may keep state of its own in the groups.
    is_torch = optimizer.__module__.startswith("torch.")
    restored = {}
    for key in fresh.keys() & saved.keys() - {"params", *KERNEL_OPTIONS}:
        # JSON has no tuples: a list stands for one, as in betas.
        value = tuple(saved[key]) if isinstance(saved[key], list) else saved[key]
        fits = _is_like(value, fresh[key])
        if is_torch and key not in SCHEDULED:
            fits = value == fresh[key]
        elif key in SCHEDULED:
            numbers = value if isinstance(value, tuple) else (value,)
            fits = fits and min(numbers) >= 0 and (key != "betas" or max(numbers) < 1)
        if not fits:
            raise RunError(
                f"the optimizer state does not fit the run: {key} is {value!r}, and the config has {fresh[key]!r}",
                where=where,
            )
        restored[key] = value
    return restored


def _is_like(value: object, expected: object) -> bool:
    """Return whether a value from a file has the type of another value; numbers must be finite."""
    if isinstance(expected, list | tuple):
        same_length = isinstance(value, list | tuple) and len(value) == len(expected)
        return same_length and all(map(_is_like, value, expected))  # type: ignore[call-overload]
    if isinstance(expected, bool) or isinstance(value, bool) or not isinstance(expected, int | float):
        return type(value) is type(expected) and value == expected
    return isinstance(value, int | float) and math.isfinite(value)


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each parameter group, including the current learning rates, without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
