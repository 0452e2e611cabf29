"""The contract of a backbone: an ordered chain of named stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from transfer.interfaces.preprocessing import Preprocessing

Layout = Literal["vector", "sequence"]


@dataclass(frozen=True)
class FeatureSpec:
    """Layout and size of the features that a backbone returns.

    Args:
        layout: ``vector``: a float tensor (B, D). ``sequence``: a pair of a float tensor (B, T, D) and a bool mask
            (B, T), which is True at real steps and False at padding. Every example has at least one real step.
        size: Number of features D.
    """

    layout: Layout
    size: int


ZERO_SHOT_TEMPLATES = ("a photo of a {}.",)
"""Default templates of zero-shot prompts."""


@dataclass(frozen=True)
class ForeignModel:
    """A network of another library with the same weights under different names.

    Args:
        factory: Function that builds the network with random weights, as ``module:function``
            (``torchvision.models:resnet18``).
        options: Keyword arguments of the function, including the number of classes; JSON values.
        names: Name of each tensor in the other library, by its name in the backbone's state dict.
        output: Name of the last layer of the network in the other library: the linear layer that the head replaced.
    """

    factory: str
    options: Mapping[str, Any]
    names: Mapping[str, str]
    output: str


@dataclass(frozen=True)
class ForeignFolder:
    """A folder with the same weights that another library loads.

    Args:
        library: Name of the library on the Hugging Face Hub (``transformers``).
        files: Names of the files; the first one contains the weights.
        write: Function that writes the files into a folder.
        code: Python code that loads the current folder and defines ``run(inputs)``, from a tuple of NumPy arrays to an
            array of the outputs. An export runs it in a fresh process.
        usage: Python code that loads the folder, for the model card.
        has_head: Whether the folder contains the head. Otherwise ``run`` returns the features, multiplied by the mask
            if they are a sequence.
    """

    library: str
    files: Sequence[str]
    write: Callable[[Path], None]
    code: str
    usage: str
    has_head: bool


class Backbone(nn.Module, ABC):
    """A pretrained feature extractor: an ordered chain of named stages.

    Freezing, layer-wise learning rates and the feature cache refer to stages by name. A backbone that is not a chain
    has one stage.

    The constructor of a subclass builds the complete architecture from its options with random weights, and passes the
    stages to this constructor. It reads no data or weights and must work under ``torch.device("meta")``, because
    checking a config builds the model there.

    Args:
        stages: Stages by name, from input to output. Each module takes the output of the one before it, a tensor or a
            tuple of tensors. In a tuple, a tensor without an axis of examples is a table that all examples have in
            common, and a bool mask (B, T) marks the real steps of sequences. The last one returns features as
            :attr:`features` specifies. No stage is named ``head``. A dot groups stages: in a config, ``image`` refers
            to both ``image.stem`` and ``image.layer1``.
    """

    field: ClassVar[str]
    """The field of an example that this backbone takes as input."""

    default_head: ClassVar[Mapping[str, Any]] = {"name": "linear"}
    """Config block of the head for a config without one."""

    default_phase: ClassVar[Mapping[str, Any]] = {"epochs": 5}
    """Config block of the only phase for a config with neither phases nor a recipe."""

    fine_tuning_optimizer: ClassVar[Mapping[str, Any]] = {}
    """Config block of the optimizer for pretrained weights in a config without phases, recipe and learning rate. Empty
    uses the default optimizer at the rates of the recipe ``fine_tune``."""

    @classmethod
    def model_names(cls) -> Sequence[str]:
        """Return the valid values of the option ``model`` for ``transfer show --models``; empty without a list."""
        return ()

    @classmethod
    def describe_model(cls, model: str) -> Mapping[str, Any]:
        """Return the properties of a model (parameters, input size) by heading, without network access."""
        return {}

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, from input to output."""
        return tuple(name.replace("/", ".") for name, _ in self.stages.named_children())

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that this backbone takes as input. With several, each example is a tuple of their values."""
        return (self.field,)

    @property
    def unsized_stages(self) -> Collection[str]:
        """The names of stages whose number of parameters depends on data that was not read (a vocabulary)."""
        return ()

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not isinstance(stages, Mapping) or not all(isinstance(stage, nn.Module) for stage in stages.values()):
            raise TypeError(f"the stages are invalid: expected modules by name, got {stages!r}")
        # "head" is the stage that follows the backbone in a model, and dots separate groups: no part may be empty.
        if not stages or any(name.split(".")[0] == "head" or not all(name.split(".")) for name in stages):
            raise ValueError(
                f"the names of the stages are invalid: expected names other than 'head', got {list(stages)}"
            )
        for name, module in stages.items():
            if other := next(
                (o for o in stages if o != name and (o.startswith(f"{name}.") or stages[o] is module)), None
            ):
                reason = (
                    "are the same module" if stages[other] is module else "overlap: a dot separates group and stage"
                )
                raise ValueError(f"the stages {name!r} and {other!r} {reason}")
        self.stages = nn.Sequential()
        for name, module in stages.items():
            # torch does not allow dots in the names of modules.
            self.stages.add_module(name.replace(".", "/"), module)

    def forward(self, inputs: Any) -> Any:
        """Run the chain of stages."""
        return self.stages(inputs)

    @property
    @abstractmethod
    def features(self) -> FeatureSpec:
        """Layout and size of the output of the last stage."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """Preprocessing that turns raw values into this backbone's input."""

    @classmethod
    def from_data(cls, values: Sequence[Any], **options: Any) -> Self:
        """Build the backbone from its options and, if it learns from the data (a vocabulary), the training split.

        Args:
            values: Raw values of :attr:`field` in the training split.
            options: Options of the config block.
        """
        return cls(**options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build the backbone of a saved model from its options and the files of :meth:`assets`, without data."""
        return cls(**options)

    def assets(self) -> Mapping[str, str]:
        """Return the files that were learned from the training split, as text by file name (``vocabulary.json``)."""
        return {}

    def learned(self) -> Mapping[str, Any]:
        """Return a summary of the learned files for the log and the run's summary; JSON values."""
        return {}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the pretrained weights that the options name into this backbone.

        Returns:
            Description of the loaded weights for the log and the run's summary; JSON values. Empty if there are none.

        Raises:
            transfer.WeightsError: The weights are missing or do not fit.
        """
        return {}

    @classmethod
    def is_pretrained(cls, options: Mapping[str, Any]) -> bool:
        """Return whether the layers start from pretrained weights. By default: whether the option ``weights`` is set.

        If they do, a config without phases, recipe and learning rate trains them at low rates.

        Args:
            options: Options of the config block.
        """
        return bool(options.get("weights"))

    @classmethod
    def without_pretrained(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options to change so that the same network starts from random weights.

        By default no option changes: :meth:`load_pretrained` is not called. Override it if options depend on the
        pretrained weights (a frozen table of word vectors must become trainable).

        Args:
            options: Options of the config block.

        Returns:
            Changed options; JSON values.
        """
        return {}

    def zero_shot(
        self, classes: Sequence[str], templates: Sequence[str] = ZERO_SHOT_TEMPLATES
    ) -> tuple[Tensor, Tensor] | None:
        """Return weights (C, D) and biases (C,) of a linear head that the names of the classes define.

        None, the default, if there is no pretrained text tower, which embeds names like images.

        Args:
            classes: Names of the classes.
            templates: Texts in which ``{}`` is replaced by the name of a class. Their embeddings are averaged.
        """
        return None

    def foreign_models(self, out_features: int) -> Mapping[str, ForeignModel]:
        """Return the networks of other libraries that this backbone can be exported to, by format (``torchvision``).

        Args:
            out_features: Number of outputs of the network's last layer.
        """
        return {}

    def foreign_folders(self, head: nn.Linear | None, classes: Sequence[str]) -> Mapping[str, ForeignFolder]:
        """Return the folders of other libraries that this backbone can be exported to, by format (``transformers``).

        Args:
            head: Head of the model if it is one linear layer, otherwise None.
            classes: Names of the classes; empty if there are none.
        """
        return {}
