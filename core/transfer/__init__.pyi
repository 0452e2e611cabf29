# The public names of `transfer`, listed once: `__init__.py` reads this file, and so do type checkers and editors.
from .builtin.tasks import MeanOf as MeanOf
from .data.splits import split_off as split_off
from .data.tables import Tables as Tables
from .data.tables import TableTarget as TableTarget
from .data.targets import encode_labels as encode_labels
from .data.targets import multi_hot as multi_hot
from .deployment.export import export as export
from .errors import (
    ConfigError as ConfigError,
)
from .errors import (
    DataError as DataError,
)
from .errors import (
    ExportError as ExportError,
)
from .errors import (
    PluginError as PluginError,
)
from .errors import (
    RunError as RunError,
)
from .errors import (
    TrainingError as TrainingError,
)
from .errors import (
    TransferError as TransferError,
)
from .errors import (
    UserError as UserError,
)
from .errors import (
    WeightsError as WeightsError,
)
from .experiments.comparison import Comparison as Comparison
from .experiments.comparison import compare as compare
from .experiments.lr_finder import RangeTest as RangeTest
from .experiments.lr_finder import find_learning_rate as find_learning_rate
from .experiments.pretraining_gain import (
    pretraining_gain as pretraining_gain,
)
from .experiments.pretraining_gain import (
    resume_pretraining_gain as resume_pretraining_gain,
)
from .experiments.seeds import resume_seeds as resume_seeds
from .experiments.seeds import run_seeds as run_seeds
from .experiments.sweep import Sweep as Sweep
from .experiments.sweep import sweep as sweep
from .interfaces import (
    Backbone as Backbone,
)
from .interfaces import (
    Data as Data,
)
from .interfaces import (
    Dataset as Dataset,
)
from .interfaces import (
    DataSpec as DataSpec,
)
from .interfaces import (
    FeatureSpec as FeatureSpec,
)
from .interfaces import (
    ForeignModel as ForeignModel,
)
from .interfaces import (
    Head as Head,
)
from .interfaces import (
    Occlusion as Occlusion,
)
from .interfaces import (
    Preprocessing as Preprocessing,
)
from .interfaces import (
    PrimaryMetric as PrimaryMetric,
)
from .interfaces import (
    Split as Split,
)
from .interfaces import (
    Task as Task,
)
from .interfaces import (
    TrackedRun as TrackedRun,
)
from .interfaces import (
    Tracker as Tracker,
)
from .models.layer_chain import find_chain as find_chain
from .models.saved_backbone import SavedBackbone as SavedBackbone
from .models.saved_backbone import saved_backbone as saved_backbone
from .registry.entry_points import (
    find_plugin as find_plugin,
)
from .registry.entry_points import (
    load_plugin as load_plugin,
)
from .registry.entry_points import (
    plugins as plugins,
)
from .registry.entry_points import (
    register as register,
)
from .reports.preview import preview_batch as preview_batch
from .reports.preview import preview_predictions as preview_predictions
from .reports.report import report as report
from .runs.check import check as check
from .runs.evaluate import evaluate as evaluate
from .runs.predict import predict as predict
from .runs.train import Run as Run
from .runs.train import resume as resume
from .runs.train import run as run
from .system.directory_cache import DirectoryCache as DirectoryCache
from .system.downloads import download as download
from .system.downloads import find_file as find_file
from .system.user_folders import cache_folder as cache_folder
from .system.user_folders import data_folder as data_folder

__version__: str
__all__: list[str]
