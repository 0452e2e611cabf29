"""The folder of one run: its files, all written atomically."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from transfer.config.older_versions import add_missing_options
from transfer.config.yaml_document import dump, read_plain
from transfer.errors import ConfigError, RunError
from transfer.system.atomic_files import (
    parse_object,
    read_bytes,
    read_json,
    read_text,
    refuse_special_entries,
    write_atomically,
    write_json,
)
from transfer.system.file_schema import FileSchema, checked
from transfer.system.formatting import quote_for_shell

FORMAT = 1
"""Version of the layout of the folder. Other versions are refused."""

PREDICTIONS = "predictions.safetensors"
NAMES = "names"
"""Tensor with the names of the examples: a JSON list in UTF-8, uint8 (bytes,)."""
TRACKED = "trackers.json"
ENVIRONMENT = "environment.json"
LOCK = "lock"
"""File that exists while a process writes into the folder; it contains the process id."""


class EpochRecord(FileSchema):
    """A line of ``metrics.jsonl``."""

    phase: int
    epoch: int
    train: dict[str, float]
    validation: dict[str, float]
    lr: dict[str, float]
    seconds: float
    examples_per_second: float
    waiting_for_data: float


class _Summary(FileSchema):
    """The file ``summary.json``."""

    status: str


class _CompleteSummary(_Summary):
    """The part of the summary of a complete run that other commands read."""

    best_epoch: int
    epochs: int
    validation: dict[str, float]
    test: dict[str, float] | None
    primary_metric: str
    parameters: dict[str, int]
    seconds: float
    examples_per_second: float
    quick: bool = False
    examples: dict[str, int] = {}
    data: dict[str, dict[str, int]] = {}
    cache: list[dict[str, Any]] = []
    digests: dict[str, str] = {}


class _Environment(FileSchema):
    """The file ``environment.json``."""

    quick: bool = False
    versions: dict[str, str] = {}
    resumed: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Predictions:
    """The predictions for the N examples of the test split, in order.

    Args:
        predictions: Predictions (N, ...) as the metrics of the task take them.
        targets: Targets (N, ...).
        losses: Loss of each example, float (N,). None in runs of older versions.
        confidences: Highest score of each example (a probability if the task has probabilities), float (N,). None in
            runs of older versions.
        scores: Scores of all outputs, float (N, C), such as the probability of each class. None if they are equal to
            the predictions, and in runs of older versions.
        names: Name of each example, such as its file. Empty if the examples have no names, and in runs of older
            versions.
    """

    predictions: Tensor
    targets: Tensor
    losses: Tensor | None = None
    confidences: Tensor | None = None
    scores: Tensor | None = None
    names: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class RunDirectory:
    """The folder of a run.

    It contains ``config.yaml`` (resolved), ``environment.json``, ``metrics.jsonl`` (a line per epoch),
    ``summary.json``, ``predictions.safetensors`` (of the test split), ``checkpoints/best``, ``checkpoints/last``,
    ``trackers.json`` (if there are trackers), and ``model/``, which is enough to predict elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output: Path, name: str, suffix: str = "") -> RunDirectory:
        """Create the folder ``output/name-DATE-TIMEsuffix``; runs that start in the same second get different folders.

        Raises:
            RunError: The folder cannot be created.
        """
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        for attempt in range(1, 1000):
            path = output / f"{name}-{stamp}{'' if attempt == 1 else f'-{attempt}'}{suffix}"
            try:
                path.mkdir(parents=True)
            except FileExistsError as error:
                if not output.is_dir():
                    raise RunError(f"{output} is not a folder", fix="choose another --output") from error
                continue
            except OSError as error:
                fix = "choose another --output"
                raise RunError(f"cannot create a run folder in {output}: {error.strerror}", fix=fix) from error
            return cls(path)
        raise RunError(f"cannot find a free name for a run in {output}", fix="choose another --output")

    @classmethod
    def create_at(cls, path: Path) -> RunDirectory:
        """Create the folder at a path, or take one that is empty or that a crash has left before its run was recorded.

        Raises:
            RunError: The folder cannot be created, or contains something else.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            # A crash before config.yaml, which makes the folder a run, can only leave these files.
            others = [p.name for p in path.iterdir() if p.name not in (ENVIRONMENT, LOCK) and p.suffix != ".tmp"]
        except OSError as error:
            raise RunError(
                f"cannot create the run folder {path}: {error.strerror}", fix="choose another path"
            ) from error
        if others:
            fix = "choose a new or an empty folder"
            raise RunError(f"{path} is no run directory, and is not empty", available=sorted(others)[:8], fix=fix)
        return cls(path)

    def refuse_existing_run(self) -> None:
        """Raise an error if the folder contains a run: another process has started one in it.

        Raises:
            RunError: The folder contains a config.
        """
        if (self.path / "config.yaml").exists():
            raise RunError(
                f"another process has started a run in {self.path}", fix="start the same command again to continue it"
            )

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Return the run directory at an existing path.

        Raises:
            RunError: The path does not exist, is not a run directory, or has another format.
        """
        path = Path(path)
        try:
            is_run = (path / "config.yaml").is_file()
        except OSError as error:  # a name that is too long
            raise RunError(f"invalid path of a run directory: {error.strerror}", where=str(path)[:80]) from error
        if not is_run:
            parent = path if path.is_dir() else path.parent
            runs = sorted(p.parent.name for p in parent.glob("*/config.yaml"))
            what = "is no run directory" if path.exists() else "does not exist"
            fix = (
                "choose one of its runs"
                if path.is_dir() and runs
                else "give the folder that `transfer run` printed last"
            )
            raise RunError(f"{path} {what}", available=runs[-8:], fix=fix)
        try:
            environment = read_json(path / ENVIRONMENT, "")
        except RunError:  # missing or damaged: commands that need the file report it
            environment = {}
        _refuse_other_format(environment, path / ENVIRONMENT)
        return cls(path)

    @property
    def model(self) -> Path:
        """Folder of the trained model, enough to predict wherever the plugins are installed."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints ``best`` and ``last``."""
        return self.path / "checkpoints"

    @property
    def resume_command(self) -> str:
        """Command that resumes this run."""
        return f"transfer resume {quote_for_shell(self.path)}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes; the lock ends with the process, even if it is killed.

        Raises:
            RunError: Another process has the lock, the folder is read-only, or it contains a link to the outside.
        """
        self.refuse_links()
        file = self._lock()
        try:
            yield
        finally:
            # Removed before the lock is released: afterwards it may be the lock of another process.
            with suppress(OSError):
                (self.path / LOCK).unlink()
            file.close()

    def refuse_links(self) -> None:
        """Raise an error if the folder contains a link to the outside, a pipe, a device or a socket.

        Raises:
            RunError: The folder contains such an entry.
        """
        refuse_special_entries(self.path)

    def _lock(self) -> TextIO:
        path = self.path / LOCK
        while True:
            try:
                # Not `w`, which would erase the line of the owner before the lock is taken.
                file = path.open("a+", encoding="utf-8")
            except OSError as error:
                fix = "make it writable, or copy it to a writable folder and resume the copy"
                raise RunError(
                    f"the run directory cannot be written: {error.strerror}", where=str(path), fix=fix
                ) from error
            try:
                # Loader processes do not inherit such a lock; one of flock would outlive a killed training process.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                file.close()
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise RunError(f"the run directory cannot be locked: {error.strerror}", where=str(path)) from error
                raise RunError(
                    f"another process writes into {self.path}: {owner}",
                    where=str(path),
                    fix="wait until it ends, or stop it",
                ) from error
            # The previous owner removes the file when it ends, perhaps just after this process has opened it.
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    break
            file.close()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        return file

    def config(self, *, trackers: bool = False) -> dict[str, Any]:
        """Return the resolved config.

        Args:
            trackers: Whether to include the trackers. Only training needs them; elsewhere they may not be installed.

        Raises:
            RunError: The config cannot be read.
        """
        try:
            plain = add_missing_options(read_plain(self.path / "config.yaml"))
        except ConfigError as error:
            raise RunError.of(error.problems) from error
        return plain if trackers else {name: value for name, value in plain.items() if name != "trackers"}

    def summary(self) -> dict[str, Any]:
        """Return ``summary.json``.

        Raises:
            RunError: The run did not end, or the file is damaged.
        """
        path = self.path / "summary.json"
        content = read_json(path, "the run has no summary: it did not end")
        checked(content, _CompleteSummary if content.get("status") == "complete" else _Summary, str(path))
        return content

    @property
    def complete(self) -> bool:
        """Whether the run has ended and its results are complete."""
        try:
            return self.summary().get("status") == "complete"
        except RunError:  # missing or damaged: the end of the run is computed again
            return False

    def write_config(self, plain: Mapping[str, Any]) -> None:
        """Write the resolved config."""
        text = dump(dict(plain))
        write_atomically(self.path / "config.yaml", f"# The resolved config of this run, defaults filled in.\n{text}")

    def write_environment(self, environment: Mapping[str, Any], *, quick: bool) -> None:
        """Write ``environment.json``: the environment, the command, and whether it is a quick run."""
        started = {"format": FORMAT, "started": _now(), "command": shlex.join(sys.argv), "quick": quick}
        write_json(self.path / ENVIRONMENT, {**started, **environment})

    def environment(self) -> dict[str, Any]:
        """Return ``environment.json``.

        Raises:
            RunError: The file is missing or damaged.
        """
        path = self.path / ENVIRONMENT
        content = read_json(path, "the run has no environment.json")
        _refuse_other_format(content, path)
        checked(content, _Environment, str(path))
        return content

    def note_resume(self, changes: Sequence[str]) -> None:
        """Add to ``environment.json`` that the run is resumed now, with the changes of the environment."""
        environment = self.environment()
        entry = {"at": _now(), "command": shlex.join(sys.argv), "changes": list(changes)}
        write_json(self.path / ENVIRONMENT, environment | {"resumed": [*environment.get("resumed", []), entry]})

    def remove_temporary_files(self) -> None:
        """Remove the temporary files of a killed process, and the summary of the previous attempt."""
        # Folders of older versions may contain unfinished files of safetensors in model/, which start with a dot too.
        for path in [*self.path.glob(".*.tmp"), *self.model.glob(".*"), *self.checkpoints.glob(".*.tmp")]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.path / "summary.json").unlink(missing_ok=True)

    def restore_metrics(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Make ``metrics.jsonl`` contain exactly these lines; return a note on the lines that were wrong, if any."""
        path = self.path / "metrics.jsonl"
        wanted = [_line(record) for record in records]
        # As bytes, because a damaged line may not be UTF-8.
        present = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if present == [line.encode() for line in wanted]:
            return None
        write_atomically(path, "".join(wanted))
        unchanged = sum(line.encode() in present for line in wanted)
        dropped, restored = len(present) - unchanged, len(wanted) - unchanged
        parts = [f"dropped {dropped} newer than the checkpoint"] if dropped else []
        parts += [f"restored {restored} missing or damaged"] if restored else []
        return f"metrics.jsonl: {', '.join(parts)}"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl`` and flush it to the disk."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def tracked(self) -> dict[str, Any]:
        """Return the progress of each tracker by its name; empty if the file is missing or damaged."""
        try:
            return read_json(self.path / TRACKED, "nothing was tracked yet")
        except RunError:
            return {}

    def write_tracked(self, progress: Mapping[str, Any]) -> None:
        """Write ``trackers.json``."""
        write_json(self.path / TRACKED, progress)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``, one per epoch.

        Raises:
            RunError: The file is missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        try:
            lines = read_text(path).splitlines()
        except (OSError, ValueError) as error:
            raise RunError(f"the metrics cannot be read: {error}", where=str(path)) from error
        records = {f"{path}:{number}": line for number, line in enumerate(lines, 1)}
        parsed = {where: parse_object(line, where) for where, line in records.items()}
        for where, record in parsed.items():
            checked(record, EpochRecord, where)
        return list(parsed.values())

    def write_predictions(self, scored: Predictions) -> None:
        """Write the predictions for the test split."""
        write_predictions(self.path / PREDICTIONS, scored)

    def predictions(self) -> Predictions | None:
        """Return the predictions for the test split; None if it was not evaluated.

        Raises:
            RunError: The file is damaged.
        """
        return read_predictions(self.path / PREDICTIONS)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / "summary.json", summary)


