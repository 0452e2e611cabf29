"""The backbone of an earlier run, as its model folder holds it: what a new run can begin from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from transfer.errors import RunError, WeightsError
from transfer.models.model_json import WEIGHTS, read_assets, read_description
from transfer.storage.tensor_files import load_tensors

_HEAD = "head."


@dataclass(frozen=True)
class SavedBackbone:
    """A trained backbone on disk; its tensors are read when they are asked for.

    Args:
        folder: The model folder.
        options: The block that the config of its run had, ``name`` included.
        preprocessing: What its preprocessing said of itself.
        assets: What it learned from its training split, as text files by name.
    """

    folder: Path
    options: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    assets: Mapping[str, str]

    @property
    def file(self) -> Path:
        """The file of tensors."""
        return self.folder / WEIGHTS

    def tensors(self) -> tuple[dict[str, Tensor], list[str]]:
        """Read the backbone's tensors by name (``layer1.0.conv1.weight``), and the names of the head's.

        Raises:
            WeightsError: The file is missing or damaged.
        """
        try:
            found = load_tensors(self.file)
        except RunError as error:
            raise WeightsError.of(error.problems) from error
        backbone = {name: tensor for name, tensor in found.items() if not name.startswith(_HEAD)}
        return backbone, sorted(found.keys() - backbone.keys())

    def sha256(self) -> str:
        """Return the SHA-256 of the file of tensors in hexadecimal."""
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def saved_backbone(run: str | Path) -> SavedBackbone:
    """Find the backbone of a run; its tensors are not read yet.

    Args:
        run: A run directory, or its model folder.

    Raises:
        WeightsError: There is no complete run.
    """
    path = Path(run).expanduser()
    folder = path / "model" if (path / "model").is_dir() else path
    try:
        described = read_description(folder, f"there is no run with a model at {path}", "name a run that ended")
        assets = read_assets(folder, described)
        return SavedBackbone(folder, described["backbone"], described["preprocessing"], assets)
    except RunError as error:
        raise WeightsError.of(error.problems) from error
