"""The contract of a backbone: an ordered chain of named stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from transfer.interfaces.preprocessing import Preprocessing

Layout = Literal["vector", "sequence"]


# ----------------------------------------------------------------------------------------------------------- backbone


@dataclass(frozen=True)
class FeatureSpec:
    """What leaves a backbone.

    Args:
        layout: ``vector``: a float tensor (B, D). ``sequence``: a pair of a float tensor (B, T, D) and a bool mask
            (B, T) that is True at real steps and False at padding; every example has at least one real step.
        size: D.
    """

    layout: Layout
    size: int


@dataclass(frozen=True)
class ForeignModel:
    """A network of another library that holds the same weights under names of its own.

    Args:
        factory: The function that builds it with random weights, ``module:function``
            (``torchvision.models:resnet18``).
        options: The function's keyword arguments, the number of classes among them; JSON alone.
        names: That library's name of each tensor in the backbone's state dict.
        output: Its name of the network's last layer, a linear one, which the head replaced.
    """

    factory: str
    options: Mapping[str, Any]
    names: Mapping[str, str]
    output: str


class Backbone(nn.Module, ABC):
    """A pretrained feature extractor: an ordered chain of named stages.

    Freezing, learning rates by layer and the feature cache all speak of stages. A backbone that is no chain has one.

    A subclass's constructor builds the whole architecture from its options with random weights, without reading data
    or weights, and must work under ``torch.device("meta")``: that is how a config is checked. It hands its stages to
    this constructor.

    Args:
        stages: From input to output. Each module takes what the one before it returns: a tensor or a tuple of
            tensors; the last returns what :attr:`features` says. None is called ``head``. A dot groups stages:
            ``image`` stands for ``image.stem`` and ``image.layer1`` wherever a config names a stage.
    """

    field: ClassVar[str]
    """The field of an example that this backbone consumes."""

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, from input to output."""
        return tuple(name.replace("/", ".") for name, _ in self.stages.named_children())

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that it consumes: a backbone of several gets a tuple of their values for each example."""
        return (self.field,)

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not stages or any(name.split(".")[0] == "head" or not all(name.split(".")) for name in stages):
            raise ValueError(f"stages need names, and none is 'head': {list(stages)}")
        self.stages = nn.Sequential()
        for name, module in stages.items():
            self.stages.add_module(name.replace(".", "/"), module)

    def forward(self, inputs: Any) -> Any:
        """Run the chain of stages."""
        return self.stages(inputs)

    @property
    @abstractmethod
    def features(self) -> FeatureSpec:
        """What the last stage returns."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How raw values become this backbone's input."""

    @classmethod
    def from_data(cls, values: Sequence[Any], **options: Any) -> Self:
        """Build from the options and, where the backbone must see data first (a vocabulary), the training split.

        Args:
            values: The raw values of :attr:`field` in the training split.
            options: The config block.
        """
        return cls(**options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build from the options and what :meth:`assets` returned: how a saved model comes back, without data."""
        return cls(**options)

    def assets(self) -> Mapping[str, str]:
        """Return what was learned from the training split, as text files by name (``vocabulary.json``)."""
        return {}

    def learned(self) -> Mapping[str, Any]:
        """Say what was learned from the training split, for the log and the summary before training; JSON alone."""
        return {}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Read the pretrained weights that the options name into this backbone.

        Returns:
            What was read, for the log and the summary; JSON alone. Empty where there is nothing to read.

        Raises:
            transfer.WeightsError: They are missing or do not fit.
        """
        return {}

    @classmethod
    def without_pretrained(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options to change for the same network to begin from random weights.

        By default none: :meth:`load_pretrained` is not called then. Change them where options mean more than what is
        read (a frozen table of random vectors would be no fair beginning).

        Args:
            options: The config block.

        Returns:
            JSON alone.
        """
        return {}

    def foreign_models(self, out_features: int) -> Mapping[str, ForeignModel]:
        """Return the networks of other libraries that this one can be exported to, by format (``torchvision``).

        Args:
            out_features: The number of outputs of the network's last layer.
        """
        return {}
