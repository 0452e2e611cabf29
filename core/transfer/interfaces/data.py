"""The contracts between the parts: Dataset -> Backbone (+ its Preprocessing) -> Head, the Task that judges, Trackers.

**Options.** A component's constructor signature is the schema of its config block. What stands *before* the ``*`` is
handed over by the framework; what stands *after* it (keyword-only) is an option that a config may set. Each option
has a type, a default unless it is required, and a line under ``Args:`` in the class docstring.
"""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

TargetKind = Literal["class", "labels", "number"]
Layout = Literal["vector", "sequence"]
SPLITS = ("train", "validation", "test")


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataSpec:
    """What a dataset holds, as far as it is known.

    Args:
        fields: Names of the inputs of one example, each with its modality's usual name (``image``, ``text``).
        target: What is to be predicted: one ``class`` per example (int64, ()), a set of ``labels`` (float32 of zeros
            and ones, (C,)), or a ``number`` (float32, (C,)).
        classes: Names of the classes, labels or numbers in the order of the model's outputs; empty as long as the
            data has not been read and the options do not fix them.
    """

    fields: tuple[str, ...]
    target: TargetKind
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Raw examples of one split, as columns.

    Args:
        fields: For each field a sequence of raw values (a PIL image, a string). A sequence may read its values only
            when they are asked for; it must then be picklable.
        targets: int64 (N,) of class indices, or float32 (N, C) of labels or numbers.
        names: What each example is called in messages (its path); empty: its index.
        groups: int64 (N,), the group of each example where some must stay together (pictures of one patient).
    """

    fields: Mapping[str, Sequence[Any]]
    targets: npt.NDArray[Any]
    names: Sequence[str] = ()
    groups: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Refuse columns of different lengths."""
        lengths = {name: len(column) for name, column in self.fields.items()} | {"targets": len(self.targets)}
        if self.names:
            lengths["names"] = len(self.names)
        if self.groups is not None:
            lengths["groups"] = len(self.groups)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a split differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """Return what example ``index`` is called in messages."""
        return self.names[index] if self.names else f"example {index}"

    def column(self, *fields: str) -> Sequence[Any]:
        """Return the raw values of a field, or of several as a tuple for each example (:class:`Columns`)."""
        columns = [self.fields[field] for field in fields]
        return columns[0] if len(columns) == 1 else Columns(columns)

    def fingerprint(self, *fields: str) -> str:
        """Return what identifies the raw values of some fields, in their order.

        A column may know a cheap answer (names, sizes and times of files) and give it by a method ``fingerprint() ->
        str``; of any other column every value is read.
        """
        return _fingerprint(self.column(*fields))

    def select(self, indices: npt.NDArray[np.int64]) -> Split:
        """Return the split of these examples, in this order; nothing is read or copied but the targets."""
        return Split(
            {name: _Selection(column, indices) for name, column in self.fields.items()},
            self.targets[indices],
            _Selection(self.names, indices) if self.names else (),
            None if self.groups is None else self.groups[indices],
        )


class _Selection(Sequence[Any]):
    """Some items of a sequence, without reading any."""

    def __init__(self, column: Sequence[Any], indices: npt.NDArray[np.int64]) -> None:
        if isinstance(column, _Selection):  # a selection of a selection is one selection
            indices = column._indices[indices]
            column = column._column
        self._column: Sequence[Any] = column
        self._indices: npt.NDArray[np.int64] = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._column[int(i)] for i in self._indices[index]]
        return self._column[int(self._indices[index])]


