"""Facts about a run for tables and records."""

from __future__ import annotations

from typing import Any

import numpy as np

from transfer.config.run_config import RunConfig
from transfer.data.loader import Loader
from transfer.models.recorded_plugins import record
from transfer.registry.entry_points import IN_PROCESS
from transfer.storage.environment import environment
from transfer.system.devices import device_name
from transfer.system.formatting import format_names
from transfer.training.build import BuiltExperiment
from transfer.training.distributed import ProcessGroup
from transfer.training.preflight import resolve_training_device

MAX_CLASSES_SHOWN = 6
"""Maximum number of class names in the facts of a run."""


def length_quantiles(loader: Loader) -> dict[str, int]:
    """Return quantiles of the lengths of a split's examples, in tokens; empty if the examples have no lengths."""
    marks = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
    if loader.lengths is None:
        return {}
    lengths = np.quantile(loader.lengths, list(marks.values()))
    return {name: round(float(length)) for name, length in zip(marks, lengths, strict=True)}


def run_environment(config: RunConfig, processes: ProcessGroup) -> dict[str, Any]:
    """Return the environment that results may depend on: versions of packages and plugins, device, processes."""
    # Trackers are not listed, because they do not affect the results.
    plugins = [c.plugin for c in (config.data, config.backbone, config.head, config.task)]
    distributions = {p.distribution: p.version for p in plugins if p.distribution != IN_PROCESS}
    device = device_name(resolve_training_device(config))
    recorded = record((config.data, config.backbone, config.head, config.task))
    return {**environment(device, distributions, processes.rank.world_size), "plugins": recorded}


def run_facts(config: RunConfig, built: BuiltExperiment, device: str) -> dict[str, str]:
    """Return the facts of a run for a table: data, model, phases, optimizer, device."""
    sizes = {name: len(loader.split) for name, loader in built.loaders.items()}
    model = built.experiment.model
    total = sum(p.numel() for p in model.parameters())
    return {
        "data": f"{config.data.plugin.name}: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()),
        "classes": format_names(_with_counts(built), MAX_CLASSES_SHOWN),
        "model": f"{config.backbone.plugin.name} ({' > '.join(list(model.stages)[:-1])}) + {config.head.plugin.name}",
        "parameters": f"{total:,}",
        "phases": ", then ".join(
            f"{phase.epochs} epochs of {', '.join(dict.fromkeys(group.stage for group in phase.groups))}"
            for phase in built.experiment.phases
        ),
        "optimizer": f"{config.optimizer.name}, {config.train.step}",
        "device": f"{device}, {built.experiment.options.precision}",
        **({"loader": f"{workers} processes"} if (workers := built.experiment.train.workers) else {}),
        **({"trackers": ", ".join(tracker.plugin.name for tracker in config.trackers)} if config.trackers else {}),
    }


def _with_counts(built: BuiltExperiment) -> list[str]:
    """Return the names of the classes or labels, with their numbers of training examples if they have them."""
    counts = built.classes["train"]
    return [f"{name} ({counts[name]:,})" if name in counts else name for name in built.data.classes]
