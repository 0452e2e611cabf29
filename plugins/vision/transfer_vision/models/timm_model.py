"""Any model of timm as a backbone. It needs the extra ``timm``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import Field
from torch import nn

from transfer import (
    Backbone,
    ConfigError,
    FeatureSpec,
    FileSchema,
    ForeignModel,
    WeightsError,
    load_saved_backbone,
    saved_backbone,
)
from transfer_vision.images.decoding import CropMode, Interpolation
from transfer_vision.models.timm_stages import chain, split
from transfer_vision.models.weights import find_local
from transfer_vision.preprocessing import Augmentation, CacheImages, ImagePreprocessing
from transfer_vision.suggestions import abbreviated

Pooling = Literal["cls", "mean", "max"]


_Size = Annotated[int, Field(ge=1, le=2**16)]


class _SavedPreprocessing(FileSchema):
    """Content of ``preprocessing.json`` in a model folder: arguments of ImagePreprocessing."""

    image_size: _Size
    resize: _Size
    crop_mode: CropMode = "center"
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _saved_settings(text: str) -> dict[str, Any]:
    return _SavedPreprocessing.model_validate_json(text).model_dump()


class Timm(Backbone):
    """Any model of timm (https://huggingface.co/docs/timm), by its name there.

    The stages are ``stem``, the blocks, and ``pool``. Blocks are ``stage1``, ``stage2`` ...; if timm groups them, as in
    ConvNeXt, they are ``stage1.0``, ``stage1.1`` ..., and ``stage1`` means all of the group. A model whose blocks do
    not form a chain has one stage, ``network``. Parameters are named STAGE.NAME with timm's name:
    ``stem.bn1.weight``, ``stage1.layer1.0.conv1.weight``.

    Args:
        model: Name of the model in timm, optionally with the tag of its weights: ``resnet50.a1_in1k``.
        weights: ``pretrained`` for the weights of the name, from the local cache or the Hugging Face Hub; a file with
            timm's names, with or without a classifier, in the working folder or the data folder; an earlier run of the
            same model (``runs/NAME``); or null for random initialization.
        image_size: Height and width of the model's input, in pixels; null: from timm's configuration of the model.
        pooling: Vector of an image: the class token (``cls``), or the ``mean`` or ``max`` over all positions; null: as
            in timm.
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
        pooling: Pooling | None = None,
        augmentation: Augmentation = "default",
        cache_images: CacheImages = "auto",
    ) -> None:
        require_model(model)
        self._name, self._weights, self._size, self._pooling = model, weights, image_size, pooling
        with size_errors(model, image_size):
            network = self._create()
        if settings is None and weights is not None and is_run(weights):
            saved = saved_backbone(weights).assets.get("preprocessing.json")
            settings = None if saved is None else _saved_settings(saved)
            if settings is not None and image_size not in (None, settings["image_size"]):
                settings = None  # the config asks for another size than that of the run
        self._settings = settings or preprocessing_of(network, image_size)
        size = self._settings["image_size"]
        with size_errors(model, size), torch.device("meta"):
            on_meta = self._create()
            require_whole_patches(on_meta, size)
            self._images = torch.empty(2, 3, size, size)
            self._chain = chain(on_meta, self._images)
        super().__init__(split(network, self._chain, self._images))
        width: Any = getattr(network, "head_hidden_size", None) or network.num_features
        self._features = int(width)
        self._loading: dict[str, Any] = {"augmentation": augmentation, "cache_images": cache_images}

    def _create(self, **options: Any) -> nn.Module:
        network = create_model(self._name, num_classes=0, **self._sized(), **options)
        if self._pooling is not None:
            set_pooling(network, self._name, self._pooling)
        return network

    def _sized(self) -> dict[str, int]:
        """Return the argument of timm's constructor that sets the image size; empty if the model takes any size."""
        import timm

        fixed = getattr(timm.get_pretrained_cfg(self._name), "fixed_input_size", False)
        return {"img_size": self._size} if self._size and fixed else {}

    @classmethod
    def model_names(cls) -> Sequence[str]:
        """Return timm's models, without the tags of their weights."""
        import timm

        names: list[str] = timm.list_models()
        return names

    @classmethod
    def describe_model(cls, model: str) -> Mapping[str, Any]:
        """Return the number of parameters, the image size and whether the weights are in the local cache."""
        import timm

        config = timm.get_pretrained_cfg(model)
        _, height, width = config.input_size
        with torch.device("meta"):
            network = create_model(model, num_classes=0)
        return {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "image size": str(height) if height == width else f"{height} x {width}",
            "weights": weights_location(config),
        }

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
        return cls(_saved_settings(assets["preprocessing.json"]), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the settings of the preprocessing."""
        return {"preprocessing.json": json.dumps(self._settings)}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the weights through timm, which downloads them and renames old tensors.

        Returns:
            ``weights`` (the option), ``timm`` (its version), ``tensors`` (the number of loaded tensors) and
            ``left_out`` (the names of tensors that were not loaded, because the head replaces the classifier).

        Raises:
            WeightsError: The weights cannot be read, or are not exactly those of this model without its classifier.
        """
        import timm

        if self._weights is None:
            return {}
        if is_run(self._weights):
            loaded = load_saved_backbone(self, saved_backbone(self._weights))
            return {"weights": self._weights, "timm": timm.__version__, **loaded}
        file = None if self._weights == "pretrained" else str(find_local(self._weights))
        try:
            with recorded_loads() as loads:
                network = self._create(pretrained=True, pretrained_cfg_overlay={"file": file} if file else None)
        except Exception as error:  # any exception of the Hub and the file formats
            offline = "" if file else "connect to the Hugging Face Hub once, "
            fix = f"{offline}give a file with timm's names, or weights: null"
            raise WeightsError(f"timm cannot read weights of {self._name}: {error}", where=file, fix=fix) from error
        load = next((load for load in reversed(loads) if load.module is network), None)
        if load is None:
            raise WeightsError(f"timm loaded no weights into {self._name}", where=file, fix="give another file")
        left_out = classifier_names(network, load, file)
        require_complete(self._name, load, left_out, file)
        # Names of submodules must not contain dots; the stages of a backbone replace them in the same way.
        stages = {name.replace(".", "/"): stage for name, stage in split(network, self._chain, self._images).items()}
        self.stages.load_state_dict(nn.ModuleDict(stages).state_dict())
        facts = {"weights": self._weights, "timm": timm.__version__, "tensors": load.tensors}
        return {**facts, "left_out": sorted(left_out)}

    def foreign_models(self, out_features: int) -> Mapping[str, ForeignModel]:
        """Return timm's model under ``timm``, if its classifier is one linear layer over the features."""
        if self._pooling is not None:
            return {}
        import timm

        options: dict[str, Any] = {"model_name": self._name, "num_classes": out_features, **self._sized()}
        with torch.device("meta"):
            network = timm.create_model(**options)
        output = network.pretrained_cfg.get("classifier")
        names = {
            f"stages.{stage}.{name}": name
            for stage, module in self.stages.named_children()
            for name in module.state_dict()
        }
        last = dict(network.named_modules()).get(output) if isinstance(output, str) else None
        if not isinstance(last, nn.Linear) or last.in_features != self._features:
            return {}
        others = {name for name in network.state_dict() if not name.startswith(f"{output}.")}
        return (
            {"timm": ForeignModel("timm:create_model", options, names, output)} if others == set(names.values()) else {}
        )


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model of timm on the current device.

    Some constructors compute with values of tensors, which do not exist on the meta device. They build on the CPU.
    """
    import timm

    try:
        network: nn.Module = timm.create_model(name, **options)
    except (NotImplementedError, RuntimeError):
        if torch.get_default_device().type != "meta":
            raise
        with torch.device("cpu"):
            network = timm.create_model(name, **options)
        network.to("meta")
    return network


def weights_location(config: Any) -> str:
    """Return whether the weights of a model are in the local cache of the Hugging Face Hub, or where they are."""
    from huggingface_hub import try_to_load_from_cache

    if not config.has_weights:
        return "none"
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if config.hf_hub_id and any(isinstance(try_to_load_from_cache(config.hf_hub_id, f), str) for f in files):
        return "in the cache"
    return "to download"


def pretrained_cfg(network: Any) -> Any:
    """Return timm's description of the weights of a model, a dictionary."""
    return network.pretrained_cfg


def set_pooling(network: Any, model: str, pooling: Pooling) -> None:
    """Change the pooling of a model, whose layers and weights stay the same.

    Raises:
        ConfigError: The model does not support it.
    """
    try:
        network.reset_classifier(0, global_pool={"cls": "token", "mean": "avg", "max": "max"}[pooling])
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{model} does not support pooling: {pooling}", fix="choose another pooling, or null"
        ) from error


