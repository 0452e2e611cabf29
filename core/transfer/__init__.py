"""Transfer learning for images and text: any backbone, any head, any freeze policy, one engine, every part a plugin.

Public names are listed in ``__all__`` and imported on first use, so that ``import transfer`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer.builtin.tasks import MeanOf
    from transfer.data.splits import cut
    from transfer.data.tables import Tables, TableTarget
    from transfer.data.targets import class_indices, label_sets
    from transfer.deployment.export import export
    from transfer.errors import (
        ConfigError,
        DataError,
        ExportError,
        PluginError,
        RunError,
        TrainingError,
        TransferError,
        UserError,
        WeightsError,
    )
    from transfer.experiments.comparison import Comparison, compare
    from transfer.experiments.lr_finder import RangeTest, find_learning_rate
    from transfer.experiments.pretraining_gain import measure_value, resume_value
    from transfer.experiments.seeds import resume_seeds, run_seeds
    from transfer.experiments.sweep import Sweep, sweep
    from transfer.interfaces import (
        Backbone,
        Data,
        Dataset,
        DataSpec,
        FeatureSpec,
        ForeignModel,
        Head,
        Occlusion,
        Preprocessing,
        PrimaryMetric,
        Split,
        Task,
        TrackedRun,
        Tracker,
    )
    from transfer.models.layer_chain import find_chain
    from transfer.models.saved_backbone import SavedBackbone, saved_backbone
    from transfer.registry.entry_points import find_plugin, load_plugin, plugins, register
    from transfer.reports.preview import look, look_at_predictions
    from transfer.reports.report import report
    from transfer.runs.train import Run, check, evaluate, predict, resume, run
    from transfer.system.downloads import data_folder, download, find_file

_MODULES = {
    "models.layer_chain": ("find_chain",),
    "errors": (
        "ConfigError",
        "DataError",
        "ExportError",
        "PluginError",
        "RunError",
        "TrainingError",
        "TransferError",
        "UserError",
        "WeightsError",
    ),
    "system.downloads": ("data_folder", "download", "find_file"),
    "experiments.lr_finder": ("RangeTest", "find_learning_rate"),
    "reports.preview": ("look", "look_at_predictions"),
    "interfaces": (
        "Backbone",
        "Data",
        "DataSpec",
        "Dataset",
        "FeatureSpec",
        "ForeignModel",
        "Head",
        "Occlusion",
        "Preprocessing",
        "PrimaryMetric",
        "Split",
        "Task",
        "TrackedRun",
        "Tracker",
    ),
    "registry.entry_points": ("find_plugin", "load_plugin", "plugins", "register"),
    "deployment.export": ("export",),
    "models.saved_backbone": ("SavedBackbone", "saved_backbone"),
    "reports.report": ("report",),
    "experiments.seeds": ("resume_seeds", "run_seeds"),
    "experiments.comparison": ("Comparison", "compare"),
    "experiments.pretraining_gain": ("measure_value", "resume_value"),
    "runs.train": ("Run", "check", "evaluate", "predict", "resume", "run"),
    "data.splits": ("cut",),
    "experiments.sweep": ("Sweep", "sweep"),
    "data.tables": ("TableTarget", "Tables"),
    "data.targets": ("class_indices", "label_sets"),
    "builtin.tasks": ("MeanOf",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Backbone",
    "Comparison",
    "ConfigError",
    "Data",
    "DataError",
    "DataSpec",
    "Dataset",
    "ExportError",
    "FeatureSpec",
    "ForeignModel",
    "Head",
    "MeanOf",
    "Occlusion",
    "PluginError",
    "Preprocessing",
    "PrimaryMetric",
    "RangeTest",
    "Run",
    "RunError",
    "SavedBackbone",
    "Split",
    "Sweep",
    "TableTarget",
    "Tables",
    "Task",
    "TrackedRun",
    "Tracker",
    "TrainingError",
    "TransferError",
    "UserError",
    "WeightsError",
    "check",
    "class_indices",
    "compare",
    "cut",
    "data_folder",
    "download",
    "evaluate",
    "export",
    "find_chain",
    "find_file",
    "find_learning_rate",
    "find_plugin",
    "label_sets",
    "load_plugin",
    "look",
    "look_at_predictions",
    "measure_value",
    "plugins",
    "predict",
    "register",
    "report",
    "resume",
    "resume_seeds",
    "resume_value",
    "run",
    "run_seeds",
    "saved_backbone",
    "sweep",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'transfer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"transfer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
