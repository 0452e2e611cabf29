"""The file ``model.json`` of a model folder, and its validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transfer.errors import RunError
from transfer.interfaces import TargetKind
from transfer.storage.run_directory import FORMAT
from transfer.system.atomic_files import read_json, read_text
from transfer.system.file_schema import FileSchema, checked

DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"


class _Data(FileSchema):
    fields: list[str]
    target: TargetKind
    classes: list[str]


class _Plugin(FileSchema):
    kind: str
    name: str
    distribution: str
    version: str
    target: str
    extras: list[str] = []


class _Block(FileSchema):
    name: str


class _Described(FileSchema):
    backbone: _Block
    adapter: _Block | None = None
    head: _Block
    task: _Block
    task_state: dict[str, Any] = {}
    data: _Data
    preprocessing: dict[str, Any]
    assets: list[str]
    plugins: dict[Literal["backbone", "head", "task", "adapter"], _Plugin]


def read_description(folder: Path, missing: str, fix: str) -> dict[str, Any]:
    """Read ``model.json``.

    Args:
        folder: The model folder.
        missing: Message of the error if the file is missing.
        fix: Fix of this error.

    Raises:
        RunError: The file is missing, has another format, or has invalid content.
    """
    file = folder / DESCRIPTION
    described = {"task_state": {}, **read_json(file, missing, fix)}  # older versions wrote no state
    if described.get("format") != FORMAT:
        raise RunError(
            f"the model has format {described.get('format')!r}",
            where=str(file),
            available=[str(FORMAT)],
            fix="use the version of transfer that wrote it",
        )
    again = "copy the folder again from the run that trained it"
    checked(described, _Described, str(file), "the model folder is incomplete", again)
    # Names and no paths: a folder from somebody else must not make us read files outside of it.
    for name in described["assets"]:
        if not name or Path(name).name != name or name in (DESCRIPTION, WEIGHTS) or name.startswith("."):
            raise RunError(f"the model folder is incomplete: {name!r} is no file of it", where=str(file), fix=again)
    return described


def has_adapter(described: Mapping[str, Any]) -> bool:
    """Return whether the weights of a described model contain an adapter that is not merged."""
    return bool(described.get("adapter"))


def read_assets(folder: Path, described: dict[str, Any]) -> dict[str, str]:
    """Read the text files that the backbone learned from its training split, by name.

    Raises:
        RunError: A file is missing or is not a text.
    """
    try:
        return {name: read_text(folder / name) for name in described["assets"]}
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the model folder is incomplete: {error}", where=str(folder / DESCRIPTION)) from error
