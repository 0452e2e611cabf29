"""Contracts between the framework and its plugins."""

from transfer.interfaces.adapter import Adapter
from transfer.interfaces.backbone import (
    ZERO_SHOT_TEMPLATES,
    Backbone,
    FeatureSpec,
    ForeignFolder,
    ForeignModel,
    Layout,
)
from transfer.interfaces.columns import Columns
from transfer.interfaces.data import SPLITS, Data, Dataset, DataSpec, Split, TargetKind
from transfer.interfaces.head import Head
from transfer.interfaces.preprocessing import Occlusion, Preprocessing
from transfer.interfaces.sampler import Sampler
from transfer.interfaces.task import PrimaryMetric, Task
from transfer.interfaces.tracker import TrackedRun, Tracker

__all__ = [
    "SPLITS",
    "ZERO_SHOT_TEMPLATES",
    "Adapter",
    "Backbone",
    "Columns",
    "Data",
    "DataSpec",
    "Dataset",
    "FeatureSpec",
    "ForeignFolder",
    "ForeignModel",
    "Head",
    "Layout",
    "Occlusion",
    "Preprocessing",
    "PrimaryMetric",
    "Sampler",
    "Split",
    "TargetKind",
    "Task",
    "TrackedRun",
    "Tracker",
]
