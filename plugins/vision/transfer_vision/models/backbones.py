"""Torchvision's classification models as backbones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, TypeAdapter

from transfer import Backbone, ConfigError, FeatureSpec, ForeignModel, saved_backbone
from transfer_vision.images.decoding import Interpolation
from transfer_vision.models.architectures import Readout, build, model_names, smallest_image
from transfer_vision.models.weights import (
    architecture_of,
    default_weights,
    fit_weights,
    is_run,
    of_another_backbone,
    published,
    read_pretrained,
)
from transfer_vision.preprocessing import Augmentation, CacheImages, DecodeDevice, ImagePreprocessing, Preset
from transfer_vision.suggestions import unknown_name

Count = Annotated[int, Field(ge=1)]
Statistics = tuple[float, ...]
_PRESET = "preprocessing.json"
# Torchvision's modules of these models scale ImageNet-normalized input to [-1, 1] first.
_SCALED_INPUT = ("googlenet", "inception_v3")


class TorchvisionModel(Backbone):
    """One of torchvision's classification models without its classifier.

    Input: float32 (B, C, S, S). Output: float32 (B, D), or a sequence of tokens.

    Args:
        preset: Preprocessing of a saved model; None: the preprocessing with which the weights were evaluated.
        weights: Torchvision's name of weights (``DEFAULT``, ``IMAGENET1K_V2``), a .safetensors or .pth file with
            torchvision's names, an earlier run (``runs/NAME``), or null for random initialization.
        image_size: Height and width of the model's input, in pixels; null: as the weights were evaluated.
        resize: Pixels of the shorter side before the crop; null: as the weights were evaluated, scaled to image_size.
        interpolation: Filter of the resize; null: as the weights were evaluated.
        mean: Mean of each channel, for values in [0, 1]; null: as in pretraining.
        std: Standard deviation of each channel, for values in [0, 1]; null: as in pretraining.
        in_channels: Number of channels: 3, 1 for gray images, or the channels of arrays. The first convolution is
            adapted: its weight is summed over the channels, or repeated and scaled.
        augmentation: Random augmentation of training images: ``default`` (a random resized crop and a horizontal flip),
            ``strong`` (with TrivialAugment and random erasing), ``none``, or a list of torchvision.transforms.v2
            classes with options: ``[{name: ColorJitter, brightness: 0.2}]``.
        cache_images: Memory for decoded and resized images, which are kept between epochs if those of a split fit:
            ``auto`` (half of the available memory), ``off``, or a number of GiB.
        decode: Where JPEG files are decoded, resized and augmented: ``gpu``, ``cpu``, or ``auto`` (on the GPU if there
            is one and the augmentation is ``default`` or ``none``). Pixels differ by rounding. A saved model keeps it.
    """

    field: ClassVar[str] = "image"
    architecture: ClassVar[str]
    """Torchvision's name of the model, in subclasses for a single model."""

    def __init__(
        self,
        preset: Preset | None = None,
        *,
        weights: str | None = "DEFAULT",
        image_size: Count | None = None,
        resize: Count | None = None,
        interpolation: Interpolation | None = None,
        mean: Statistics | None = None,
        std: Statistics | None = None,
        in_channels: Count = 3,
        augmentation: Augmentation = "default",
        cache_images: CacheImages = "auto",
        decode: DecodeDevice = "cpu",
    ) -> None:
        self._build(
            self.architecture,
            "vector",
            preset,
            weights,
            in_channels,
            {"augmentation": augmentation, "cache_images": cache_images, "decode": decode},
            {"image_size": image_size, "resize": resize, "interpolation": interpolation, "mean": mean, "std": std},
        )

    def _build(
        self,
        model: str,
        readout: Readout,
        preset: Preset | None,
        weights: str | None,
        in_channels: int,
        loading: Mapping[str, Any],
        overrides: Mapping[str, Any],
    ) -> None:
        # Options of the config override the preset of the weights, whose channels are fitted first.
        preset = (preset or _preset(weights, model)).for_channels(in_channels).with_overrides(**overrides)
        if preset.image_size < (least := smallest_image(model)):
            raise ConfigError(
                f"image_size is too small for {model}: expected {least} or more, got {preset.image_size}",
                fix=f"set image_size to {least} or more",
            )
        built = build(model, image_size=preset.image_size, in_channels=in_channels, readout=readout)
        super().__init__(built.stages)
        self._weights = weights
        self._layout = built.layout
        self._features = FeatureSpec(readout, built.features)
        self._preprocessing = ImagePreprocessing(**asdict(preset), **loading)

    @property
    def features(self) -> FeatureSpec:
        """A vector with the width of the classifier's input, or a sequence of tokens of that width."""
        return self._features

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """Preprocessing of images to float32 (B, C, S, S)."""
        return self._preprocessing

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build the backbone with the preprocessing that it was trained with; the weights need not exist any more."""
        # The device of decoding is restored from the saved model: the machine may have no GPU.
        return cls(_stored_preset(assets), **{**options, "decode": "auto"})

    def assets(self) -> Mapping[str, str]:
        """Return the preprocessing: in another torchvision the same name of weights may mean another preprocessing."""
        described = self._preprocessing.describe()
        return {_PRESET: json.dumps({field.name: described[field.name] for field in fields(Preset)}, indent=2) + "\n"}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the weights that the options name.

        Returns:
            ``weights`` (the option), ``source`` (the file), ``sha256``, ``tensors`` (the number of loaded tensors),
            ``left_out`` (the names of classifier tensors that were not loaded, because the head replaces the
            classifier) and, if tensors were changed to fit, ``adapted`` (the changes by name).

        Raises:
            transfer.WeightsError: The weights are missing, unreadable or of another architecture.
        """
        if self._weights is None:
            return {}
        layout = self._layout
        read = read_pretrained(self._weights, layout.model, layout.names)
        tensors = {name.removeprefix("stages."): value for name, value in self.state_dict().items()}
        fitted = fit_weights(read, {layout.names[name]: value for name, value in tensors.items()}, layout)
        self.load_state_dict({f"stages.{name}": fitted.tensors[layout.names[name]] for name in tensors})
        return {
            "weights": self._weights,
            "source": str(read.source),
            "sha256": read.sha256,
            "tensors": fitted.loaded,
            "left_out": fitted.left_out,
            **({"adapted": fitted.adapted} if fitted.adapted else {}),
        }

    def foreign_models(self, out_features: int) -> Mapping[str, ForeignModel]:
        """Return torchvision's model under ``torchvision``, if a linear layer over the features is its classifier."""
        layout = self._layout
        # Torchvision builds three channels, and its MNASNet refuses tensors without its own version metadata.
        if not layout.ends_in_linear or layout.in_channels != 3 or layout.model.startswith("mnasnet"):
            return {}
        options = {**layout.options, "num_classes": out_features}
        names = {f"stages.{name}": foreign for name, foreign in layout.names.items()}
        return {"torchvision": ForeignModel(f"torchvision.models:{layout.model}", options, names, layout.classifier)}


