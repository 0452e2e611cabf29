"""A backbone from any model of timm, as a plugin for transfer."""

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
    """Any model of timm (https://huggingface.co/docs/timm), by its timm name.

    Stages are timm's layer groups, ``stem``, ``stage1``, ``stage2`` ..., and ``pool``. A model whose groups do not form
    a chain has one stage, ``network``.

    Args:
        model: Name of the model in timm, with or without the tag of its weights, for example ``resnet50.a1_in1k``.
        weights: ``pretrained``: the weights of that name, from the Hugging Face Hub. Otherwise a file in timm's layout,
            with or without a classifier, or null for random initialization.
        image_size: Height and width of the model input in pixels; null: the value in timm's configuration of the model.
        augmentation: Augmentation of training images: ``default`` (a random resized crop and a horizontal flip),
            ``strong`` (also TrivialAugment and random erasing), ``none``, or a list of torchvision.transforms.v2
            classes with options.
        cache_images: Memory for decoded and resized images, kept between epochs: ``auto`` (if the images of a split fit
            into half of the available memory), ``off``, or a limit in GiB.
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
        """One vector per image, the input of timm's classifier."""
        return FeatureSpec("vector", self._features)

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """Preprocessing with the settings of timm's evaluation."""
        return ImagePreprocessing(**self._settings, **self._loading)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build the backbone with its saved preprocessing.

        In another version of timm, the same name may refer to other weights with other preprocessing.
        """
        return cls(json.loads(assets["preprocessing.json"]), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the settings of the preprocessing as JSON."""
        return {"preprocessing.json": json.dumps(self._settings)}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the weights with timm, which downloads them, renames tensors and drops the classifier."""
        if self._weights is None:
            return {}
        file = None if self._weights == "pretrained" else self._weights
        if file is not None and not Path(file).is_file():
            raise WeightsError(f"there are no weights {file!r}", fix="use a file in timm's layout, or pretrained")
        try:
            network = self._create(pretrained=True, pretrained_cfg_overlay={"file": file} if file else None)
        except Exception as error:  # the Hub and the file formats raise exceptions of many types
            fix = "use a file in timm's layout, or weights: null"
            raise WeightsError(f"timm cannot read weights of {self._name}: {error}", where=file, fix=fix) from error
        self.stages.load_state_dict(nn.ModuleDict(split(network, self._chain)).state_dict())
        return {"weights": self._weights, "timm": timm.__version__}


def preprocessing_of(network: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return the settings of ImagePreprocessing for a model, from timm's configuration of it."""
    config = resolve_data_config(pretrained_cfg=network.pretrained_cfg)
    _, height, width = config["input_size"]
    if image_size is None and height != width:
        raise ConfigError(f"the model input is not square: got {height} x {width} pixels", fix="set image_size")
    size = image_size or height
    names = ("interpolation", "mean", "std")
    return {"image_size": size, "resize": int(size / config["crop_pct"]), **{name: config[name] for name in names}}


_STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
"""Layers of a vision transformer before its blocks; it adds position embeddings between them."""
Chain = Mapping[str, Sequence[str]]
"""Paths of the layers of each stage, in order."""


def chain(network: nn.Module, images: Tensor) -> Chain | None:
    """Return the stages before the pooling, or None if the layers do not form a chain.

    In a chain, each layer receives exactly the tensor that the previous one returned.
    """
    groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    groups = {name: number for name, number in groups.items() if isinstance(number, int | float)}
    embeds = isinstance(network, VisionTransformer)
    layers = {path: network.get_submodule(path) for path in _layers(network, groups) if not embeds or path not in _STEM}
    # A vision transformer adds position embeddings outside of any layer. `norm_pre` is the first layer that receives
    # the result, so the chain is checked from there on.
    first = {"norm_pre": network.norm_pre} if embeds else {}
    run = network.eval().forward_features
    links = find_chain(first | layers, lambda: run(images), None if embeds else images)
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
    """Return the paths of a network's children. A container with several groups is replaced by its children."""
    paths: list[str] = []
    for name, child in network.named_children():
        numbers = {number for parameter, number in groups.items() if parameter.startswith(f"{name}.")}
        inside = [f"{name}.{key}" for key, _ in child.named_children()]
        paths += inside if len(numbers) > 1 and isinstance(child, nn.Sequential | nn.ModuleList) else [name]
    return paths


def split(network: nn.Module, stages: Chain | None) -> dict[str, nn.Module]:
    """Return the stages of a network; a single one if it has no chain."""
    if stages is None:
        return {"network": _Part(network, [name for name, _ in network.named_children()], _forward_network)}
    embeds = isinstance(network, VisionTransformer)
    parts = {name: nn.Sequential(*map(network.get_submodule, paths)) for name, paths in stages.items()}
    used = {path.split(".")[0] for paths in stages.values() for path in paths}
    left = [name for name, _ in network.named_children() if name not in used]
    stem = {"stem": _Part(network, _STEM, _embed)} if embeds else {}
    return {**parts, **stem, "pool": _Part(network, left, _pool, tensors=not embeds)}


def _forward_network(network: Any, images: Tensor) -> Any:
    return _pool(network, network.forward_features(images))


def _embed(network: Any, images: Tensor) -> Any:
    return network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images))))


def _pool(network: Any, features: Tensor) -> Any:
    return network.forward_head(features, pre_logits=True)


class _Part(nn.Module):
    """A function of a network, as a stage that owns only some of the network's children.

    Args:
        network: The network; it is copied without its other children.
        children: Names of the children that belong to the stage.
        function: The forward function, called with the reduced network and the input of the stage.
        tensors: Whether the stage also owns the parameters and buffers of the network itself.
    """

    def __init__(self, network: nn.Module, children: Collection[str], function: Any, *, tensors: bool = True) -> None:
        super().__init__()
        self.network, self.function = copy.copy(network), function
        self.network._modules = {name: network.get_submodule(name) for name in children}
        if not tensors:
            self.network._parameters, self.network._buffers = {}, {}

    def forward(self, values: Tensor) -> Any:
        return self.function(self.network, values)
