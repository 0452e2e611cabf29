"""Torchvision's ResNets, one class per model."""

from __future__ import annotations

from transfer_vision.models.backbones import TorchvisionModel


class ResNet(TorchvisionModel):
    """Torchvision's residual network for images (He et al., 2016, https://arxiv.org/abs/1512.03385).

    Stages: ``stem``, ``layer1``, ``layer2``, ``layer3``, ``layer4``, ``pool``. Input: float32 (B, C, S, S). Output: (B,
    D).
    """


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
