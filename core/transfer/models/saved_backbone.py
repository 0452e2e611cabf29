"""The trained backbone of an earlier run, as pretrained weights for a new run."""

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
    """A trained backbone on disk; its tensors are read on demand.

    Args:
        folder: Model folder of the run.
        options: Config block of the backbone in its run, ``name`` included.
        preprocessing: Settings of its preprocessing.
        assets: Text files that it learned from its training split, by name.
    """

    folder: Path
    options: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    assets: Mapping[str, str]

    @property
    def file(self) -> Path:
        """Path of the file of tensors."""
        return self.folder / WEIGHTS

    def tensors(self) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors of the backbone by name (``layer1.0.conv1.weight``), and the names of those of the head.

        Raises:
            WeightsError: The file is missing or damaged.
        """
        try:
            tensors = load_tensors(self.file)
        except RunError as error:
            raise WeightsError.of(error.problems) from error
        backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
        return backbone, sorted(tensors.keys() - backbone.keys())

    def sha256(self) -> str:
        """Return the SHA-256 of the file of tensors, in hexadecimal."""
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def saved_backbone(run: str | Path) -> SavedBackbone:
    """Return the backbone of a run without reading its tensors.

    Args:
        run: Path of a run directory, or of its model folder.

    Raises:
        WeightsError: The path does not contain a complete run.
    """
    path = Path(run).expanduser()
    folder = path / "model" if (path / "model").is_dir() else path
    try:
        described = read_description(folder, f"there is no run with a model at {path}", "name a run that has ended")
        assets = read_assets(folder, described)
        return SavedBackbone(folder, described["backbone"], described["preprocessing"], assets)
    except RunError as error:
        raise WeightsError.of(error.problems) from error
