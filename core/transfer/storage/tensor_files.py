"""Named tensors in safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfer.errors import RunError

Tensors = Mapping[str, Tensor]


def on_cpu(tensors: Tensors) -> dict[str, Tensor]:
    """Return tensors on the CPU. They are copied together, so that a GPU is waited for only once."""
    copies = {name: tensor.detach().to("cpu", non_blocking=tensor.is_cuda) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def snapshot(tensors: Tensors) -> dict[str, Tensor]:
    """Return copies of tensors in CPU memory, which later changes of the tensors do not affect.

    From a GPU the copies go to pinned memory and are queued on the current stream, so that Python does not wait. They
    are complete when an event that is recorded afterwards has occurred.
    """
    return {name: tensor.detach().to("cpu", non_blocking=tensor.is_cuda, copy=True) for name, tensor in tensors.items()}


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file and flush it to the disk.

    Raises:
        OSError, SafetensorError: The file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # that of the umask; safetensors replaces the file by one with the mode 0600
    save_file({name: tensor.contiguous() for name, tensor in on_cpu(tensors).items()}, path)
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"{path.name} is not a regular file")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"the tensors cannot be read: {error}", where=str(path)) from error


def require_same_layout(
    tensors: Tensors,
    expected: Tensors,
    what: str,
    where: str,
    fix: str | None = None,
    *,
    allow_infinite: bool = False,
) -> None:
    """Require that tensors have the names, dtypes and shapes of other tensors, and finite values.

    The files of a run may have been edited. Kernels of torch trust the layout of the tensors that they get, and a wrong
    one can overwrite memory.

    Args:
        tensors: Tensors that were read.
        expected: Tensors that they are copied to. Non-finite values are allowed only in tensors that are equal to them,
            such as a buffer with an attention mask.
        what: Message of the error, in front of the name and the problem (``the weights do not fit the model``).
        where: Path of the file, for the error.
        fix: Instruction that solves the problem.
        allow_infinite: Whether infinite values are allowed in all tensors. NaN is not.

    Raises:
        RunError: A tensor is missing, unknown, or has another dtype or shape, or its values are not finite.
    """
    problem = next(_layout_problems(tensors, expected, torch.isnan if allow_infinite else _not_finite), None)
    if problem is not None:
        raise RunError(f"{what}: {problem}", where=where, fix=fix)


def _not_finite(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor)


def _layout_problems(tensors: Tensors, expected: Tensors, is_invalid: Callable[[Tensor], Tensor]) -> Iterator[str]:
    for name in expected.keys() - tensors.keys():
        yield f"{name} is missing"
    for name, tensor in tensors.items():
        if name not in expected:
            yield f"{name} is unknown"
        elif tensor.dtype != expected[name].dtype:
            yield f"{name} has the wrong dtype: expected {expected[name].dtype}, got {tensor.dtype}"
        elif tensor.shape != expected[name].shape:
            yield f"{name} has the wrong shape: expected {list(expected[name].shape)}, got {list(tensor.shape)}"
        elif bool(is_invalid(tensor).any()) and not torch.equal(tensor, expected[name].cpu()):
            yield f"{name} has values that are not finite"
