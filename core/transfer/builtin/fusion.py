"""Fusion of several backbones, each with its own input field, as one chain of stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from transfer import load_saved_backbone, saved_backbone
from transfer.config.check import load_component
from transfer.config.component import Component, error_location, require_complete
from transfer.errors import ConfigError, DataError
from transfer.interfaces import Backbone, Columns, FeatureSpec, Preprocessing

_JOIN = "join"


class Fusion(Backbone):
    """Several backbones, each with its own field of an example; their features are concatenated or gated.

    The stages of a part have its name as a prefix: ``image.layer4``. ``image`` means all stages of that part. The gates
    are those of the gated multimodal unit (Arevalo et al. 2017, https://arxiv.org/abs/1702.01992): every part is
    projected to the same size, and a softmax over the parts weights each feature of each example.

    Args:
        parts: Config block of the backbone of each part, by name.
        join: Whether the features are concatenated or weighted by gates.
        size: Number of features after the gates.
    """

    def __init__(
        self,
        *,
        parts: Annotated[dict[str, dict[str, Any]], Field(min_length=2)],
        join: Literal["concatenate", "gate"] = "concatenate",
        size: Annotated[int, Field(gt=0)] = 128,
    ) -> None:
        blocks = _blocks(parts)
        built = {name: _from_run(block) if block.weights else block.make() for name, block in blocks.items()}
        self._compose(blocks, built, join, size)
        _refuse_shared_fields(built)

    def _compose(self, blocks: dict[str, Component], parts: dict[str, Backbone], join: str, size: int) -> None:
        vectors = {name: part.features.size for name, part in parts.items() if part.features.layout == "vector"}
        if others := sorted(parts.keys() - vectors.keys()):
            raise ConfigError(
                f"the part {others[0]!r} of a fusion returns a sequence: expected a vector",
                fix="choose a readout of that backbone that returns a vector",
            )
        stages: dict[str, nn.Module] = {
            f"{name}.{stage}": _BranchStage(index, module)
            for index, (name, part) in enumerate(parts.items())
            for stage, module in zip(part.stage_names, part.stages, strict=True)
        }
        sizes = list(vectors.values())
        stages[_JOIN] = _Gates(sizes, size) if join == "gate" else _Concatenation()
        super().__init__(stages)
        self._blocks = blocks
        self._parts = tuple(parts.items())  # a tuple, because nn.Module would register the stages a second time
        self._size = size if join == "gate" else sum(sizes)

    @property
    def parts(self) -> dict[str, Backbone]:
        """The backbones by name, in order."""
        return dict(self._parts)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of all parts, in order."""
        return tuple(part.fields[0] for part in self.parts.values())

    @property
    def unsized_stages(self) -> tuple[str, ...]:
        """The unsized stages of all parts."""
        return tuple(f"{name}.{stage}" for name, part in self.parts.items() for stage in part.unsized_stages)

    @property
    def features(self) -> FeatureSpec:
        """A vector: the concatenated features, or the output of the gates."""
        return FeatureSpec("vector", self._size)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of all parts."""
        return _FusionPreprocessing({name: part.preprocessing for name, part in self.parts.items()})

    @classmethod
    def from_data(cls, values: Sequence[Any], **options: Any) -> Self:
        """Build every part from its column of the training split, or from the assets of its run."""
        blocks = _blocks(options["parts"])
        parts = {
            name: _from_run(block) if block.weights else block.cls.from_data(column, **block.options)
            for (name, block), column in zip(blocks.items(), _columns_of(values), strict=True)
        }
        return cls._of(blocks, parts, options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build every part from its own assets."""
        parts, blocks = {}, _blocks(options["parts"])
        for name, block in blocks.items():
            part_assets = {
                key.removeprefix(f"{name}."): text for key, text in assets.items() if key.startswith(f"{name}.")
            }
            parts[name] = block.cls.from_assets(part_assets, **block.options)
        return cls._of(blocks, parts, options)

    @classmethod
    def _of(cls, blocks: dict[str, Component], parts: dict[str, Backbone], options: Mapping[str, Any]) -> Self:
        # Not __init__(), which would build the parts from their options, without data or assets.
        fusion = cls.__new__(cls)
        fusion._compose(blocks, parts, options["join"], options["size"])
        return fusion

    def assets(self) -> Mapping[str, str]:
        """Return the assets of every part, under ``PART.FILE``."""
        return {f"{name}.{key}": text for name, part in self.parts.items() for key, text in part.assets().items()}

    @classmethod
    def is_pretrained(cls, options: Mapping[str, Any]) -> bool:
        """Return whether all parts start from pretrained weights: the others need the rates of new layers."""
        return all(block.cls.is_pretrained(block.options) for block in _blocks(options["parts"]).values())

    @classmethod
    def without_pretrained(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options of every part that change for random initialization."""
        blocks = {name: block.without_pretrained() for name, block in _blocks(options["parts"]).items()}
        return {"parts": {name: block.resolved for name, block in blocks.items()}}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the pretrained weights of every part."""
        loaded = {}
        for name, part in self.parts.items():
            block = self._blocks[name]
            if block.weights:
                with error_location(block.where):
                    source = saved_backbone(block.weights, block.plugin.name)
                    loaded[name] = {"weights": block.weights, **load_saved_backbone(part, source, block.resolved)}
            elif read := dict(part.load_pretrained()):
                loaded[name] = read
        return loaded


def _blocks(parts: Mapping[str, dict[str, Any]]) -> dict[str, Component]:
    for name in parts:
        if not name.isidentifier() or name in ("head", _JOIN):
            raise ConfigError(f"a part of a fusion cannot be called {name!r}", fix="use a plain word, such as image")
    blocks = {name: load_component("backbone", block, f"backbone.parts.{name}") for name, block in parts.items()}
    for name, block in blocks.items():
        if issubclass(block.cls, Fusion):
            raise ConfigError(f"the part {name!r} is itself a fusion", fix="name all its parts in one fusion")
    return blocks


def _from_run(block: Component) -> Backbone:
    """Build a part with the assets of the run that it starts from, such as a vocabulary."""
    assert block.weights is not None
    with error_location(block.where):
        backbone: Backbone = block.cls.from_assets(
            saved_backbone(block.weights, block.plugin.name).assets, **block.options
        )
        require_complete(block, backbone)
        return backbone


def _refuse_shared_fields(parts: Mapping[str, Backbone]) -> None:
    """Refuse parts that take the same field. Models that were saved before this check can still be loaded."""
    by_field: dict[str, str] = {}
    for name, part in parts.items():
        field = part.fields[0]
        if (other := by_field.setdefault(field, name)) != name:
            raise ConfigError(
                f"the parts {other!r} and {name!r} of a fusion take the same field {field!r}: expected one field each",
                fix="use one backbone for each field; a text table combines the columns of a list into one text, "
                "data.text: [premise, hypothesis]",
            )


def _columns_of(values: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Return the column of each part, without reading it: a vocabulary does not need the images of the other part."""
    return values.columns if isinstance(values, Columns) else list(zip(*values, strict=True))


class _BranchStage(nn.Sequential):
    """A stage of one branch: it transforms the value of that branch and passes on the others.

    Between the stages of a fusion passes a tuple with one value per branch. Stages of different branches run one after
    the other, so that freezing and the feature cache can treat the fusion as a chain.

    Args:
        index: Index of the branch's value in the tuple.
        stage: Stage of the backbone of that branch.
    """

    def __init__(self, index: int, stage: nn.Module) -> None:
        super().__init__(stage)
        self.index = index

    @property
    def recompute(self) -> bool:
        return bool(getattr(self[0], "recompute", False))

    def forward(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*values[: self.index], self[0](values[self.index]), *values[self.index + 1 :])


class _Concatenation(nn.Module):
    """Concatenation of features (B, D1), (B, D2), ... to (B, D1 + D2 + ...)."""

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(features, dim=1)


class _Gates(nn.Module):
    """Gated multimodal unit: features (B, D1), (B, D2), ... to (B, size)."""

    def __init__(self, sizes: Sequence[int], size: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(one, size) for one in sizes)
        self.gates = nn.Linear(sum(sizes), len(sizes) * size)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        projected = torch.stack([torch.tanh(p(f)) for p, f in zip(self.projections, features, strict=True)], dim=1)
        gates = self.gates(torch.cat(features, dim=1)).view_as(projected).softmax(dim=1)
        fused: Tensor = (gates * projected).sum(dim=1)
        return fused


class _FusionPreprocessing(Preprocessing):
    """Preprocessing of several parts; a raw value is a tuple with one value per part."""

    def __init__(self, parts: Mapping[str, Preprocessing]) -> None:
        self.parts: Mapping[str, Preprocessing] = dict(parts)

    def encode(self, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Encode the values of each part."""
        columns = zip(*values, strict=True)
        return list(zip(*(p.encode(c) for p, c in zip(self.parts.values(), columns, strict=True)), strict=True))

    def augment(self, encoded: tuple[Any, ...]) -> tuple[Any, ...]:
        """Augment the values of the parts that have an augmentation."""
        parts = zip(self.parts.values(), encoded, strict=True)
        return tuple(part.augment(value) if part.augments else value for part, value in parts)

    @property
    def augments(self) -> bool:
        """Whether a part has an augmentation."""
        return any(part.augments for part in self.parts.values())

    def collate(self, encoded: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return a tuple with the input of each part."""
        return tuple(p.collate(c) for p, c in zip(self.parts.values(), zip(*encoded, strict=True), strict=True))

    def to_device(self, inputs: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
        """Move and complete the input of each part."""
        return tuple(p.to_device(part, device) for p, part in zip(self.parts.values(), inputs, strict=True))

    def length(self, encoded: tuple[Any, ...]) -> int:
        """Return the length of the longest part."""
        return max(part.length(value) for part, value in zip(self.parts.values(), encoded, strict=True))

    @property
    def varies_in_length(self) -> bool:
        """Whether the values of a part vary in length."""
        return any(part.varies_in_length for part in self.parts.values())

    def read(self, source: str) -> tuple[Any, ...]:
        """Read a JSON object with one source per part: ``{"image": "a.jpg", "text": "a dog"}``.

        The source of an image is its path. The source of a text is the text itself.
        """
        fix = f"write a JSON object with {' and '.join(self.parts)}"
        try:
            sources = json.loads(source)
        except ValueError as error:
            raise DataError(f"{source!r} is no JSON object", fix=fix) from error
        if not isinstance(sources, dict):
            raise DataError(f"{source!r} is no JSON object", fix=fix)
        return self.read_value(sources)

    def read_bytes(self, content: bytes) -> tuple[Any, ...]:
        """Read a JSON object in UTF-8."""
        return self.read(content.decode("utf-8-sig"))

    def read_value(self, source: Any) -> tuple[Any, ...]:
        """Return the raw value for a JSON object, or for a mapping or tuple with one source per part."""
        if isinstance(source, tuple) and len(source) == len(self.parts):
            source = dict(zip(self.parts, source, strict=True))
        if not isinstance(source, Mapping):
            value: tuple[Any, ...] = super().read_value(source)
            return value
        if sorted(source) != sorted(self.parts):
            fix = f"write a JSON object with {' and '.join(self.parts)}"
            raise DataError(f"{source!r} has not exactly one source for each part", available=self.parts, fix=fix)
        return tuple(part.read_value(source[name]) for name, part in self.parts.items())

    def unknown_fraction(self, encoded: tuple[Any, ...]) -> float:
        """Return the smallest fraction of the parts: a value is known if one of its parts is."""
        return min(part.unknown_fraction(value) for part, value in zip(self.parts.values(), encoded, strict=True))

    def example(self) -> tuple[Any, ...] | None:
        """Return a tuple with an example of each part; None if a part has none."""
        examples = tuple(part.example() for part in self.parts.values())
        return None if any(example is None for example in examples) else examples

    def restore(self, described: Mapping[str, Any]) -> None:
        """Restore the settings of each part."""
        for name, part in self.parts.items():
            part.restore(described[name])

    def describe(self) -> Mapping[str, Any]:
        """Return the settings of each part."""
        return {name: dict(part.describe()) for name, part in self.parts.items()}

    def warning(self, values: Sequence[Any]) -> str | None:
        """Return the warnings of the parts, with their names."""
        columns = _columns_of(values)
        warnings = {n: p.warning(c) for (n, p), c in zip(self.parts.items(), columns, strict=True)}
        return "; ".join(f"{name}: {text}" for name, text in warnings.items() if text) or None
