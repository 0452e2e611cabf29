"""Trackers over accelerate's: TensorBoard, MLflow, Weights and Biases. What they need is imported when a run begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from transfer.interfaces import TrackedRun, Tracker

_RETRIES, _TIMEOUT_SECONDS = "2", "20"
"""MLflow's own let a run wait for minutes, at every epoch, for a server that is away."""


class TensorBoard(Tracker):
    """Event files for TensorBoard: ``tensorboard --logdir runs`` shows all runs.

    Args:
        folder: Where runs get a folder of their own; by default the run directory, in which it is called tensorboard.
    """

    def __init__(self, *, folder: str | None = None) -> None:
        self.folder = folder
        self._tracker: Any = None

    def start(self, run: TrackedRun) -> str | None:
        """Write the hyperparameters; a run that goes on gets a further event file in the same folder."""
        from accelerate.tracking import TensorBoardTracker
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        name, folder = ("tensorboard", str(run.folder)) if self.folder is None else (run.name, self.folder)
        self._tracker = TensorBoardTracker(name, folder)
        self._tracker.start()
        if run.known is None:
            # Accelerate's way makes another run, named by the clock; this one TensorBoard sets beside the figures.
            values = {key: "null" if value is None else value for key, value in run.config.items()}
            self._tracker.writer.file_writer.add_summary(hparams_pb(values, trial_id=run.name))
        return os.path.join(folder, name)

    def record(self, figures: Mapping[str, float], epoch: int) -> None:
        """Write a scalar for each figure."""
        self._tracker.log(figures, step=epoch)

    def finish(self, status: str) -> None:
        """Close the file."""
        self._tracker.finish()


class MLflow(Tracker):
    """Runs in an MLflow store, a server or a file, with the config as parameters.

    Args:
        tracking_uri: The store: sqlite:///mlflow.db, or a server's address; by default MLflow's own choice
            ($MLFLOW_TRACKING_URI). Passwords belong into the environment: this is written into the run directory.
        experiment: The experiment to which runs belong.
        tags: Tags of the run.
    """

    def __init__(
        self, *, tracking_uri: str | None = None, experiment: str = "transfer", tags: dict[str, str] | None = None
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.tags = tags
        self._tracker: Any = None

    def start(self, run: TrackedRun) -> str | None:
        """Begin a run of MLflow's, or set the one that is known running again."""
        import mlflow
        from accelerate.tracking import MLflowTracker

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _TIMEOUT_SECONDS)
        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        # Nested, so that one that is active in a notebook has it as a child and does not refuse it.
        self._tracker = MLflowTracker(
            self.experiment, run_id=run.known, run_name=run.name, tags=self.tags, nested_run=True
        )
        self._tracker.start()
        if run.known is None:
            self._tracker.store_init_configuration(dict(run.config))
        return str(self._tracker.tracker.info.run_id)

    def record(self, figures: Mapping[str, float], epoch: int) -> None:
        """Log the figures as metrics of the step ``epoch``."""
        self._tracker.log(dict(figures), step=epoch)

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        import mlflow

        mlflow.end_run({"complete": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))


class WandB(Tracker):
    """Runs of Weights and Biases, with the config.

    Args:
        project: The project to which runs belong.
        entity: The user or team; by default that of the login.
        mode: Whether figures are sent now or kept for wandb sync; by default as $WANDB_MODE says.
        tags: Tags of the run.
    """

    def __init__(
        self,
        *,
        project: str = "transfer",
        entity: str | None = None,
        mode: Literal["online", "offline"] | None = None,
        tags: tuple[str, ...] = (),
    ) -> None:
        self.project = project
        self.options: dict[str, Any] = {"entity": entity, "mode": mode, "tags": list(tags)}
        self._tracker: Any = None

    def start(self, run: TrackedRun) -> str | None:
        """Begin a run there, or go on with the one that is known; its files are in the run directory."""
        import wandb
        from accelerate import PartialState
        from accelerate.tracking import WandBTracker

        PartialState()  # this one of accelerate's asks for the process's rank without making sure that there is one
        # It takes over what is printed otherwise, progress bars included.
        settings = wandb.Settings(console="off")
        again = {} if run.known is None else {"id": run.known, "resume": "allow"}
        self._tracker = WandBTracker(
            self.project,
            name=run.name,
            dir=str(run.folder),
            settings=settings,
            reinit="finish_previous",
            **self.options,
            **again,
        )
        self._tracker.start()
        if run.known is None:
            self._tracker.store_init_configuration(dict(run.config))
        return str(self._tracker.tracker.id)

    def record(self, figures: Mapping[str, float], epoch: int) -> None:
        """Log the figures of the step ``epoch``."""
        self._tracker.log(dict(figures), step=epoch)

    def finish(self, status: str) -> None:
        """End the run, failed where it is not complete."""
        self._tracker.tracker.finish(exit_code=0 if status in ("complete", "stopped") else 1)
