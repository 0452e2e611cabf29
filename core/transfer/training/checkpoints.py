"""The checkpoints of a run: when they are written, and which one a resumed run continues from."""

from __future__ import annotations

import time
from typing import Any

from transfer.storage import checkpoint
from transfer.storage.run_directory import RunDirectory
from transfer.system.file_schema import checked
from transfer.training.distributed import ProcessGroup
from transfer.training.events import Note, Observer
from transfer.training.experiment import EngineOptions
from transfer.training.state import BestCheckpointState, TrainingState, load_weights


class Checkpoints:
    """The checkpoints ``last`` and ``best`` of a run. Only rank 0 writes and reads them.

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

    @property
    def run(self) -> RunDirectory:
        """The run directory."""
        assert self._run is not None, "only a run has checkpoints"
        return self._run

    @property
    def seconds(self) -> float:
        """Duration of the run in seconds, including the processes before a resume."""
        return self._seconds_before_resume + time.perf_counter() - self._started

    @property
    def age(self) -> float:
        """Seconds since ``last`` was saved, or since the start."""
        return time.monotonic() - self._last_saved

    def is_due(self, batches: int) -> bool:
        """Return whether a checkpoint is due within an epoch.

        Args:
            batches: Number of trained batches of the epoch.
        """
        settings = self._options.checkpoint
        if settings.every_steps is not None and batches // self._options.accumulate % settings.every_steps == 0:
            return True
        return settings.every_minutes is not None and self.age >= 60 * settings.every_minutes

    def save_last(self) -> None:
        """Save the state as ``last``."""
        self._state.progress.seconds = self.seconds
        if self._processes.is_main:
            self._state.save(self.run.checkpoints / "last", self._options.checkpoint.keep)
        self._last_saved = time.monotonic()

    def save_best(self) -> None:
        """Save the validated weights as ``best``."""
        if self._processes.is_main:
            self._state.save_best(self.run.checkpoints / "best")

    def restore_last(self) -> None:
        """Restore the newest intact checkpoint. Without one, training starts from the beginning."""
        folder = self.run.checkpoints / "last"
        # Only rank 0 needs access to the run directory.
        loaded = self._processes.broadcast_object(
            lambda: checkpoint.load(folder) if checkpoint.exists(folder) else None
        )
        if loaded is None:
            self._observe(Note("no checkpoint was written yet: training starts from the beginning"))
        else:
            recovered = self._state.restore(*loaded, folder)
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
        best = self._state.progress.best
        folder = self.run.checkpoints / "best"
        tensors, loaded = self._processes.broadcast_object(lambda: checkpoint.load(folder))
        checked(loaded, BestCheckpointState, str(folder))
        if best is None or loaded["epoch"] != best["epoch"]:
            text = f"the weights of the best epoch are damaged: those of epoch {loaded['epoch']} are taken"
            self._observe(Note(f"{text}: {loaded.get('recovered')}"))
        model = self._state.model
        load_weights(model, tensors.get("model", {}), self._state.changed_weights(model), folder)
        return loaded