def is_run(weights: str) -> bool:
    """Return whether ``weights`` names an earlier run: a folder that contains one, or a path without a suffix."""
    path = Path(weights)
    return path.is_dir() or ("/" in weights and not path.suffix)


def require_model(model: str) -> None:
    """Require that timm has a model, and that the tag of its weights exists.

    Raises:
        ConfigError: The name or the tag is unknown; the error lists similar ones.
    """
    import timm

    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:10] or timm.list_models(f"{name[:4]}*")[:10]
        raise ConfigError(f"timm has no model called {name!r}", available=close)
    tagged = timm.list_pretrained(name)
    if tag and model not in tagged:
        fix = f"choose one of these, or {name} without a tag"
        raise ConfigError(f"timm has no weights {tag!r} for {name}", available=tagged, fix=fix)


@contextmanager
def size_errors(model: str, size: int | None) -> Iterator[None]:
    """Convert an error of timm for an image size that a model does not support."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"images of {size} x {size} pixels" if size else "the image size of its weights"
        raise ConfigError(f"{model} does not support {what}: {reason}", fix="set another image_size") from error


def require_whole_patches(network: nn.Module, size: int) -> None:
    """Refuse an image size that is no multiple of the patch size: timm would ignore the border of every image."""
    embedding = getattr(network, "patch_embed", None) or getattr(network, "stem", None)
    patch = getattr(embedding, "patch_size", None)
    side = max(patch) if isinstance(patch, tuple) else patch
    if not isinstance(side, int) or size % side == 0 or getattr(embedding, "dynamic_img_pad", False):
        return
    below, above = size // side * side, (size // side + 1) * side
    raise ConfigError(
        f"image_size is not divisible by the patch size: expected a multiple of {side}, got {size}",
        fix=f"set image_size: {above}" + (f" or {below}" if below else ""),
    )


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

    nn.Module.load_state_dict = recording  # type: ignore[method-assign, assignment]
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def classifier_names(network: nn.Module, load: Load, file: str | None) -> set[str]:
    """Return the names of the classifier's tensors in the weights, which timm removes or reports as unexpected."""
    from timm.models import load_state_dict

    config = pretrained_cfg(network)
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
    names = "; ".join(f"{kind}: {abbreviated(of_kind)}" for kind, of_kind in problems.items() if of_kind)
    fix = "give a file with timm's names, without a prefix; to start from a run, name its folder (weights: runs/NAME)"
    total = len(load.module.state_dict())
    raise WeightsError(f"{load.tensors} of {total} tensors of {model} were loaded; {names}", where=file, fix=fix)


def preprocessing_of(network: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return the arguments of ImagePreprocessing that agree with timm's data configuration of a model."""
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=pretrained_cfg(network))
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
