"""Torchvision's classification models as chains of named stages without their classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from transfer import ConfigError

Readout = Literal["vector", "sequence"]
Unit = tuple[str, nn.Module]

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Prefixes of the auxiliary classifiers in torchvision's names (GoogLeNet, Inception v3)."""
_CLASSES = 1000
_MIN_SWIN_PIXELS = 32


def model_names() -> list[str]:
    """Return the names of torchvision's classification models."""
    return list(models.list_models(module=models))


@dataclass(frozen=True)
class Layout:
    """Correspondence between the tensors of a backbone and those of torchvision's model, for import and export.

    Args:
        model: Torchvision's name of the model.
        options: Arguments of torchvision's constructor function besides ``num_classes``; JSON values only.
        names: Torchvision's name by the backbone's name of each tensor (``stem.conv1.weight``: ``conv1.weight``).
        input_layer: Torchvision's name of the first convolution (``conv1``).
        in_channels: Input channels of the first convolution; torchvision builds three.
        classifier: Torchvision's name of its final layer (``fc``, ``classifier.6``).
        ends_in_linear: Whether a linear layer over the features is equal to torchvision's classifier. False for
            SqueezeNet, which ends in a convolution and a ReLU, and for sequences of tokens.
    """

    model: str
    options: Mapping[str, Any]
    names: Mapping[str, str]
    input_layer: str
    in_channels: int
    classifier: str
    ends_in_linear: bool


@dataclass(frozen=True)
class Architecture:
    """One of torchvision's models without its classifier.

    Args:
        stages: Modules by stage name, in the order of torchvision's forward pass.
        features: Width of the output of the last stage.
        layout: Correspondence between the tensors and those of torchvision's model.
    """

    stages: Mapping[str, nn.Module]
    features: int
    layout: Layout


def build(name: str, *, image_size: int, in_channels: int = 3, readout: Readout = "vector") -> Architecture:
    """Build a model without its classifier, with random weights and on the current device.

    The classifier is the last layer with weights. Layers before it in torchvision's own head (a norm, the first linear
    layers of VGG) belong to the backbone, except dropout right before it. Auxiliary classifiers are not built.

    Args:
        name: Torchvision's name of the model.
        image_size: Height and width of the input.
        in_channels: Channels of the input.
        readout: ``sequence`` returns the tokens of a vision transformer or a Swin transformer.

    Raises:
        transfer.ConfigError: The model does not support this image size or readout.
    """
    options = _options(name, image_size)
    try:
        with _WidthsOnCPU() if name.startswith("regnet") else nullcontext():
            model: nn.Module = models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError) as error:  # sizes that are not divisible by the patches or windows
        raise ConfigError(f"{name} does not support images of {image_size} x {image_size} pixels: {error}") from error
    input_layer, convolution = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if in_channels != convolution.in_channels:
        convolution.weight = nn.Parameter(adapt_input_weight(convolution.weight.detach(), in_channels))
        convolution.in_channels = in_channels
    classifier, final = _classifier(model)
    torchvision_names = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    stages = {
        stage: units[0][1] if len(units) == 1 else nn.Sequential(OrderedDict(units))
        for stage, units in _stages(model, name, readout).items()
    }
    # The modules are torchvision's own, so equal tensors have equal ids, whatever their name in a stage.
    names = {
        f"{stage}.{key}": torchvision_names[id(tensor)]
        for stage, module in stages.items()
        for key, tensor in module.state_dict(keep_vars=True).items()
    }
    ends_in_linear = isinstance(final, nn.Linear) and readout == "vector"
    layout = Layout(name, options, names, input_layer, in_channels, classifier, ends_in_linear)
    return Architecture(stages, final.weight.shape[1], layout)


def smallest_image(name: str) -> int:
    """Return the minimum height and width of a model's input."""
    if name.startswith("swin"):
        return _MIN_SWIN_PIXELS  # four patches of four pixels, halved three times; the model pads to its windows
    if name.startswith("vit"):
        return int(name.rsplit("_", 1)[1])
    members = list(models.get_model_weights(name))
    return int(members[0].meta["min_size"][0])


