"""Torchvision's ResNets as chains of stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torchvision.models import get_model

from transfer import Backbone, FeatureSpec, ForeignModel
from transfer_vision.preprocessing import Augmentation, ImagePreprocessing
from transfer_vision.weights import find_weights, fit_weights, published, read_weights, sha256

_STEM = "stem"
_STEM_LAYERS = ("conv1", "bn1", "relu", "maxpool")


class ResNet(Backbone):
    """A residual network for pictures (He et al., 2016, https://arxiv.org/abs/1512.03385), as torchvision builds it.

    Stages: ``stem``, ``layer1``, ``layer2``, ``layer3``, ``layer4``, ``pool``. In: float32 (B, 3, S, S). Out: (B, D).

    Args:
        weights: ``imagenet`` (torchvision's default ones), another of torchvision's names (``IMAGENET1K_V1``), a
            .safetensors or .pth file in torchvision's layout, or null for random initialisation.
        image_size: Height and width of what the model sees, in pixels.
        resize: Pixels of a picture's shorter side before the crop; null: as the weights were
            evaluated, scaled to image_size.
        augmentation: For training: ``usual`` (a random resized crop and a horizontal flip), ``none``, or a list of
            torchvision.transforms.v2 classes with options: ``[{name: ColorJitter, brightness: 0.2}]``.
    """

    field: ClassVar[str] = "image"
    architecture: ClassVar[str]
    """Torchvision's name of the model."""

    def __init__(
        self,
        *,
        weights: str | None = "imagenet",
        image_size: Annotated[int, Field(ge=32)] = 224,
        resize: Annotated[int, Field(ge=32)] | None = None,
        augmentation: Augmentation = "usual",
    ) -> None:
        member = published(weights, self.architecture)
        model = get_model(self.architecture, weights=None)
        layers = OrderedDict(model.named_children())
        classifier, linear = layers.popitem()
        stem = nn.Sequential(OrderedDict((name, layers.pop(name)) for name in _STEM_LAYERS))
        pool = nn.Sequential(OrderedDict(avgpool=layers.pop("avgpool"), flatten=nn.Flatten(1)))
        super().__init__({_STEM: stem, **layers, "pool": pool})
        self._weights = weights
        self._classifier = classifier
        self._features = FeatureSpec("vector", linear.in_features)
        if member is None:
            self._preprocessing = ImagePreprocessing(image_size=image_size, resize=resize, augmentation=augmentation)
        else:
            facts = member.transforms()
            scaled = round(image_size * facts.resize_size[0] / facts.crop_size[0])
            self._preprocessing = ImagePreprocessing(
                image_size=image_size,
                resize=scaled if resize is None else resize,
                interpolation=facts.interpolation.value,
                mean=tuple(facts.mean),
                std=tuple(facts.std),
                augmentation=augmentation,
            )

    @property
    def features(self) -> FeatureSpec:
        """A vector of the width that the network's own classifier takes (512 or 2048)."""
        return self._features

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """How PIL images become (B, 3, S, S)."""
        return self._preprocessing

    def load_pretrained(self) -> Mapping[str, Any]:
        """Read the weights that the options name.

        Returns:
            ``weights`` (the option), ``source`` (the file), ``sha256``, ``tensors`` (how many were loaded) and
            ``left_out`` (the names of the classifier's, which the head replaces).

        Raises:
            transfer.WeightsError: The file is missing, unreadable or of another architecture.
        """
        if self._weights is None:
            return {}
        path = find_weights(self._weights, self.architecture)
        tensors = read_weights(path)
        own = self.state_dict()
        taken = fit_weights(
            tensors,
            {torchvision_name(name): value for name, value in own.items()},
            classifier=self._classifier,
            architecture=self.architecture,
            where=path,
        )
        self.load_state_dict({name: taken[torchvision_name(name)] for name in own})
        return {
            "weights": self._weights,
            "source": str(path),
            "sha256": sha256(path),
            "tensors": sum(name in tensors for name in taken),
            "left_out": sorted(tensors.keys() - taken.keys()),
        }

    def foreign_models(self, out_features: int) -> Mapping[str, ForeignModel]:
        """Return torchvision's model, under ``torchvision``."""
        names = {name: torchvision_name(name) for name in self.state_dict()}
        factory = f"torchvision.models:{self.architecture}"
        return {"torchvision": ForeignModel(factory, {"num_classes": out_features}, names, self._classifier)}

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors under torchvision's names: its model's state dict without the classifier."""
        return {torchvision_name(name): value for name, value in self.state_dict().items()}


def torchvision_name(name: str) -> str:
    """Return torchvision's name of a tensor of a :class:`ResNet` (``stages.stem.conv1.weight``: ``conv1.weight``)."""
    return name.removeprefix("stages.").removeprefix(f"{_STEM}.")


class ResNet18(ResNet):
    """ResNet-18: 11.2 million parameters, 512 features."""

    architecture = "resnet18"


class ResNet34(ResNet):
    """ResNet-34: 21.3 million parameters, 512 features."""

    architecture = "resnet34"


class ResNet50(ResNet):
    """ResNet-50: 23.5 million parameters, 2048 features."""

    architecture = "resnet50"


class ResNet101(ResNet):
    """ResNet-101: 42.5 million parameters, 2048 features."""

    architecture = "resnet101"


class ResNet152(ResNet):
    """ResNet-152: 58.1 million parameters, 2048 features."""

    architecture = "resnet152"