def _stored_preset(assets: Mapping[str, str]) -> Preset | None:
    if _PRESET not in assets:
        return None
    # The file may have been edited: values of other types would fail much later, in the middle of a prediction.
    return TypeAdapter(Preset).validate_json(assets[_PRESET], strict=True)


def _preset(weights: str | None, model: str) -> Preset:
    """Return the preprocessing for these weights, or that of the model's best weights if it is unknown."""
    if weights is not None and is_run(weights):
        saved = saved_backbone(weights)
        stored, theirs = _stored_preset(saved.assets), architecture_of(saved)
        # A backbone of another plugin may still have tensors of these names, which is checked on loading.
        if theirs != model and (stored is None or theirs in model_names()):
            raise of_another_backbone(saved, model)
        if stored is not None:
            return stored
    preset = Preset.of(published(weights, model) or default_weights(model))
    if model in _SCALED_INPUT:
        return replace(preset, mean=(0.5,) * 3, std=(0.5,) * 3)
    return preset


class Torchvision(TorchvisionModel):
    """Any of torchvision's classification models (https://pytorch.org/vision/stable/models.html), by its name.

    The stages are ``stem``, ``stage1``, ``stage2`` ... or torchvision's own names (``layer1``, ``denseblock1``,
    ``encoder_layer_0``), then ``pool``, and ``classifier`` if torchvision has layers before its last one.

    Args:
        model: Torchvision's name of the model: ``densenet121``, ``convnext_tiny``, ``vit_b_16`` ...
        readout: ``vector``, or ``sequence`` for the tokens of a vision transformer (the class token first) or of a Swin
            transformer (row by row).
    """

    def __init__(
        self,
        preset: Preset | None = None,
        *,
        model: str,
        weights: str | None = "DEFAULT",
        image_size: Count | None = None,
        resize: Count | None = None,
        interpolation: Interpolation | None = None,
        mean: Statistics | None = None,
        std: Statistics | None = None,
        in_channels: Count = 3,
        readout: Readout = "vector",
        augmentation: Augmentation = "default",
        cache_images: CacheImages = "auto",
        decode: DecodeDevice = "cpu",
    ) -> None:
        if model not in model_names():
            message = f"torchvision has no classification model called {model!r}"
            raise unknown_name(message, model, model_names(), "choose one of these")
        self._build(
            model,
            readout,
            preset,
            weights,
            in_channels,
            {"augmentation": augmentation, "cache_images": cache_images, "decode": decode},
            {"image_size": image_size, "resize": resize, "interpolation": interpolation, "mean": mean, "std": std},
        )
