"""Transfer learning for images and text: any backbone, any head, any freeze policy, one engine, every part a plugin.

Public names are listed in ``__all__`` and imported on first use, so that ``import transfer`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer.chain import find_chain
    from transfer.comparison import Comparison, compare
    from transfer.earlier_run import SavedBackbone, saved_backbone
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
    from transfer.exporting import export
    from transfer.files import data_folder, download, find_file
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
    from transfer.learning_rate import RangeTest, find_learning_rate
    from transfer.looking import look, look_at_predictions
    from transfer.registry import find_plugin, load_plugin, plugins, register
    from transfer.reporting.report import report
    from transfer.several import resume_seeds, run_seeds
    from transfer.splits import cut
    from transfer.sweeping import Sweep, sweep
    from transfer.tables import Tables, TableTarget
    from transfer.targets import class_indices, label_sets
    from transfer.tasks import MeanOf
    from transfer.value import measure_value, resume_value
    from transfer.workflow import Run, check, evaluate, predict, resume, run

_MODULES = {
    "chain": ("find_chain",),
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
    "files": ("data_folder", "download", "find_file"),
    "learning_rate": ("RangeTest", "find_learning_rate"),
    "looking": ("look", "look_at_predictions"),
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
    "registry": ("find_plugin", "load_plugin", "plugins", "register"),
    "exporting": ("export",),
    "earlier_run": ("SavedBackbone", "saved_backbone"),
    "reporting.report": ("report",),
    "several": ("resume_seeds", "run_seeds"),
    "comparison": ("Comparison", "compare"),
    "value": ("measure_value", "resume_value"),
    "workflow": ("Run", "check", "evaluate", "predict", "resume", "run"),
    "splits": ("cut",),
    "sweeping": ("Sweep", "sweep"),
    "tables": ("TableTarget", "Tables"),
    "targets": ("class_indices", "label_sets"),
    "tasks": ("MeanOf",),
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
