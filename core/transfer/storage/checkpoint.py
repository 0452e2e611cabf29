"""Checkpoints: tensors in safetensors, everything else in JSON, no pickle, written atomically."""

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
from transfer.storage.tensor_files import Tensors, load_tensors, on_cpu, write_tensors
from transfer.system.atomic_files import atomic_folder, read_json, write_json
from transfer.system.file_schema import FileSchema, checked

FORMAT = 3
"""Version of the content of a checkpoint. Other versions are refused."""

STATE = "state.json"
_PREVIOUS = re.compile(r"\.previous(?:-([0-9]{1,6}))?$")


def save(folder: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any], *, keep: int = 2) -> None:
    """Write a checkpoint atomically, in place of the previous one.

    Previous checkpoints are kept as ``<name>.previous``, ``<name>.previous-2`` and so on. At least one is complete at
    any time.

    Args:
        folder: Folder of the checkpoint.
        tensors: Tensors by the name of their file (without suffix).
        state: Everything else; JSON only.
        keep: Number of checkpoints to keep, the new one included.

    Raises:
        TrainingError: The checkpoint cannot be written (the disk is full, for example). Previous ones are unchanged.
    """
    # Two names even if one checkpoint is kept: the last one stays until the new one is complete.
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
            fix="free disk space, or make the folder writable, then run `transfer resume RUN`",
        ) from error


def _rotate(names: list[Path]) -> None:
    """Rename each checkpoint to the next older name, and remove the oldest. ``names`` are in order, newest first."""
    if names[0].exists():
        shutil.rmtree(names[-1], ignore_errors=True)
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.rename(older)


def _previous(folder: Path, keep: int) -> list[Path]:
    """Return the paths of the previous checkpoints, newest first."""
    return [folder.with_name(f"{folder.name}.previous" + (f"-{age}" if age > 1 else "")) for age in range(1, keep)]


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint; if it is damaged or missing, read the newest complete one before it.

    Returns:
        The tensors by file, and the state. If a previous checkpoint was read, ``state["recovered"]`` is the reason.

    Raises:
        RunError: No checkpoint is complete.
    """
    problems: list[Problem] = []
    # Newest first, so that the least training is lost.
    for path in (folder, *sorted(filter(_age, folder.parent.glob(f"{folder.name}.previous*")), key=_age)):
        try:
            tensors, state = _load(path)
        except RunError as error:
            problems += error.problems
        else:
            recovered = {"recovered": "\n".join(map(str, problems))} if problems else {}
            return tensors, state | recovered
    raise RunError.of([replace(p, fix=p.fix or "start again with: transfer run config.yaml") for p in problems])


def exists(folder: Path) -> bool:
    """Return whether there is a checkpoint or a previous one, complete or damaged."""
    return folder.exists() or any(folder.parent.glob(f"{folder.name}.previous*"))


def _age(folder: Path) -> int:
    """Return the number of newer checkpoints; 0 if the folder has no name of a previous checkpoint."""
    match = _PREVIOUS.search(folder.name)
    return int(match[1] or 1) if match else 0


class _Files(FileSchema):
    """The part of ``state.json`` that every checkpoint has: digests by file name."""

    sha256: dict[str, str]


def _load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    state = read_json(folder / STATE, "there is no complete checkpoint here")
    if state.get("format") != FORMAT:
        fix = "use the version of transfer that wrote it"
        raise RunError(
            f"the checkpoint has format {state.get('format')!r}", where=str(folder), available=[str(FORMAT)], fix=fix
        )
    if state.pop("own_sha256", None) != _digest_of(state):
        raise RunError(
            "the file is damaged or was edited: its digest is not the one that was written",
            where=str(folder / STATE),
        )
    tensors = {}
    for name, digest in checked(state, _Files, str(folder / STATE)).sha256.items():
        file = folder / Path(name).name  # a name, never a path: the file may have been edited by hand
        if not file.is_file() or _digest(file) != digest:
            raise RunError("the file is damaged: its digest is not the one that was written", where=str(file))
        tensors[file.stem] = load_tensors(file)
    return tensors, state


def digest(tensors: Tensors) -> str:
    """Return the SHA-256 of tensors by name: of their dtypes, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(on_cpu(tensors).items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _digest_of(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
