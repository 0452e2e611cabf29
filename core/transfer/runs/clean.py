"""Removal of the files of a complete run that only training needs."""

from __future__ import annotations

import shutil
from pathlib import Path

from transfer.errors import RunError
from transfer.models.model_json import WEIGHTS, read_description
from transfer.storage.run_directory import RunDirectory
from transfer.storage.tensor_files import load_tensors


def clean(run: str | Path, *, dry_run: bool = False) -> int:
    """Remove the checkpoints of a complete run. The model and all results stay.

    The run can be evaluated, reported, exported and used for predictions as before.

    Args:
        run: Run directory.
        dry_run: Whether to remove nothing and only return the number of bytes.

    Returns:
        Number of bytes that are freed; 0 if the run has no checkpoints.

    Raises:
        RunError: The run is not complete or has no readable model, or another process writes into it.
    """
    directory = RunDirectory.open(run)
    if not directory.complete:
        raise RunError(
            "the run is not complete: its checkpoints are needed to resume it",
            where=str(directory.path),
            fix=f"finish it first: {directory.resume_command}",
        )
    with directory.locked():
        # Without a readable model, the checkpoints contain the only copy of the weights.
        read_description(directory.model, "the run has no model", "keep the checkpoints")
        load_tensors(directory.model / WEIGHTS)
        files = [path for path in directory.checkpoints.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        if not dry_run and directory.checkpoints.is_dir():
            shutil.rmtree(directory.checkpoints)
    return size
