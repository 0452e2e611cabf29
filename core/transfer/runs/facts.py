"""Facts about a run for tables and records."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transfer.config.run_config import RunConfig
from transfer.data.loader import Loader
from transfer.registry.entry_points import IN_PROCESS
from transfer.storage.environment import environment
from transfer.training.build import BuiltExperiment
from transfer.training.distributed import ProcessGroup

MAX_CLASSES_SHOWN = 6


def length_quantiles(loader: Loader) -> dict[str, int]:
    """Return how long a split's examples are."""
    marks = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
    found = np.quantile(loader.lengths, list(marks.values())) if loader.lengths is not None else ()
    return {name: round(float(length)) for name, length in zip(marks, found, strict=True)}


def device_name() -> str:
    """Return the name of the GPU, or ``cpu`` if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def run_environment(config: RunConfig, processes: ProcessGroup) -> dict[str, Any]:
    """Return what figures may depend on beside config and data, the plugins' distributions included."""
    plugins = [c.plugin for c in (config.data, config.backbone, config.head, config.task)]
    distributions = {p.distribution: p.version for p in plugins if p.distribution != IN_PROCESS}
    return environment(device_name(), distributions, processes.rank.world_size)


def run_facts(config: RunConfig, built: BuiltExperiment, device: str) -> dict[str, str]:
    """Say what is trained, on what and how, for a table."""
    sizes = {name: len(loader.split) for name, loader in built.loaders.items()}
    model = built.experiment.model
    total = sum(p.numel() for p in model.parameters())
    return {
        "data": f"{config.data.plugin.name}: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()),
        "classes": ", ".join(built.data.classes[:MAX_CLASSES_SHOWN])
        + (f" and {more} more" if (more := len(built.data.classes) - MAX_CLASSES_SHOWN) > 0 else ""),
        "model": f"{config.backbone.plugin.name} ({' > '.join(list(model.stages)[:-1])}) + {config.head.plugin.name}",
        "parameters": f"{total:,}",
        "phases": ", then ".join(
            f"{phase.epochs} epochs of {', '.join(dict.fromkeys(group.stage for group in phase.groups))}"
            for phase in built.experiment.phases
        ),
        "optimizer": f"{config.optimizer.name}, {config.train.step}",
        "device": device,
        **({"trackers": ", ".join(tracker.plugin.name for tracker in config.trackers)} if config.trackers else {}),
    }
