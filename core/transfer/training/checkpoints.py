"""The checkpoints of a run: when they are written, and which one a resumed run continues from."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch

from transfer.storage import checkpoint
from transfer.storage.run_directory import RunDirectory
from transfer.storage.tensor_files import on_cpu, snapshot
from transfer.system.file_schema import checked
from transfer.system.signals import Interrupted
from transfer.training.distributed import ProcessGroup
from transfer.training.events import Note, Observer
from transfer.training.experiment import EngineOptions
from transfer.training.state import BestCheckpointState, Contents, TrainingState, load_weights, require_finite


class Checkpoints:
    """The checkpoints ``last`` and ``best`` of a run. Only rank 0 writes and reads them.

    With ``checkpoint.in_background``, :meth:`save` copies the state, and a thread writes the copy. At most one write is
    in progress; the error of a failed one is raised by the next call of :meth:`is_due`, :meth:`save` or :meth:`wait`.
    The context manager waits for the write when it is exited.

    Args:
        run: Run directory. None if nothing is written.
        state: State that is saved and restored.
        options: Options of the engine.
        processes: Processes that train together.
        observe: Function that is called with a note for every restored checkpoint.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        state: TrainingState,
        options: EngineOptions,
        processes: ProcessGroup,
        observe: Observer,
    ) -> None:
        self._run = run
        self._state = state
        self._options = options
        self._processes = processes
        self._observe = observe
        self._seconds_before_resume = 0.0
        self._started = time.perf_counter()
        self._last_saved = time.monotonic()
        in_background = options.checkpoint.in_background
        self._in_background = options.device.type == "cuda" if in_background == "auto" else in_background
        self._agreed = False
        self._write: Future[None] | None = None  # the write in progress, or one whose error is not raised yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # After a second Ctrl-C nothing is waited for: the disk may be slow or full. The write replaces the checkpoint
        # atomically, so that it may end at any time.
        if isinstance(error, Interrupted) and error.at_once:
            return
        if error is None or isinstance(error, Interrupted):
            self.wait()
        elif self._write is not None:
            self._write.exception()  # waits; the error that ends the run comes first

    @property
    def run(self) -> RunDirectory:
        """The run directory."""
        assert self._run is not None, "only a run has checkpoints"
        return self._run

    @property
    def seconds(self) -> float:
        """Duration of the run in seconds, including the processes before a resume."""
        return self._seconds_before_resume + time.perf_counter() - self._started

    def reason_to_stop(self, patience: int | None = None) -> str | None:
        """Return the reason for which no further epoch is trained, the same on all ranks, or None.

        Args:
            patience: Number of epochs without a better one after which the phase ends. None disables early stopping.
        """
        limit = self._options.max_minutes
        left = math.inf if limit is None else self._processes.broadcast_object(lambda: 60 * limit - self.seconds)
        return self._state.progress.reason_to_stop(patience, left)

    @property
    def age(self) -> float:
        """Seconds since ``last`` was saved, or since the start."""
        return time.monotonic() - self._last_saved

    @property
    def is_overdue(self) -> bool:
        """Whether ``last`` is older than ``checkpoint.every_minutes``, by the clock of this process."""
        minutes = self._options.checkpoint.every_minutes
        return minutes is not None and self.age >= 60 * minutes

    def agree(self, *, is_overdue: bool) -> None:
        """Set :attr:`is_overdue` of rank 0, which all ranks use in the next :meth:`is_due`, because clocks differ."""
        self._agreed = is_overdue

    def is_due(self, batches: int) -> bool:
        """Return whether a checkpoint is due within an epoch.

        Args:
            batches: Number of trained batches of the epoch.

        Raises:
            TrainingError: The last checkpoint could not be written in the background.
        """
        if self._write is not None and self._write.done():
            self.wait()
        settings = self._options.checkpoint
        if settings.every_steps is not None and batches // self._options.accumulate % settings.every_steps == 0:
            return True
        if not self._processes.is_distributed:
            return self.is_overdue
        is_overdue, self._agreed = self._agreed, False
        return is_overdue

    def wait(self) -> None:
        """Wait for the write in the background, if one is in progress.

        Raises:
            TrainingError: The weights are not finite, or the checkpoint cannot be written.
        """
        if self._write is not None:
            self._write.result()
            self._write = None

    def save(self, *, best: bool = False, last: bool = True) -> None:
        """Save the state as ``last``, the validated weights as ``best``, or both.

        Raises:
            TrainingError: The weights are not finite, or the checkpoint cannot be written. In the background, the
                previous checkpoint failed so.
        """
        # `best` first, because `last` refers to it: if the process is killed in between, the epoch is trained again
        # with the same result.
        names = ["best"] * best + ["last"] * last
        if not names:
            return
        self.wait()
        self._state.progress.seconds = self.seconds
        if self._processes.is_main:
            contents = [self._state.best_contents() if name == "best" else self._state.contents() for name in names]
            folders = [self.run.checkpoints / name for name in names]
            keep = self._options.checkpoint.keep
            if not self._in_background:
                _write(folders, [({file: on_cpu(t) for file, t in ts.items()}, state) for ts, state in contents], keep)
            else:
                copies = [
                    ({file: snapshot(tensors) for file, tensors in files.items()}, copy.deepcopy(state))
                    for files, state in contents
                ]
                copied = torch.cuda.Event() if self._options.device.type == "cuda" else None  # type: ignore[no-untyped-call]
                if copied is not None:
                    # The training continues on the same stream, so no later step can change what is being copied.
                    copied.record(torch.cuda.current_stream(self._options.device))
                self._write = _in_thread(lambda: _write(folders, copies, keep, copied))
        if last:
            self._last_saved = time.monotonic()

    def restore_last(self) -> None:
        """Restore the newest intact checkpoint. Without one, training starts from the beginning."""
        folder = self.run.checkpoints / "last"
        # Only rank 0 needs access to the run directory.
        if not self._processes.broadcast_object(lambda: checkpoint.exists(folder)):
            self._observe(Note("no checkpoint was written yet: training starts from the beginning"))
        else:
            tensors, state = self._processes.broadcast_contents(lambda: checkpoint.load(folder))
            recovered = self._state.restore(tensors, state, folder)
            if recovered is not None:
                self._observe(Note(f"the checkpoint before is used, because the newest is damaged: {recovered}"))
            progress = self._state.progress
            self._observe(Note(f"resuming at epoch {progress.epochs + 1}, batch {progress.epoch.batches + 1}"))
        self._seconds_before_resume = self._state.progress.seconds
        if self._processes.is_main:
            repaired = self.run.restore_metrics(self._state.progress.records)
            if repaired is not None:
                self._observe(Note(repaired))

    def load_best(self) -> dict[str, Any]:
        """Load the weights of the best epoch into the model, and return their epoch and validation metrics."""
        self.wait()
        best = self._state.progress.best
        folder = self.run.checkpoints / "best"
        tensors, loaded = self._processes.broadcast_contents(lambda: checkpoint.load(folder))
        checked(loaded, BestCheckpointState, str(folder))
        if best is None or loaded["epoch"] != best["epoch"]:
            text = f"the weights of the best epoch are damaged: those of epoch {loaded['epoch']} are taken"
            self._observe(Note(f"{text}: {loaded.get('recovered')}"))
        model = self._state.model
        load_weights(model, tensors.get("model", {}), self._state.changed_weights(model), folder)
        return loaded


def _write(
    folders: list[Path], contents: Sequence[Contents], keep: int, copied: torch.cuda.Event | None = None
) -> None:
    """Write checkpoints in order, after checking the weights of ``last``.

    Args:
        folders: Folder of each checkpoint.
        contents: Contents of each checkpoint, on the CPU.
        keep: Number of checkpoints ``last`` to keep.
        copied: CUDA event that marks the end of the copy to the CPU. None if the copy has ended.
    """
    if copied is not None:
        copied.synchronize()
    for folder, (tensors, state) in zip(folders, contents, strict=True):
        if folder.name == "last":
            require_finite(tensors["model"], state["progress"])
            checkpoint.save(folder, tensors, state, keep=keep)
        else:
            checkpoint.save(folder, tensors, state)


def _in_thread(function: Callable[[], None]) -> Future[None]:
    """Call a function in a thread, which does not keep the process alive after a second Ctrl-C."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # raised in the training thread by Future.result()
            future.set_exception(error)
        else:
            future.set_result(None)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future
