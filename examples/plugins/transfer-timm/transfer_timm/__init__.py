"""Any model of timm as a backbone, as a plugin for transfer."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import timm
import torch
from pydantic import Field
from timm.data import resolve_data_config
from timm.models import VisionTransformer, group_parameters
from torch import Tensor, nn
from transfer import Backbone, ConfigError, FeatureSpec, WeightsError, find_chain
from transfer_vision.preprocessing import Augmentation, CacheImages, ImagePreprocessing


class Timm(Backbone):
    """Any model of timm (https://huggingface.co/docs/timm), by its name there.

    Stages are timm's own layer groups, ``stem``, ``stage1``, ``stage2`` ..., and ``pool``; a model that is no chain of
    them has one stage, ``network``.

    Args:
        model: Timm's name, with a tag of its weights or without: ``resnet50.a1_in1k``.
        weights: ``pretrained``: those that the name says, from the Hugging Face Hub. Or a file in timm's layout, with
            a classifier or without. Or null: random initialisation.
        image_size: Height and width of what the model sees, in pixels; null: as timm's configuration of the model says.
        augmentation: For training: ``usual`` (a random resized crop and a horizontal flip), ``strong`` (with
            TrivialAugment and random erasing), ``none``, or a list of torchvision.transforms.v2 classes with options.
        cache_images: Keep decoded and resized pictures in memory from one epoch to the next: ``auto`` (where those of
            a split fit into half of the memory that is available), ``off``, or into so many GiB.
    """

    field = "image"

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        model: str,
        weights: str | None = "pretrained",
        image_size: Annotated[int, Field(ge=1)] | None = None,
        augmentation: Augmentation = "usual",
        cache_images: CacheImages = "auto",
    ) -> None:
        if not timm.is_model(model):
            close = timm.list_models(f"*{model.split('.')[0]}*")[:10] or timm.list_models(f"{model[:4]}*")[:10]
            raise ConfigError(f"timm has no model called {model!r}", available=close)
        self._name, self._weights, self._size = model, weights, image_size
        network = self._create()
        self._settings = settings or preprocessing_of(network, image_size)
        size = self._settings["image_size"]
        with torch.device("meta"):
            self._chain = chain(self._create(), torch.empty(2, 3, size, size))
        super().__init__(split(network, self._chain))
        self._features = int(getattr(network, "head_hidden_size", None) or network.num_features)
        self._loading: dict[str, Any] = {"augmentation": augmentation, "cache_images": cache_images}

    def _create(self, **options: Any) -> nn.Module:
        fixed = getattr(timm.get_pretrained_cfg(self._name), "fixed_input_size", False)
        size = {"img_size": self._size} if self._size and fixed else {}
        network: nn.Module = timm.create_model(self._name, num_classes=0, **size, **options)
        return network

    @property
    def features(self) -> FeatureSpec:
        """A vector per picture: what timm's classifier would get."""
        return FeatureSpec("vector", self._features)

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """As timm evaluates the model."""
        return ImagePreprocessing(**self._settings, **self._loading)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build it with the preprocessing that it was trained with: a name may mean other weights in another timm."""
        return cls(json.loads(assets["preprocessing.json"]), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the settings of the preprocessing."""
        return {"preprocessing.json": json.dumps(self._settings)}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Let timm read the weights: it downloads them, renames tensors and leaves the classifier out."""
        if self._weights is None:
            return {}
        file = None if self._weights == "pretrained" else self._weights
        if file is not None and not Path(file).is_file():
            raise WeightsError(f"there are no weights {file!r}", fix="give a file in timm's layout, or pretrained")
        try:
            network = self._create(pretrained=True, pretrained_cfg_overlay={"file": file} if file else None)
        except Exception as error:  # whatever the Hub and the file formats raise
            fix = "give a file in timm's layout, or weights: null"
            raise WeightsError(f"timm cannot read weights of {self._name}: {error}", where=file, fix=fix) from error
        self.stages.load_state_dict(nn.ModuleDict(split(network, self._chain)).state_dict())
        return {"weights": self._weights, "timm": timm.__version__}


def preprocessing_of(network: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return how timm's configuration of a model says that pictures become its input."""
    config = resolve_data_config(pretrained_cfg=network.pretrained_cfg)
    _, height, width = config["input_size"]
    if image_size is None and height != width:
        raise ConfigError(
            f"the model sees pictures of {height} x {width} pixels", fix="set image_size: they are square"
        )
    size = image_size or height
    names = ("interpolation", "mean", "std")
    return {"image_size": size, "resize": int(size / config["crop_pct"]), **{name: config[name] for name in names}}


_STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
"""What a vision transformer does before its blocks, adding positions in between."""
Chain = Mapping[str, Sequence[str]]
"""Of each stage the paths of its layers, in order."""


def chain(network: nn.Module, pictures: Tensor) -> Chain | None:
    """Return the stages before the pooling, or None where the layers do not hand on one tensor from each to the next."""
    groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    groups = {name: number for name, number in groups.items() if isinstance(number, int | float)}
    embeds = isinstance(network, VisionTransformer)
    layers = {path: network.get_submodule(path) for path in _layers(network, groups) if not embeds or path not in _STEM}
    first = {"norm_pre": network.norm_pre} if embeds else {}  # which gets patches with their positions added
    run = network.eval().forward_features
    links = find_chain(first | layers, lambda: run(pictures), None if embeds else pictures)
    if links is None:
        return None
    stages: dict[str, list[str]] = {"stem": list(_STEM) if embeds else []}
    number = 0.0
    for path in links[len(first) :]:
        group = max((n for name, n in groups.items() if name.startswith(f"{path}.")), default=number)
        if group > number:
            number = group
            stages[f"stage{len(stages)}"] = []
        list(stages.values())[-1].append(path)
    return stages if stages["stem"] else None


def _layers(network: nn.Module, groups: Mapping[str, float]) -> list[str]:
    """Return the paths of a network's children, and of a container's where those are of several groups."""
    paths: list[str] = []
    for name, child in network.named_children():
        numbers = {number for parameter, number in groups.items() if parameter.startswith(f"{name}.")}
        inside = [f"{name}.{key}" for key, _ in child.named_children()]
        paths += inside if len(numbers) > 1 and isinstance(child, nn.Sequential | nn.ModuleList) else [name]
    return paths


def split(network: nn.Module, stages: Chain | None) -> dict[str, nn.Module]:
    """Take a network apart; without a chain it stays whole."""
    if stages is None:
        return {"network": _Part(network, [name for name, _ in network.named_children()], _whole)}
    embeds = isinstance(network, VisionTransformer)
    parts = {name: nn.Sequential(*map(network.get_submodule, paths)) for name, paths in stages.items()}
    used = {path.split(".")[0] for paths in stages.values() for path in paths}
    left = [name for name, _ in network.named_children() if name not in used]
    stem = {"stem": _Part(network, _STEM, _embed)} if embeds else {}
    return {**parts, **stem, "pool": _Part(network, left, _pool, tensors=not embeds)}


def _whole(network: Any, pictures: Tensor) -> Any:
    return _pool(network, network.forward_features(pictures))


def _embed(network: Any, pictures: Tensor) -> Any:
    return network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(pictures))))


def _pool(network: Any, features: Tensor) -> Any:
    return network.forward_head(features, pre_logits=True)


class _Part(nn.Module):
    """What a function does with a network that has some of its children alone, and its own tensors or none."""

    def __init__(self, network: nn.Module, children: Collection[str], function: Any, *, tensors: bool = True) -> None:
        super().__init__()
        self.network, self.function = copy.copy(network), function
        self.network._modules = {name: network.get_submodule(name) for name in children}
        if not tensors:
            self.network._parameters, self.network._buffers = {}, {}

    def forward(self, values: Tensor) -> Any:
        return self.function(self.network, values)