class Columns(Sequence[Any]):
    """Several columns as one of tuples, without reading any.

    Args:
        columns: Of the same length each.
    """

    def __init__(self, columns: Sequence[Sequence[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        values = tuple(column[index] for column in self.columns)
        return list(zip(*values, strict=True)) if isinstance(index, slice) else values

    def fingerprint(self) -> str:
        """Return what identifies the values of all columns."""
        return " ".join(map(_fingerprint, self.columns))


def _fingerprint(column: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    if isinstance(column, _Selection):
        digest.update(_fingerprint(column._column).encode() + np.ascontiguousarray(column._indices).tobytes())
    elif callable(known := getattr(column, "fingerprint", None)):
        return str(known())
    else:
        for value in column:
            content = _content(value)
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _content(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return repr(value).encode()
    # The bytes of an array of objects are addresses, which the next process has others of.
    return (
        repr(value).encode() if array.dtype.hasobject else repr((array.dtype, array.shape)).encode() + array.tobytes()
    )


@dataclass(frozen=True)
class Data:
    """A dataset that has been read.

    Args:
        spec: With the classes filled in (for ``class`` and ``labels``).
        splits: ``train`` and, where the dataset has them, ``validation`` and ``test``. The engine's side cuts what is
            missing from ``train`` (see :mod:`transfer.data.splits`).
    """

    spec: DataSpec
    splits: Mapping[str, Split]


class Dataset(ABC):
    """Raw examples of a task.

    The constructor takes options alone and reads nothing, so that a config can be checked without data.
    """

    @property
    @abstractmethod
    def spec(self) -> DataSpec:
        """What the options alone say of the data; nothing is read."""

    @abstractmethod
    def load(self) -> Data:
        """Find (or download) and read the data.

        Raises:
            transfer.DataError: It is missing, empty or not what it should be; the message says which file to put where.
        """


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
class Occlusion:
    """A piece of a raw value, and the value without it.

    Args:
        piece: What a person would see as one: a word as the text has it (a string), a region of a picture (left, top,
            width, height); JSON alone. Strings in a row are the whole value.
        rest: The raw value with the piece taken out or covered; None where nothing would be left.
    """

    piece: Any
    rest: Any


class Preprocessing(ABC):
    """From raw values of the backbone's field to its input: a part of the backbone, because it must match pretraining.

    It comes in two halves, deterministic and random, so that the first can be done once. Objects are small and
    picklable: loader processes get a copy.
    """

    encode_once: ClassVar[bool] = False
    """Encoded values are small: a split is encoded once, as a whole, and kept in memory."""

    media_type: ClassVar[str] = "text/plain"
    """What a person gives to a server, as browsers name it: ``text/plain`` is typed, of anything else (``image/*``) a
    file is chosen."""

    parts: Mapping[str, Preprocessing] = {}
    """Those that it is made of, by the name of what each reads; a raw value is then a tuple with one of each."""

    @property
    def keep_bytes(self) -> int | None:
        """How much memory the encoded values of a split may take from one epoch to the next; none by default.

        A split that would take more is encoded anew every epoch. None: half of what is available. Values are arrays or
        tensors; for those that are slow to make (pictures), not for those that are made in no time.
        """
        return 0

    @abstractmethod
    def encode(self, values: Sequence[Any]) -> Sequence[Any]:
        """Do the deterministic half (decode and resize; tokenize and numericalise) for some raw values, in order.

        Raises:
            ValueError, OSError: One value cannot be encoded; the framework then names the example.
        """

    def augment(self, encoded: Any) -> Any:
        """Do the random half, for training examples alone; by default nothing.

        Draw only from the global generators of ``torch``, ``numpy`` and ``random``: the framework seeds them from
        (seed, epoch, example index) before the call and restores them after it.
        """
        return encoded

    @property
    def augments(self) -> bool:
        """Whether :meth:`augment` does anything; by default, whether a subclass defines it."""
        return type(self).augment is not Preprocessing.augment

    def collate(self, encoded: Sequence[Any]) -> Any:
        """Make the backbone's input of a batch of encoded (and, in training, augmented) values.

        By default these are tensors, or tuples of tensors, of the same shapes in every example, and are stacked.

        Returns:
            A tensor or a tuple of tensors, with the batch first in each.
        """
        if isinstance(encoded[0], Tensor):
            return torch.stack(list(encoded))
        return tuple(torch.stack(column) for column in zip(*encoded, strict=True))

    def length(self, encoded: Any) -> int:
        """Return the length of an encoded value: what padding to the longest makes a batch cost. By default 1."""
        return 1

    def lengths(self, encoded: Sequence[Any]) -> npt.NDArray[np.int64]:
        """Return :meth:`length` of each value of what :meth:`encode` returned, int64 (N,).

        Define it where the sequence knows all lengths at once: a split may hold millions of values.
        """
        return np.fromiter(map(self.length, encoded), dtype=np.int64, count=len(encoded))

    @abstractmethod
    def read(self, source: str) -> Any:
        """Return the raw value that a person means by ``source`` at the command line (a path, a text).

        Raises:
            transfer.DataError, ValueError, OSError: Nothing can be read there; the framework then names the source.
        """

    def read_bytes(self, content: bytes) -> Any:
        """Return the raw value that the content of a file is, or a typed text in UTF-8: what a server was sent.

        By default the content is put into a file for as long as :meth:`read` takes: what comes over a network must
        never be taken for a path.

        Raises:
            transfer.DataError, ValueError, OSError: It cannot be read.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "content"
            path.write_bytes(content)
            return self.read(str(path))

    def example(self) -> Any:
        """Return a raw value to check shapes with before any data is read; None where there is no typical one."""
        return None

    def show(
        self, inputs: Any, values: Sequence[Any], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> bytes | str | None:
        """Show some examples as the model sees them, for a person.

        Args:
            inputs: What :meth:`collate` made of them (a training batch may be augmented and mixed).
            values: Their raw values.
            captions: What stands under each, in one or more lines.
            groups: For each heading the places of the examples that stand under it, in order.

        Returns:
            The bytes of a PNG file, or a text; None (the default) where the field has no picture.
        """
        return None

    def picture(self, value: Any) -> bytes | None:
        """Return a small picture of a raw value for a page, the bytes of a JPEG or PNG file; by default there is none.

        Raises:
            ValueError, OSError: The value cannot be drawn.
        """
        return None

    def occlusions(self, value: Any) -> Iterable[Occlusion]:
        """Take a raw value apart, for explanations: each of its pieces in order, with the value that lacks it.

        By default there are no pieces, and explanations are refused.
        """
        raise NotImplementedError

    @property
    def explains(self) -> bool:
        """Whether raw values can be taken apart; by default, whether a subclass defines :meth:`occlusions`."""
        return type(self).occlusions is not Preprocessing.occlusions

    def describe(self) -> Mapping[str, Any]:
        """Return the settings that decide what the model sees, for tables and for the model folder; JSON alone."""
        return {}


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


# --------------------------------------------------------------------------------------------------------------- head


class Head(nn.Module, ABC):
    """From a backbone's features to a task's outputs: float tensor (B, out_features).

    A subclass's constructor is called as ``(features: FeatureSpec, out_features: int, *, <options>)``. Its ``forward``
    takes what the layout says: (B, D), or the pair of (B, T, D) and the mask (B, T).
    """

    layouts: ClassVar[frozenset[Layout]] = frozenset({"vector"})
    """The layouts of features that this head takes."""

    def as_linear(self) -> nn.Linear | None:
        """Return the one layer that this head is outside training, for networks that end in one; None if it is more."""
        return None


# --------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class PrimaryMetric:
    """The metric that picks the best epoch.

    Args:
        name: As :meth:`Task.metrics` has it.
        higher_is_better: Its direction.
    """

    name: str
    higher_is_better: bool


class Task(ABC):
    """What is learned: the number of outputs, the loss, the metrics and how to read a prediction. No device, no loop.

    A subclass's constructor is called as ``(data: DataSpec, *, <options>)``.
    """

    targets: ClassVar[frozenset[TargetKind]]
    """The kinds of target that this task takes."""

    primary_metric: PrimaryMetric
    """What picks the best epoch."""

    out_features: int
    """The number of outputs of the model; the constructor sets it."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (B,), of float outputs (B, out_features); the engine takes the mean."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Any]:
        """Return fresh torchmetrics by name, each to be updated with (:meth:`predictions`, targets)."""

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return what the metrics want of the outputs; by default the outputs themselves."""
        return outputs

    @abstractmethod
    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Say what each row of outputs (B, out_features) means, for a person: JSON alone, one dict per example."""

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs (B, out_features) in what a person reads: probabilities; by default as they are."""
        return outputs

    def main_output(self, scores: Tensor) -> int:
        """Return which of an example's scores (out_features,) an explanation is of; by default the first."""
        return 0

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """See the targets of the training split once before training (class weights); by default nothing."""
        return


# ------------------------------------------------------------------------------------------------------------ tracker


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run that begins or goes on.

    Args:
        folder: The run directory.
        name: What the run is called; no other has that name.
        config: The resolved config by the keys of the command line (``train.optimizer.lr``).
        known: What :meth:`Tracker.start` returned when the run began; None if it begins now.
    """

    folder: Path
    name: str
    config: Mapping[str, str | bool | int | float | None]
    known: str | None = None


class Tracker(ABC):
    """Tells another program what happens in a run. It sees figures and cannot change the run.

    The constructor takes options alone, imports nothing large and contacts nobody, so that a config can be checked.
    What a tracker raises costs a run nothing but the tracker: it is told once, and the tracker is left out from there
    on. An epoch is recorded once, also in a run that was killed and goes on.
    """

    @abstractmethod
    def start(self, run: TrackedRun) -> str | None:
        """Begin to track a run, or go on with one that is known.

        Returns:
            What identifies the run there, if it can be gone on with; it is kept in the run directory.
        """

    @abstractmethod
    def record(self, figures: Mapping[str, float], epoch: int) -> None:
        """Take the figures of an epoch, by names such as ``validation/accuracy`` and ``lr/head``.

        After the last epoch of a complete run come those of the whole run (``test/accuracy``), with its number.
        """

    @abstractmethod
    def finish(self, status: Literal["complete", "interrupted", "stopped", "failed"]) -> None:
        """End. A run that is not complete may go on later, perhaps in another process."""
