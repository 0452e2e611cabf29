"""Checkpoints and model folders: tensors in safetensors, everything else in JSON, no pickle, never half there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer.errors import RunError
from transfer.run_directory import flush_folder, read_json, write_json

Tensors = Mapping[str, Tensor]


def save(folder: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    """Write a checkpoint to a temporary folder, flush it and put it in the place of the one before.

    The one before is kept as ``<name>.previous`` until the next: at any instant at least one of the two is whole.

    Args:
        folder: Where the checkpoint goes.
        tensors: Name of each tensor file (without suffix) and what is in it.
        state: Everything else; JSON alone.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    digests = {}
    for name, content in tensors.items():
        file = temporary / f"{name}.safetensors"
        save_file({k: v.detach().contiguous().cpu() for k, v in content.items()}, file)
        digests[file.name] = _digest_and_flush(file)
    write_json(temporary / "state.json", {**state, "sha256": digests})
    flush_folder(temporary)
    previous = folder.with_name(f"{folder.name}.previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    flush_folder(folder.parent)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint, or the one before it where that is damaged or missing.

    Returns:
        The tensors of each file, and the state. ``state["recovered"]`` says why the one before was used, if so.

    Raises:
        RunError: Neither is whole.
    """
    try:
        return _load(folder)
    except RunError as error:
        previous = folder.with_name(f"{folder.name}.previous")
        if not previous.exists():
            raise
        tensors, state = _load(previous)
        return tensors, state | {"recovered": str(error)}


def _load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    state = read_json(folder / "state.json", "there is no complete checkpoint here")
    tensors = {}
    for name, digest in dict(state.get("sha256", {})).items():
        file = folder / Path(name).name  # a name, never a path: the file may have been edited by hand
        if not file.is_file() or _digest(file) != digest:
            raise RunError("the file is damaged: its digest is not the one that was written", where=str(file))
        tensors[file.stem] = load_tensors(file)
    return tensors, state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: It is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"the tensors cannot be read: {error}", where=str(path)) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_and_flush(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


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
