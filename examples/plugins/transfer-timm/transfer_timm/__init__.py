"""Any model of timm as a backbone, as a plugin for transfer."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import timm
import torch
from pydantic import Field
from timm.data import resolve_data_config
from timm.models import VisionTransformer, group_parameters, load_state_dict
from torch import Tensor, nn
from transfer import Backbone, ConfigError, FeatureSpec, WeightsError, find_chain
from transfer_vision.preprocessing import Augmentation, CacheImages, ImagePreprocessing, Interpolation

MAX_NAMES = 6


class Timm(Backbone):
    """Any model of timm (https://huggingface.co/docs/timm), by its name there.

    The stages are timm's layer groups, ``stem``, ``stage1``, ``stage2`` ..., and ``pool``. A model that is no chain of
    its layer groups has one stage, ``network``.

    Args:
        model: Name of the model in timm, optionally with the tag of its weights: ``resnet50.a1_in1k``.
        weights: ``pretrained`` for the weights of the name, from the Hugging Face Hub; a file with timm's names, with
            or without a classifier; or null for random initialization.
        image_size: Height and width of the model's input, in pixels; null: from timm's configuration of the model.
        augmentation: Random augmentation of training images: ``default`` (a random resized crop and a horizontal
            flip), ``strong`` (with TrivialAugment and random erasing), ``none``, or a list of torchvision.transforms.v2
            classes with options.
        cache_images: Memory for decoded and resized images, which are kept between epochs if those of a split fit:
            ``auto`` (half of the available memory), ``off``, or a number of GiB.
    """

    field = "image"

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        model: str,
        weights: str | None = "pretrained",
        image_size: Annotated[int, Field(ge=1)] | None = None,
        augmentation: Augmentation = "default",
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
        """A vector per image, the input of timm's classifier."""
        return FeatureSpec("vector", self._features)

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """The preprocessing with which timm evaluates the model."""
        return ImagePreprocessing(**self._settings, **self._loading)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build the backbone with its saved preprocessing: in another timm the name may mean another one."""
        return cls(json.loads(assets["preprocessing.json"]), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the settings of the preprocessing."""
        return {"preprocessing.json": json.dumps(self._settings)}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the weights through timm, which downloads them and renames old tensors.

        Returns:
            ``weights`` (the option), ``timm`` (its version), ``tensors`` (the number of loaded tensors) and ``left_out``
            (the names of tensors that were not loaded, because the head replaces the classifier).

        Raises:
            WeightsError: The weights cannot be read, or are not exactly those of this model without its classifier.
        """
        if self._weights is None:
            return {}
        file = None if self._weights == "pretrained" else self._weights
        if file is not None and not Path(file).is_file():
            raise WeightsError(f"there are no weights {file!r}", fix="give a file with timm's names, or pretrained")
        try:
            with recorded_loads() as loads:
                network = self._create(pretrained=True, pretrained_cfg_overlay={"file": file} if file else None)
        except Exception as error:  # any exception of the Hub and the file formats
            fix = "give a file with timm's names, or weights: null"
            raise WeightsError(f"timm cannot read weights of {self._name}: {error}", where=file, fix=fix) from error
        load = next((load for load in reversed(loads) if load.module is network), None)
        if load is None:
            raise WeightsError(f"timm loaded no weights into {self._name}", where=file, fix="give another file")
        left_out = classifier_names(network, load, file)
        require_complete(self._name, load, left_out, file)
        self.stages.load_state_dict(nn.ModuleDict(split(network, self._chain)).state_dict())
        facts = {"weights": self._weights, "timm": timm.__version__, "tensors": load.tensors}
        return {**facts, "left_out": sorted(left_out)}


@dataclass(frozen=True)
class Load:
    """A call of ``load_state_dict``.

    Args:
        module: Module that was loaded.
        tensors: Number of tensors that were loaded.
        missing: Names of the module's tensors that the state dict lacks.
        unexpected: Names in the state dict that the module lacks.
    """

    module: nn.Module
    tensors: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@contextmanager
def recorded_loads() -> Iterator[list[Load]]:
    """Record every call of ``load_state_dict`` in the block.

    For a model without a classifier timm loads weights with ``strict=False`` and only logs the names that do not fit:
    a file with other names would load nothing. The result of the call is not accessible otherwise.
    """
    loads: list[Load] = []
    original = nn.Module.load_state_dict

    def recording(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        result = original(module, state_dict, *args, **options)
        tensors = len(state_dict.keys() & module.state_dict().keys())
        loads.append(Load(module, tensors, tuple(result.missing_keys), tuple(result.unexpected_keys)))
        return result

    nn.Module.load_state_dict = recording  # type: ignore[method-assign]
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def classifier_names(network: nn.Module, load: Load, file: str | None) -> set[str]:
    """Return the names of the classifier's tensors in the weights, which timm removes or reports as unexpected."""
    config = network.pretrained_cfg
    classifiers = config.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    # timm removes the classifier of published weights before it loads them; a file may lack one.
    removed = {f"{prefix}{key}" for prefix in prefixes for key in ("weight", "bias") if config.get("num_classes")}
    names = set(load_state_dict(file, device="cpu")) if file else removed
    return {name for name in (*names, *load.unexpected) if name.startswith(prefixes)} if prefixes else set()


def require_complete(model: str, load: Load, left_out: Collection[str], file: str | None) -> None:
    """Require that every tensor of the model was loaded, and that nothing but a classifier is left over.

    Raises:
        WeightsError: Nothing was loaded, or tensors are missing or left over.
    """
    left_over = [name for name in load.unexpected if name not in left_out]
    if load.tensors and not load.missing and not left_over:
        return
    problems = {"missing": load.missing, "left over": left_over}
    names = "; ".join(f"{kind}: {_abbreviated(found)}" for kind, found in problems.items() if found)
    fix = "give a file with timm's names, without a prefix; weights of a run of transfer have other names"
    total = len(load.module.state_dict())
    raise WeightsError(f"{load.tensors} of {total} tensors of {model} were loaded; {names}", where=file, fix=fix)


def _abbreviated(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def preprocessing_of(network: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return the arguments of ImagePreprocessing that agree with timm's data configuration of a model."""
    config = resolve_data_config(pretrained_cfg=network.pretrained_cfg)
    _, height, width = config["input_size"]
    if image_size is None and height != width:
        raise ConfigError(
            f"the model's input is not square: {height} x {width} pixels", fix="set image_size to another size"
        )
    if config["interpolation"] not in get_args(Interpolation):
        raise ConfigError(
            f"timm resizes images for this model with {config['interpolation']!r}, which is not supported",
            available=get_args(Interpolation),
        )
    size = image_size or height
    return {
        "image_size": size,
        "resize": int(size / config["crop_pct"]),
        "crop_mode": config.get("crop_mode") or "center",
        **{name: config[name] for name in ("interpolation", "mean", "std")},
    }


_STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
"""The children of a vision transformer before its blocks; positions are added between them."""
Chain = Mapping[str, Sequence[str]]
"""Paths of the layers of each stage, in order."""


def chain(network: nn.Module, images: Tensor) -> Chain | None:
    """Return the stages before the pooling, or None if the layers do not pass one tensor from each to the next."""
    groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    groups = {name: number for name, number in groups.items() if isinstance(number, int | float)}
    embeds = isinstance(network, VisionTransformer)
    layers = {path: network.get_submodule(path) for path in _layers(network, groups) if not embeds or path not in _STEM}
    first = {"norm_pre": network.norm_pre} if embeds else {}  # its input are patches with positions added
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
    """Return the paths of a network's children, or of their children if these belong to several groups."""
    paths: list[str] = []
    for name, child in network.named_children():
        numbers = {number for parameter, number in groups.items() if parameter.startswith(f"{name}.")}
        inside = [f"{name}.{key}" for key, _ in child.named_children()]
        paths += inside if len(numbers) > 1 and isinstance(child, nn.Sequential | nn.ModuleList) else [name]
    return paths


def split(network: nn.Module, stages: Chain | None) -> dict[str, nn.Module]:
    """Split a network into stages; without a chain it is a single stage."""
    if stages is None:
        return {"network": _Part(network, [name for name, _ in network.named_children()], _complete)}
    embeds = isinstance(network, VisionTransformer)
    parts = {name: nn.Sequential(*map(network.get_submodule, paths)) for name, paths in stages.items()}
    used = {path.split(".")[0] for paths in stages.values() for path in paths}
    left = [name for name, _ in network.named_children() if name not in used]
    stem = {"stem": _Part(network, _STEM, _embed)} if embeds else {}
    return {**parts, **stem, "pool": _Part(network, left, _pool, tensors=not embeds)}


def _complete(network: Any, images: Tensor) -> Any:
    return _pool(network, network.forward_features(images))


def _embed(network: Any, images: Tensor) -> Any:
    return network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images))))


def _pool(network: Any, features: Tensor) -> Any:
    return network.forward_head(features, pre_logits=True)


class _Part(nn.Module):
    """A function of a network that contains only some of its children.

    Args:
        network: The complete network, of which a shallow copy is made.
        children: Names of the children that the function needs.
        function: Function of the reduced network and its input.
        tensors: Whether the copy contains the parameters and buffers of the network itself.
    """

    def __init__(self, network: nn.Module, children: Collection[str], function: Any, *, tensors: bool = True) -> None:
        super().__init__()
        self.network, self.function = copy.copy(network), function
        self.network._modules = {name: network.get_submodule(name) for name in children}
        if not tensors:
            self.network._parameters, self.network._buffers = {}, {}

    def forward(self, values: Tensor) -> Any:
        return self.function(self.network, values)
