"""Checkpoints and model folders: tensors in safetensors, everything else in JSON, no pickle, never half there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from transfer.errors import Problem, RunError, TrainingError
from transfer.storage.tensor_files import Tensors, load_tensors, write_tensors
from transfer.system.atomic_files import atomic_folder, read_json, write_json

FORMAT = 3
"""Version of a checkpoint's content; a reader refuses one that it does not know."""

STATE = "state.json"
_PREVIOUS = re.compile(r"\.previous(?:-([0-9]{1,6}))?$")


def save(folder: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any], *, keep: int = 2) -> None:
    """Write a checkpoint to a temporary folder, flush it and put it in the place of the one before.

    Those before are kept as ``<name>.previous``, ``<name>.previous-2`` and so on: at any instant one is whole.

    Args:
        folder: Where the checkpoint goes.
        tensors: Name of each tensor file (without suffix) and what is in it.
        state: Everything else; JSON alone.
        keep: How many checkpoints stay, the new one included.

    Raises:
        TrainingError: It cannot be written, because the disk is full, say; those before are still there.
    """
    names = [folder, *_previous(folder, max(2, keep))]
    try:
        with atomic_folder(folder, make_room=lambda: _rotate(names)) as temporary:
            digests = {}
            for name, content in tensors.items():
                file = temporary / f"{name}.safetensors"
                write_tensors(file, content)
                digests[file.name] = _digest(file)
            complete_state = {"format": FORMAT, **state, "sha256": digests}
            write_json(temporary / STATE, complete_state | {"own_sha256": _digest_of(complete_state)})
        # Only now: while the new checkpoint replaced the last one, a spare one had to exist.
        for path in folder.parent.glob(f"{folder.name}.previous*"):
            if path not in names[:keep]:
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TrainingError(
            f"the checkpoint cannot be written: {reason}",
            where=str(folder),
            fix="make room, or make the folder writable, then go on with `transfer resume RUN`",
        ) from error


def _rotate(names: list[Path]) -> None:
    """Rename each checkpoint to the next older name, and remove the oldest. ``names`` are in order, newest first."""
    if names[0].exists():
        shutil.rmtree(names[-1], ignore_errors=True)
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.rename(older)


def _previous(folder: Path, keep: int) -> list[Path]:
    """Return the names of the checkpoints before, the newest first."""
    return [folder.with_name(f"{folder.name}.previous" + (f"-{age}" if age > 1 else "")) for age in range(1, keep)]


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint, or the newest before it that is whole where it is damaged or missing.

    Returns:
        The tensors of each file, and the state. ``state["recovered"]`` says why one before was used, if so.

    Raises:
        RunError: None is whole.
    """
    problems: list[Problem] = []
    for path in (folder, *sorted(filter(_age, folder.parent.glob(f"{folder.name}.previous*")), key=_age)):
        try:
            tensors, state = _load(path)
        except RunError as error:
            problems += error.problems
        else:
            recovered = {"recovered": "\n".join(map(str, problems))} if problems else {}
            return tensors, state | recovered
    raise RunError.of([replace(p, fix=p.fix or "begin again with: transfer run config.yaml") for p in problems])


def exists(folder: Path) -> bool:
    """Tell whether there is a checkpoint, or one before it, whole or not."""
    return folder.exists() or any(folder.parent.glob(f"{folder.name}.previous*"))


def _age(folder: Path) -> int:
    """Return how many checkpoints came after one; 0 of a folder whose name is none that this module gives."""
    found = _PREVIOUS.search(folder.name)
    return int(found[1] or 1) if found else 0


def _load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    state = read_json(folder / STATE, "there is no complete checkpoint here")
    if state.get("format") != FORMAT:
        fix = "use the version of transfer that wrote it"
        raise RunError(
            f"the checkpoint is of format {state.get('format')!r}", where=str(folder), available=[str(FORMAT)], fix=fix
        )
    if state.pop("own_sha256", None) != _digest_of(state):
        raise RunError(
            "the file is damaged or was edited: its digest is not the one that was written", where=str(folder / STATE)
        )
    tensors = {}
    for name, digest in state["sha256"].items():
        file = folder / Path(name).name  # a name, never a path: the file may have been edited by hand
        if not file.is_file() or _digest(file) != digest:
            raise RunError("the file is damaged: its digest is not the one that was written", where=str(file))
        tensors[file.stem] = load_tensors(file)
    return tensors, state


def digest(tensors: Tensors) -> str:
    """Return the digest of some tensors by name: their types, shapes and bits."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _digest_of(state: Mapping[str, Any]) -> str:
    """Return the digest of plain data, which comes back from a file as it was."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