def adapt_input_weight(weight: Tensor, in_channels: int) -> Tensor:
    """Convert the weight of a convolution over RGB to another number of channels, like timm's ``adapt_input_conv``.

    One channel gets the sum over the three. More channels repeat the three, scaled so that activations keep their size.

    Args:
        weight: Weight for three channels, float (F, 3, H, W).
        in_channels: Number of channels C of the result.

    Returns:
        The weight for C channels, float (F, C, H, W).
    """
    channels = weight.shape[1]
    if in_channels == channels:
        return weight
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    repeats = -(-in_channels // channels)
    return weight.repeat(1, repeats, 1, 1)[:, :in_channels] * (channels / in_channels)


class _WidthsOnCPU(TorchFunctionMode):
    """Mode that keeps small tensors on the CPU: RegNet computes its widths with them, also on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _options(name: str, image_size: int) -> dict[str, Any]:
    if name.startswith("vit"):
        return {"image_size": image_size}
    if name.startswith("maxvit"):
        return {"input_size": [image_size, image_size]}
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the last layer with weights; torchvision registers layers in the order of the forward pass."""
    *_, (name, layer) = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    if layer.weight.shape[0] != _CLASSES:
        raise ConfigError(f"unexpected last layer of torchvision's {type(model).__name__}: expected {_CLASSES} outputs")
    return name, layer


# ------------------------------------------------------------------------------------------------------------- stages


def _stages(model: nn.Module, name: str, readout: Readout) -> dict[str, list[Unit]]:
    """Return the layers of each stage, in the order of the model's forward pass and without its classifier."""
    match model:
        case models.VisionTransformer():
            tokens = AllTokens() if readout == "sequence" else ClassToken()
            return {
                "embedding": [("embedding", PatchEmbedding(model))],
                **{key: [(key, block)] for key, block in model.encoder.layers.named_children()},
                "pool": [("ln", model.encoder.ln), ("tokens", tokens)],
            }
        case models.SwinTransformer():
            body = _staged(model.features, lambda key, _: key in {"1", "2", "4", "6"})
            if readout == "sequence":
                return {**body, "pool": [("norm", model.norm), ("tokens", MapTokens())]}
            after = ("norm", "permute", "avgpool", "flatten")
            return {**body, "pool": [(key, model.get_submodule(key)) for key in after]}
    if readout == "sequence":
        raise ConfigError(
            f"{name} has no tokens for a sequence",
            available=[other for other in model_names() if other.startswith(("vit", "swin"))],
            fix="choose one of these, or remove readout",
        )
    pool: list[Unit] = [("avgpool", getattr(model, "avgpool", nn.AdaptiveAvgPool2d(1))), ("flatten", nn.Flatten(1))]
    match model:
        case models.ResNet():
            return {**_named(_until(model, "avgpool"), first="layer1"), "pool": pool}
        case models.ShuffleNetV2():
            return {**_named(_until(model, "fc"), first="stage2"), "pool": pool}
        case models.RegNet():
            units = [("stem", model.stem), *model.trunk_output.named_children()]
            return {**_named(units, first="block1"), "pool": pool}
        # torchvision calls relu as a function in forward(), so the module is added here.
        case models.DenseNet():
            body = _named(model.features.named_children(), first="denseblock1")
            return {**body, "pool": [("relu", nn.ReLU()), *pool]}
        case models.GoogLeNet():
            first = {"inception3a", "inception4a", "inception5a"}
            return {**_staged(_until(model, "avgpool"), lambda key, _: key in first), "pool": pool}
        case models.Inception3():
            first = {"Mixed_5b", "Mixed_6a", "Mixed_7a"}
            return {**_staged(_until(model, "avgpool"), lambda key, _: key in first), "pool": pool}
        # A stage starts after each max pooling, except the last one, which belongs to the last stage.
        case models.AlexNet() | models.VGG() | models.SqueezeNet():
            last = str(len(model.features) - 1)
            body = _staged(model.features, lambda key, unit: isinstance(unit, nn.MaxPool2d) and key != last)
            return {**body, "pool": pool, **_rest(model)}
        case models.MobileNetV2() | models.MobileNetV3():
            body = _staged(model.features, lambda key, unit: key == "1" or (key != "0" and _downsamples(unit)))
            return {**body, "pool": pool, **_rest(model)}
        case models.EfficientNet():
            return {**_staged(model.features, lambda key, _: key != "0"), "pool": pool}
        case models.MNASNet():
            return {**_staged(model.layers, lambda _, unit: isinstance(unit, nn.Sequential)), "pool": pool}
        # Its classifier starts with a LayerNorm2d over (B, C, 1, 1), before the flattening.
        case models.ConvNeXt():
            body = _staged(model.features, lambda key, _: key in {"1", "2", "4", "6"})
            return {**body, "pool": pool[:1], **_rest(model)}
        case models.MaxVit():
            units = [("stem", model.stem), *model.blocks.named_children()]
            return {**_staged(units, lambda key, _: key != "stem"), **_rest(model)}
    raise ConfigError(f"torchvision's {name} is of an unsupported family: {type(model).__name__}")


def _named(units: Iterable[Unit], *, first: str) -> dict[str, list[Unit]]:
    """Return one stage per unit under the unit's name; the units before ``first`` are the stage ``stem``."""
    stages: dict[str, list[Unit]] = {"stem": []}
    for unit in units:
        if unit[0] == first or len(stages) > 1:
            stages[unit[0]] = [unit]
        else:
            stages["stem"].append(unit)
    return stages


def _staged(units: nn.Module | Iterable[Unit], starts: Callable[[str, nn.Module], bool]) -> dict[str, list[Unit]]:
    """Return the stages ``stem``, ``stage1``, ``stage2`` ...; each unit for which ``starts`` is True starts a stage."""
    stages: dict[str, list[Unit]] = {"stem": []}
    for key, unit in units.named_children() if isinstance(units, nn.Module) else units:
        if starts(key, unit):
            stages[f"stage{len(stages)}"] = []
        stages[next(reversed(stages))].append((key, unit))
    return stages


def _until(model: nn.Module, name: str) -> Iterable[Unit]:
    """Yield the children of a model that come before the child ``name``."""
    for unit in model.named_children():
        if unit[0] == name:
            return
        yield unit


def _rest(model: nn.Module) -> dict[str, list[Unit]]:
    """Return the layers between the pooling and the classifier as a stage, or no stage if there are none."""
    container, _, final = _classifier(model)[0].rpartition(".")
    units = list(_until(model.get_submodule(container), final))
    while units and isinstance(units[-1][1], nn.Dropout):
        units.pop()
    return {"classifier": units} if units else {}


def _downsamples(unit: nn.Module) -> bool:
    """Return whether a block lowers the resolution."""
    return any(isinstance(m, nn.Conv2d) and m.stride != (1, 1) for m in unit.modules())


class PatchEmbedding(nn.Module):
    """The patch embedding of a vision transformer: images (B, C, S, S) to class token and patches (B, 1 + N, D).

    Args:
        model: Torchvision's model, whose layers and parameters are reused.
    """

    def __init__(self, model: models.VisionTransformer) -> None:
        super().__init__()
        self.conv_proj = model.conv_proj
        self.class_token = model.class_token
        self.pos_embedding = model.encoder.pos_embedding
        self.dropout = model.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens with positions added, float (B, 1 + N, D)."""
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        # Not len(patches), which would fix the batch size in an exported graph.
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], 1)
        return self.dropout(tokens + self.pos_embedding)  # type: ignore[no-any-return]


class ClassToken(nn.Module):
    """The class token, which is the first: (B, T, D) to (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return float (B, D)."""
        return tokens[:, 0]


class AllTokens(nn.Module):
    """All tokens and a mask of True: (B, T, D) to (B, T, D) and (B, T)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return float (B, T, D) and bool (B, T)."""
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class MapTokens(AllTokens):
    """The positions of a feature map as tokens, row by row: (B, H, W, D) to (B, H W, D) and a mask."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return float (B, H W, D) and bool (B, H W)."""
        return super().forward(tokens.flatten(1, 2))