def write_predictions(path: Path, scored: Predictions) -> None:
    """Write predictions to a safetensors file."""
    tensors = {name: tensor.contiguous() for name, tensor in scored.tensors().items()}
    if scored.names:
        # As a tensor, because the metadata of a safetensors file is limited to 100 MB.
        content = json.dumps([str(name) for name in scored.names], ensure_ascii=False).encode(errors="replace")
        tensors[NAMES] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    write_atomically(path, save(tensors))


def read_predictions(path: Path) -> Predictions | None:
    """Return the predictions that :func:`write_predictions` wrote; None if there is no file.

    Raises:
        RunError: The file is damaged.
    """
    try:
        tensors = load(read_bytes(path))
        names = _names(tensors.pop(NAMES, None))
        # Later versions may add tensors.
        fields: dict[str, Any] = {
            name: tensor for name, tensor in tensors.items() if name in Predictions.__dataclass_fields__
        }
        predictions = Predictions(**fields, names=names)
        lengths = {len(tensor) for tensor in predictions.tensors().values()} | ({len(names)} if names else set())
        if len(lengths) != 1:
            raise ValueError("the tensors differ in length")
        return predictions
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise RunError(f"the predictions cannot be read: {error}", where=str(path)) from error


def _names(stored: Tensor | None) -> tuple[str, ...]:
    """Return names of examples that are stored as a JSON list in UTF-8.

    Raises:
        ValueError: The content is none.
    """
    if stored is None:
        return ()
    names = json.loads(stored.numpy().tobytes())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the names of the examples are wrong: expected a list of texts")
    return tuple(names)


def _refuse_other_format(environment: Mapping[str, Any], path: Path) -> None:
    if environment.get("format", FORMAT) != FORMAT:
        raise RunError(
            f"the run has format {environment['format']!r}",
            where=str(path),
            available=[str(FORMAT)],
            fix="use the version of transfer that wrote it",
        )


def _line(record: Mapping[str, Any]) -> str:
    # NaN is not JSON: readers in other languages refuse the file.
    return json.dumps(record, allow_nan=False) + "\n"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
