# The public names of `transfer`, listed once: `__init__.py` reads this file, and so do type checkers and editors.
from .builtin.metrics import MeanOf as MeanOf
from .data.class_folders import (
    ClassFolders as ClassFolders,
    FileListing as FileListing,
    Level as Level,
    folder_levels as folder_levels,
    is_hidden as is_hidden,
)
from .data.delimited import Quoting as Quoting
from .data.in_memory import InMemoryTable as InMemoryTable, table as table
from .data.splits import split_off as split_off
from .data.tables import Tables as Tables, TableTarget as TableTarget
from .data.targets import encode_labels as encode_labels, multi_hot as multi_hot
from .deployment.export import export as export
from .deployment.push import push as push
from .errors import (
    ConfigError as ConfigError,
    DataError as DataError,
    ExportError as ExportError,
    PluginError as PluginError,
    RunError as RunError,
    TrainingError as TrainingError,
    TransferError as TransferError,
    UserError as UserError,
    WeightsError as WeightsError,
)
from .experiments.audit import Audit as Audit, Finding as Finding, audit as audit
from .experiments.comparison import Comparison as Comparison, compare as compare
from .experiments.folds import resume_folds as resume_folds, run_folds as run_folds
from .experiments.lr_finder import RangeTest as RangeTest, find_learning_rate as find_learning_rate
from .experiments.pretraining_gain import (
    pretraining_gain as pretraining_gain,
    resume_pretraining_gain as resume_pretraining_gain,
)
from .experiments.probe import Probe as Probe, ProbeRow as ProbeRow, probe as probe
from .experiments.seeds import resume_seeds as resume_seeds, run_seeds as run_seeds
from .experiments.sweep import Sweep as Sweep, sweep as sweep
from .interfaces import (
    ZERO_SHOT_TEMPLATES as ZERO_SHOT_TEMPLATES,
    Adapter as Adapter,
    Backbone as Backbone,
    Data as Data,
    Dataset as Dataset,
    DataSpec as DataSpec,
    FeatureSpec as FeatureSpec,
    ForeignFolder as ForeignFolder,
    ForeignModel as ForeignModel,
    Head as Head,
    Occlusion as Occlusion,
    Preprocessing as Preprocessing,
    PrimaryMetric as PrimaryMetric,
    Sampler as Sampler,
    Split as Split,
    Task as Task,
    TrackedRun as TrackedRun,
    Tracker as Tracker,
)
from .models.layer_chain import find_chain as find_chain
from .models.saved_backbone import (
    SavedBackbone as SavedBackbone,
    load_saved_backbone as load_saved_backbone,
    saved_backbone as saved_backbone,
)
from .registry.entry_points import (
    find_plugin as find_plugin,
    load_plugin as load_plugin,
    plugins as plugins,
    register as register,
)
from .registry.requirements import install_hint as install_hint
from .reports.preview import preview_batch as preview_batch, preview_predictions as preview_predictions
from .reports.report import report as report
from .runs.check import check as check
from .runs.classifier import Classifier as Classifier
from .runs.clean import clean as clean
from .runs.evaluate import evaluate as evaluate
from .runs.neighbors import neighbors as neighbors
from .runs.predict import predict as predict
from .runs.predictor import Predictor as Predictor, load as load
from .runs.train import Run as Run, resume as resume, run as run
from .system.directory_cache import DirectoryCache as DirectoryCache
from .system.downloads import download as download, find_file as find_file
from .system.file_schema import FileSchema as FileSchema
from .system.user_folders import cache_folder as cache_folder, data_folder as data_folder

__version__: str
__all__: list[str]
