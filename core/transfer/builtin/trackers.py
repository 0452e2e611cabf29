"""Trackers for TensorBoard, MLflow, and Weights and Biases. Their libraries are imported when a run starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from transfer.interfaces import TrackedRun, Tracker

logger = logging.getLogger(__name__)

_RETRIES, _TIMEOUT_SECONDS = "2", "20"
"""MLflow's own defaults let a run wait for minutes, at every epoch, if the server does not respond."""


class TensorBoard(Tracker):
    """Event files for TensorBoard: ``tensorboard --logdir runs`` shows all runs.

    Args:
        folder: Parent folder of one folder per run; null: the folder ``tensorboard`` in the run directory.
    """

    def __init__(self, *, folder: str | None = None) -> None:
        self.folder = folder
        self._writer: Any = None

    def start(self, run: TrackedRun) -> str | None:
        """Open an event file and write the hyperparameters; a resumed run gets another file in the same folder."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.folder / "tensorboard") if self.folder is None else os.path.join(self.folder, run.name)
        self._writer = SummaryWriter(folder)
        if run.known is None:
            # SummaryWriter.add_hparams creates a second run, named by the time. This summary belongs to the run itself.
            values = {key: "null" if value is None else value for key, value in run.config.items()}
            self._writer.file_writer.add_summary(hparams_pb(values, trial_id=run.name))
        return folder

    def record(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=epoch)
        # Otherwise a dashboard shows an epoch only when a later one fills the buffer.
        self._writer.flush()

    def finish(self, status: str) -> None:
        """Close the event file."""
        self._writer.close()


class MLflow(Tracker):
    """Runs in an MLflow store, which is a server or a file, with the config as parameters.

    Args:
        tracking_uri: Address of the store: sqlite:///mlflow.db, or a server. Null: MLflow's default
            ($MLFLOW_TRACKING_URI). Keep passwords in the environment: this option is written to the run directory.
        experiment: Name of the experiment that contains the runs. $MLFLOW_EXPERIMENT_NAME has priority.
        tags: Tags of the run, by name.
    """

    def __init__(
        self, *, tracking_uri: str | None = None, experiment: str = "transfer", tags: dict[str, str] | None = None
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.tags = tags

    def start(self, run: TrackedRun) -> str | None:
        """Start an MLflow run with the config as parameters, or resume the known one."""
        import mlflow

        # Only defaults: variables that the user has set take precedence.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _TIMEOUT_SECONDS)
        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        # Not set_experiment(), which would change the experiment of a notebook that calls this.
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self.experiment)
        experiment = mlflow.get_experiment_by_name(name)
        experiment_id = mlflow.create_experiment(name) if experiment is None else experiment.experiment_id
        # Nested, so that a run that is active in a notebook becomes the parent and not an error.
        active = mlflow.start_run(
            run_id=run.known, experiment_id=experiment_id, run_name=run.name, nested=True, tags=self.tags
        )
        if run.known is None:
            self._log_parameters(run.config)
        return str(active.info.run_id)

    def _log_parameters(self, config: Mapping[str, Any]) -> None:
        """Log the config in batches of the size that MLflow accepts, without values that are too long for it."""
        import mlflow
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        too_long = [key for key, value in config.items() if len(str(value)) > MAX_PARAM_VAL_LENGTH]
        if too_long:
            logger.warning("MLflow accepts no values of this length: not logged are %s", ", ".join(too_long))
        accepted = [(key, value) for key, value in config.items() if key not in too_long]
        for start in range(0, len(accepted), MAX_PARAMS_TAGS_PER_BATCH):
            mlflow.log_params(dict(accepted[start : start + MAX_PARAMS_TAGS_PER_BATCH]))

    def record(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log the metrics at the step ``epoch``."""
        import mlflow

        mlflow.log_metrics(dict(metrics), step=epoch)

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        import mlflow

        mlflow.end_run({"complete": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))


class WandB(Tracker):
    """Runs of Weights and Biases, with the config.

    Args:
        project: Name of the project that contains the runs.
        entity: User or team that owns the project; null: that of the login.
        mode: Whether metrics are sent during the run (online) or kept for wandb sync (offline); null: $WANDB_MODE.
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
        self.options: dict[str, Any] = {"project": project, "entity": entity, "mode": mode, "tags": list(tags)}
        self._run: Any = None

    def start(self, run: TrackedRun) -> str | None:
        """Start a run with its files in the run directory, or resume the known one."""
        import wandb

        # By default wandb captures the terminal's output, progress bars included.
        settings = wandb.Settings(console="off")
        resumed = {} if run.known is None else {"id": run.known, "resume": "allow"}
        self._run = wandb.init(
            name=run.name, dir=str(run.folder), settings=settings, reinit="finish_previous", **self.options, **resumed
        )
        if run.known is None:
            self._run.config.update(dict(run.config), allow_val_change=True)
        return str(self._run.id)

    def record(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log the metrics at the step ``epoch``."""
        self._run.log(dict(metrics), step=epoch)

    def finish(self, status: str) -> None:
        """End the run; it failed unless it is complete or was stopped by an observer."""
        self._run.finish(exit_code=0 if status in ("complete", "stopped") else 1)
