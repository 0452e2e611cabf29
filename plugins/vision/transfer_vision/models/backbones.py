"""Torchvision's classification models as backbones."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

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
from transfer_vision.preprocessing import Augmentation, CacheImages, ImagePreprocessing, Preset

Count = Annotated[int, Field(ge=1)]
Statistics = tuple[float, ...]
_PRESET = "preprocessing.json"
# Torchvision's own models of these take what others take and scale it to [-1, 1] before anything else.
_FROM_MINUS_ONE = ("googlenet", "inception_v3")


class TorchvisionModel(Backbone):
    """One of torchvision's classification models without its classifier.

    Its stages hold torchvision's own layers. In: float32 (B, C, S, S). Out: (B, D), or a sequence of tokens.

    Args:
        preset: What a saved model knows of its preprocessing; None: as the weights were evaluated.
        weights: Torchvision's name of weights (``DEFAULT``, ``IMAGENET1K_V2``), a .safetensors or .pth file in
            torchvision's layout, an earlier run (``runs/NAME``), or null for random initialisation.
        image_size: Height and width of what the model sees, in pixels; null: as the weights were evaluated.
        resize: Pixels of a picture's shorter side before the crop; null: as the weights were evaluated,
            scaled to image_size.
        interpolation: The filter of that resize; null: as the weights were evaluated.
        mean: Of each channel, for values in [0, 1]; null: as in pretraining.
        std: Standard deviation of each channel; null: as in pretraining.
        in_channels: Channels of a picture: 3, 1 for grey ones, or those of arrays. The first convolution is adapted:
            summed over its channels, or repeated and scaled.
        augmentation: For training: ``usual`` (a random resized crop and a horizontal flip), ``strong`` (with
            TrivialAugment and random erasing), ``none``, or a list of torchvision.transforms.v2 classes with
            options: ``[{name: ColorJitter, brightness: 0.2}]``.
        cache_images: Keep decoded and resized pictures in memory from one epoch to the next, where those of a split
            fit: ``auto`` (into half of the memory that is available), ``off``, or into so many GiB.
    """

    field: ClassVar[str] = "image"
    architecture: ClassVar[str]
    """Torchvision's name of the model, where the class stands for one."""

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
        augmentation: Augmentation = "usual",
        cache_images: CacheImages = "auto",
    ) -> None:
        self._build(
            self.architecture,
            "vector",
            preset,
            weights,
            in_channels,
            {"augmentation": augmentation, "cache_images": cache_images},
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
        wishes: Mapping[str, Any],
    ) -> None:
        preset = (preset or _preset(weights, model)).for_channels(in_channels).with_wishes(**wishes)
        if preset.image_size < (least := smallest_image(model)):
            raise ConfigError(
                f"{model} sees pictures of {least} pixels at least, not of {preset.image_size}",
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
        """A vector of the width that the model's own classifier takes, or a sequence of tokens of that width."""
        return self._features

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """How pictures become (B, C, S, S)."""
        return self._preprocessing

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build it as it was trained, whatever has become of the weights that it began from."""
        return cls(_stored_preset(assets), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the preprocessing that came with the weights: names of weights mean others in another torchvision."""
        described = self._preprocessing.describe()
        return {_PRESET: json.dumps({field.name: described[field.name] for field in fields(Preset)}, indent=2) + "\n"}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Read the weights that the options name.

        Returns:
            ``weights`` (the option), ``source`` (the file), ``sha256``, ``tensors`` (how many were loaded),
            ``left_out`` (the names of the classifiers', which the head replaces) and ``adapted`` (what was changed to
            fit, where anything was).

        Raises:
            transfer.WeightsError: They are missing, unreadable or of another architecture.
        """
        if self._weights is None:
            return {}
        layout = self._layout
        read = read_pretrained(self._weights, layout.model, layout.names)
        own = {name.removeprefix("stages."): value for name, value in self.state_dict().items()}
        fitted = fit_weights(read, {layout.names[name]: value for name, value in own.items()}, layout)
        self.load_state_dict({f"stages.{name}": fitted.tensors[layout.names[name]] for name in own})
        return {
            "weights": self._weights,
            "source": str(read.source),
            "sha256": read.sha256,
            "tensors": fitted.found,
            "left_out": fitted.left_out,
            **({"adapted": fitted.adapted} if fitted.adapted else {}),
        }

    def foreign_models(self, out_features: int) -> Mapping[str, ForeignModel]:
        """Return torchvision's model, under ``torchvision``, where it is this one under a linear layer."""
        layout = self._layout
        # Torchvision builds three channels, and its MNASNet refuses tensors that carry no version of its own making.
        if not layout.takes_linear or layout.in_channels != 3 or layout.model.startswith("mnasnet"):
            return {}
        options = {**layout.options, "num_classes": out_features}
        names = {f"stages.{own}": name for own, name in layout.names.items()}
        return {"torchvision": ForeignModel(f"torchvision.models:{layout.model}", options, names, layout.classifier)}


def _stored_preset(assets: Mapping[str, str]) -> Preset | None:
    if _PRESET not in assets:
        return None
    stored = json.loads(assets[_PRESET])
    return Preset(**stored | {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])})


def _preset(weights: str | None, model: str) -> Preset:
    """Return how pictures were prepared for these weights, or for the model's best where nothing tells."""
    if weights is not None and is_run(weights):
        saved = saved_backbone(weights)
        stored, theirs = _stored_preset(saved.assets), architecture_of(saved)
        # A backbone of a plugin may still have tensors of these names, which is seen when they are read.
        if theirs != model and (stored is None or theirs in model_names()):
            raise of_another_backbone(saved, model)
        if stored is not None:
            return stored
    preset = Preset.of(published(weights, model) or default_weights(model))
    if model in _FROM_MINUS_ONE:
        return replace(preset, mean=(0.5,) * 3, std=(0.5,) * 3)
    return preset


class Torchvision(TorchvisionModel):
    """Any of torchvision's classification models (https://pytorch.org/vision/stable/models.html), by its name.

    Their stages are ``stem``, ``stage1``, ``stage2`` ... or torchvision's own names (``layer1``, ``denseblock1``,
    ``encoder_layer_0``), then ``pool`` and, where torchvision has layers before its last one, ``classifier``.

    Args:
        model: Torchvision's name: ``densenet121``, ``convnext_tiny``, ``vit_b_16`` ...
        readout: ``vector``, or ``sequence``: the tokens of a vision transformer (the class token first) or of a Swin
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
        augmentation: Augmentation = "usual",
        cache_images: CacheImages = "auto",
    ) -> None:
        if model not in model_names():
            close = difflib.get_close_matches(model, model_names(), n=3)
            raise ConfigError(
                f"torchvision has no classification model called {model!r}",
                available=close or model_names(),
                fix=f"did you mean {close[0]!r}?" if close else "choose one of these",
            )
        self._build(
            model,
            readout,
            preset,
            weights,
            in_channels,
            {"augmentation": augmentation, "cache_images": cache_images},
            {"image_size": image_size, "resize": resize, "interpolation": interpolation, "mean": mean, "std": std},
        )
