"""The study of a sweep on disk: a SQLite file that may have been damaged or edited."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transfer.errors import RunError, TrainingError, TransferError
from transfer.experiments.search_space import FOLDER
from transfer.system.atomic_files import is_disk_full

if TYPE_CHECKING:
    import optuna

STUDY = "study.db"
"""File of the study in the folder of a sweep."""
_RUN = re.compile(r"runs/[^/\\]+")


@contextmanager
def study_errors(folder: Path) -> Iterator[None]:
    """Convert errors of Optuna and SQLAlchemy inside the block, which raise many types for a damaged file.

    Args:
        folder: Folder of the sweep.

    Raises:
        TrainingError: The disk is full.
        RunError: The study cannot be read or written.
    """
    try:
        yield
    except TransferError:
        raise
    except Exception as error:
        where = str(folder / STUDY)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if is_disk_full(error):
            fix = "free some space, then run the same command again"
            raise TrainingError("the study cannot be written: the disk is full", where=where, fix=fix) from error
        fix = "restore the file, or choose another --output to start again"
        raise RunError(f"the study is damaged, or cannot be read or written: {reason}", where=where, fix=fix) from error


def trial_folder(trial: optuna.Trial | optuna.trial.FrozenTrial) -> str | None:
    """Return the folder of a trial's run, relative to the folder of the sweep; None if the run has not started.

    Raises:
        RunError: The path leads out of the folder ``runs``: the study was edited, and runs of others must not be
            resumed.
    """
    folder = trial.user_attrs.get(FOLDER)
    if folder is None:
        return None
    if not isinstance(folder, str) or not _RUN.fullmatch(folder) or folder == "runs/..":
        raise RunError(
            f"the study is damaged: trial {trial.number} has the folder {folder!r}, which is not in runs/",
            fix="restore the file study.db, or choose another --output to start again",
        )
    return folder
