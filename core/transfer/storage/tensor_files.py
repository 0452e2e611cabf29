"""Named tensors in safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfer.errors import RunError

Tensors = Mapping[str, Tensor]


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file and flush it to the disk.

    Raises:
        OSError, SafetensorError: The file cannot be written.
    """
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
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
