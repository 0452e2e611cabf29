"""Any model of timm as a backbone, as a plugin for transfer."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
from PIL import Image
from pydantic import Field
from timm.data import create_transform, resolve_data_config
from timm.models import VisionTransformer, group_parameters
from torch import Tensor, nn
from torchvision.transforms import v2
from transfer import Backbone, ConfigError, FeatureSpec, Preprocessing, WeightsError


class TimmPreprocessing(Preprocessing):
    """Pictures as timm evaluates them; in training, shifted by up to an eighth and turned over."""

    def __init__(self, config: Mapping[str, Any], augmentation: bool) -> None:
        self.config, self.augmentation = dict(config), augmentation

    def encode(self, values: Sequence[Image.Image]) -> list[Tensor]:
        """Return float32 (3, H, W) of PIL images, resized, cropped and normalised."""
        transform = create_transform(**self.config, is_training=False)
        return [transform(picture.convert("RGB")) for picture in values]

    def augment(self, encoded: Tensor) -> Tensor:
        """Shift and flip a picture at random."""
        if not self.augmentation:
            return encoded
        size = encoded.shape[-2:]
        crop = v2.RandomCrop(size, padding=max(size) // 8, padding_mode="reflect")
        return v2.RandomHorizontalFlip()(crop(encoded))

    @property
    def augments(self) -> bool:
        """Whether it does."""
        return self.augmentation

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return float32 (B, 3, H, W)."""
        return torch.stack(list(encoded))

    def read(self, source: str) -> Image.Image:
        """Read a picture file."""
        with Image.open(source) as picture:
            return picture.convert("RGB")

    def example(self) -> Image.Image:
        """Return a grey picture."""
        return Image.fromarray(np.full((*self.config["input_size"][1:], 3), 128, dtype=np.uint8))

    def describe(self) -> Mapping[str, Any]:
        """Return timm's settings."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in self.config.items()}


class Timm(Backbone):
    """Any model of timm (https://huggingface.co/docs/timm), by its name there.

    Stages are timm's own layer groups, ``stem``, ``stage1``, ``stage2`` ..., and ``pool``; a model that is no chain of
    them has one stage, ``network``.

    Args:
        model: Timm's name, with a tag of its weights or without: ``resnet50.a1_in1k``.
        weights: ``pretrained``: those that the name says, from the Hugging Face Hub. Or a file in timm's layout, with
            a classifier or without. Or null: random initialisation.
        image_size: Height and width of what the model sees, in pixels; null: as timm's configuration of the model says.
        augmentation: Shift and flip training pictures at random.
    """

    field = "image"

    def __init__(
        self,
        *,
        model: str,
        weights: str | None = "pretrained",
        image_size: Annotated[int, Field(ge=1)] | None = None,
        augmentation: bool = True,
    ) -> None:
        if not timm.is_model(model):
            close = timm.list_models(f"*{model.split('.')[0]}*")[:10] or timm.list_models(f"{model[:4]}*")[:10]
            raise ConfigError(f"timm has no model called {model!r}", available=close)
        self._name, self._weights, self._size, self._augmentation = model, weights, image_size, augmentation
        network = self._create()
        config = resolve_data_config(pretrained_cfg=network.pretrained_cfg)
        if image_size is not None:
            config["input_size"] = (3, image_size, image_size)
        self._config = config
        with torch.device("meta"):
            self._chain = chain(self._create(), torch.empty(2, *config["input_size"]))
        super().__init__(split(network, self._chain))
        self._features = int(getattr(network, "head_hidden_size", None) or network.num_features)

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
    def preprocessing(self) -> TimmPreprocessing:
        """As timm evaluates the model."""
        return TimmPreprocessing(self._config, self._augmentation)

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


_STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
"""What a vision transformer does before its blocks, adding positions in between."""
Chain = Mapping[str, Sequence[str]]
"""Of each stage the paths of its layers, in order."""


def chain(network: nn.Module, pictures: Tensor) -> Chain | None:
    """Return the stages before the pooling, or None where the layers do not hand on one tensor from each to the next."""
    groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    groups = {name: number for name, number in groups.items() if isinstance(number, int | float)}
    layers = list(_layers(network, groups))
    calls: list[tuple[str, Any, Any]] = []
    for path in layers:

        def note(_: nn.Module, inputs: Any, options: Any, output: Any, path: str = path) -> None:
            others = [value for value in (*inputs[1:], *options.values()) if value is not None]
            calls.append((path, None if others or not inputs else inputs[0], output))

        network.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        features = network.eval().forward_features(pictures)
    value: Any = pictures
    stages: dict[str, list[str]] = {"stem": []}
    number = 0.0
    if isinstance(network, VisionTransformer):
        stages["stem"] += _STEM
        value = next((output for path, _, output in calls if path == "norm_pre"), None)
        calls = [call for call in calls if call[0] not in _STEM]
    for path, given, output in calls:
        if given is not value or any(path in paths for paths in stages.values()):
            return None
        value, group = output, max([n for name, n in groups.items() if name.startswith(f"{path}.")], default=number)
        if group > number:
            number = group
            stages[f"stage{len(stages)}"] = []
        list(stages.values())[-1].append(path)
    return stages if value is features and isinstance(features, Tensor) and stages["stem"] else None


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
        return {"network": _Network(network)}
    parts: dict[str, nn.Module] = {}
    for name, paths in stages.items():
        embeds = paths[: len(_STEM)] == list(_STEM) and isinstance(network, VisionTransformer)
        parts[name] = _Stem(network) if embeds else nn.Sequential(*(network.get_submodule(path) for path in paths))
    used = {path.split(".")[0] for paths in stages.values() for path in paths}
    embeds = isinstance(network, VisionTransformer)
    left = {name for name, _ in network.named_children()} - used
    return parts | {"pool": _Pool(_part(network, left, tensors=not embeds))}


def _part(network: nn.Module, children: Collection[str], *, tensors: bool) -> nn.Module:
    """Return a network with some of its children alone, and with or without the tensors that are its own."""
    part = copy.copy(network)
    part._modules = {name: child for name, child in network.named_children() if name in children}
    if not tensors:
        part._parameters, part._buffers = {}, {}
    return part


class _Network(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Any:
        return self.network.forward_head(self.network.forward_features(pictures), pre_logits=True)


class _Stem(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = _part(network, _STEM, tensors=True)

    def forward(self, pictures: Tensor) -> Any:
        patches = self.network._pos_embed(self.network.patch_embed(pictures))
        return self.network.norm_pre(self.network.patch_drop(patches))


class _Pool(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> Any:
        return self.network.forward_head(features, pre_logits=True)
