"""The folder of one run: what is in it, and how it is written so that nothing is half there."""

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

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from transfer.config.yaml_document import dump, read_plain
from transfer.errors import ConfigError, RunError
from transfer.system.atomic_files import parse_object, read_bytes, read_json, read_text, write_atomically, write_json

FORMAT = 1
"""Version of the folder's layout; a reader refuses one that it does not know."""

PREDICTIONS = "predictions.safetensors"
TRACKED = "trackers.json"
LOCK = "lock"
"""Is there while a process writes into the folder, and says which."""


@dataclass(frozen=True)
class Predictions:
    """What the model made of the test split's N examples, in their order.

    Args:
        predictions: (N, ...), as the task's metrics take them.
        targets: (N, ...).
        losses: Of each, float (N,); None in runs of versions that did not keep them.
        confidences: The highest score of each (a probability where the task has some), float (N,); None likewise.
    """

    predictions: Tensor
    targets: Tensor
    losses: Tensor | None = None
    confidences: Tensor | None = None


class RunDirectory:
    """A run's folder.

    ``config.yaml`` (resolved), ``environment.json``, ``metrics.jsonl`` (a line per epoch), ``summary.json``,
    ``predictions.safetensors`` (of the test split), ``checkpoints/best`` and ``checkpoints/last``, ``trackers.json``
    where there are trackers, and ``model/``: all that is needed to predict elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output: Path, name: str, suffix: str = "") -> RunDirectory:
        """Make a new folder ``output/name-DATE-TIMEsuffix``; two runs that start in one second get two folders.

        Raises:
            RunError: It cannot be written there.
        """
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        for attempt in range(1, 1000):
            path = output / f"{name}-{stamp}{'' if attempt == 1 else f'-{attempt}'}{suffix}"
            try:
                path.mkdir(parents=True)
            except FileExistsError as error:
                if not output.is_dir():
                    raise RunError(f"{output} is no folder", fix="choose another --output") from error
                continue
            except OSError as error:
                fix = "choose another --output"
                raise RunError(f"cannot make a run folder in {output}: {error.strerror}", fix=fix) from error
            return cls(path)
        raise RunError(f"cannot find a free name for a run in {output}", fix="choose another --output")

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Take the folder of a run that exists.

        Raises:
            RunError: There is no such folder, or it is no run's.
        """
        path = Path(path)
        try:
            found = (path / "config.yaml").is_file()
        except OSError as error:  # a name that is too long
            raise RunError(f"this is no path of a run: {error.strerror}", where=str(path)[:80]) from error
        if not found:
            parent = path if path.is_dir() else path.parent
            runs = sorted(p.parent.name for p in parent.glob("*/config.yaml"))
            what = "is no run directory" if path.exists() else "does not exist"
            fix = (
                "choose one of its runs"
                if path.is_dir() and runs
                else "give the folder that `transfer run` printed last"
            )
            raise RunError(f"{path} {what}", available=runs[-8:], fix=fix)
        return cls(path)

    @property
    def model(self) -> Path:
        """The folder that predicts anywhere the plugins are installed."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints ``best`` and ``last``."""
        return self.path / "checkpoints"

    @property
    def resume_command(self) -> str:
        """What a user types to go on with this run."""
        return f"transfer resume {shlex.quote(str(self.path))}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from writing into this folder; the lock goes with the process, however it ends.

        Raises:
            RunError: Another process has it, nothing can be written here, or a link leads elsewhere.
        """
        self.refuse_links()
        file = self._lock()
        try:
            yield
        finally:
            with suppress(OSError):
                (self.path / LOCK).unlink()
            file.close()

    def refuse_links(self) -> None:
        """Refuse a folder in which writing would go elsewhere.

        Raises:
            RunError: There is a link in it to something outside.
        """
        here = self.path.resolve()
        for path in sorted(self.path.rglob("*")):
            if path.is_symlink() and not path.resolve().is_relative_to(here):
                raise RunError(
                    f"this link leads out of the run directory, to {os.readlink(path)}, and nothing is written there",
                    where=str(path),
                    fix="put what it leads to in its place",
                )

    def _lock(self) -> TextIO:
        path = self.path / LOCK
        while True:
            try:
                file = path.open("a+", encoding="utf-8")
            except OSError as error:
                fix = "make it writable, or copy it to where you can write and resume the copy"
                raise RunError(
                    f"the run directory cannot be written: {error.strerror}", where=str(path), fix=fix
                ) from error
            try:
                # Of this kind a loader process inherits none: it would outlive a training process that was killed.
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
            # The one who had it before removed the file when it ended, perhaps just after we had opened it.
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
            trackers: With its trackers, which matter where the run is trained alone; elsewhere they may be missing.

        Raises:
            RunError: It cannot be read.
        """
        try:
            plain = read_plain(self.path / "config.yaml")
        except ConfigError as error:
            raise RunError.of(error.problems) from error
        return plain if trackers else {name: value for name, value in plain.items() if name != "trackers"}

    def summary(self) -> dict[str, Any]:
        """Return ``summary.json``.

        Raises:
            RunError: The run did not end, or the file is damaged.
        """
        return read_json(self.path / "summary.json", "the run has no summary: it did not end")

    @property
    def complete(self) -> bool:
        """The run has ended, and all that it gives is there."""
        try:
            return self.summary().get("status") == "complete"
        except RunError:  # missing or damaged: the end of the run is computed again
            return False

    def write_config(self, plain: Mapping[str, Any]) -> None:
        """Write the resolved config."""
        text = dump(dict(plain))
        write_atomically(self.path / "config.yaml", f"# The resolved config of this run, defaults filled in.\n{text}")

    def write_environment(self, environment: Mapping[str, Any], *, quick: bool) -> None:
        """Write where the run starts (:func:`environment`), by which command, and whether it is a quick try."""
        started = {"format": FORMAT, "started": _now(), "command": shlex.join(sys.argv), "quick": quick}
        write_json(self.path / "environment.json", {**started, **environment})

    def environment(self) -> dict[str, Any]:
        """Return ``environment.json``.

        Raises:
            RunError: It is missing or damaged.
        """
        found = read_json(self.path / "environment.json", "the run has no environment.json")
        if not isinstance(found.get("versions", {}), dict) or not isinstance(found.get("resumed", []), list):
            raise RunError("the file is damaged", where=str(self.path / "environment.json"))
        return found

    def note_resume(self, changes: Sequence[str]) -> None:
        """Add to ``environment.json`` that the run goes on now, and what is different from when it started."""
        environment = self.environment()
        entry = {"at": _now(), "command": shlex.join(sys.argv), "changes": list(changes)}
        write_json(self.path / "environment.json", environment | {"resumed": [*environment.get("resumed", []), entry]})

    def remove_temporary_files(self) -> None:
        """Remove what a process that was killed had only begun to write, and the summary of the attempt before."""
        # In the model's folder safetensors names its own unfinished file, with a dot before it too.
        for path in [*self.path.glob(".*.tmp"), *self.model.glob(".*"), *self.checkpoints.glob(".*.tmp")]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.path / "summary.json").unlink(missing_ok=True)

    def restore_metrics(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Make ``metrics.jsonl`` hold exactly these lines; return what was wrong with it, if anything."""
        path = self.path / "metrics.jsonl"
        wanted = [_line(record) for record in records]
        found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if found == [line.encode() for line in wanted]:
            return None
        write_atomically(path, "".join(wanted))
        kept = sum(line.encode() in found for line in wanted)
        dropped, restored = len(found) - kept, len(wanted) - kept
        parts = [f"{dropped} that the checkpoint does not know dropped"] if dropped else []
        parts += [f"{restored} that were missing or damaged restored"] if restored else []
        return f"metrics.jsonl: lines {' and '.join(parts)}"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl`` and flush it to the disk."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def tracked(self) -> dict[str, Any]:
        """Return what each tracker has been told, by its name; nothing where the file is missing or damaged."""
        try:
            return read_json(self.path / TRACKED, "nothing was tracked yet")
        except RunError:
            return {}

    def write_tracked(self, told: Mapping[str, Any]) -> None:
        """Write ``trackers.json``."""
        write_json(self.path / TRACKED, told)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``, one per epoch.

        Raises:
            RunError: It is missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        try:
            lines = read_text(path).splitlines()
        except (OSError, ValueError) as error:
            raise RunError(f"the metrics cannot be read: {error}", where=str(path)) from error
        return [parse_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]

    def write_predictions(self, scored: Predictions) -> None:
        """Write what the model made of the test split."""
        tensors = {name: tensor.contiguous() for name, tensor in vars(scored).items() if tensor is not None}
        write_atomically(self.path / PREDICTIONS, save(tensors))

    def predictions(self) -> Predictions | None:
        """Return what the model made of the test split; None where it was not scored.

        Raises:
            RunError: The file is damaged.
        """
        path = self.path / PREDICTIONS
        try:
            return Predictions(**load(read_bytes(path)))
        except FileNotFoundError:
            return None
        except (OSError, TypeError, SafetensorError) as error:
            raise RunError(f"the predictions cannot be read: {error}", where=str(path)) from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / "summary.json", summary)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
