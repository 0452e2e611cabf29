"""Torchvision's classification models: built, and taken apart into a chain of named stages without their classifier."""

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
"""Where torchvision keeps the classifiers that help training half-way (GoogLeNet, Inception v3)."""
_CLASSES = 1000
_SWIN_MINIMUM = 32


def model_names() -> list[str]:
    """Return the names of torchvision's classification models."""
    return list(models.list_models(module=models))


@dataclass(frozen=True)
class Layout:
    """Where a backbone's tensors lie in torchvision's own model: how weights get in, and how they get out again.

    Args:
        model: Torchvision's name of the model.
        options: What torchvision's function of that name takes besides ``num_classes`` to build the same; JSON alone.
        names: Torchvision's name of each tensor by ours, stage first (``stem.conv1.weight``: ``conv1.weight``).
        input_layer: Torchvision's name of the convolution that sees the picture (``conv1``).
        in_channels: Of that convolution; torchvision builds three.
        classifier: Torchvision's name of its final layer (``fc``, ``classifier.6``).
        takes_linear: A linear layer over the features, in the classifier's place, is torchvision's whole model. It is
            not for SqueezeNet, whose final layer is a convolution under a ReLU, and for tokens as a sequence.
    """

    model: str
    options: Mapping[str, Any]
    names: Mapping[str, str]
    input_layer: str
    in_channels: int
    classifier: str
    takes_linear: bool


@dataclass(frozen=True)
class Architecture:
    """One of torchvision's models without its classifier.

    Args:
        stages: From input to output, in the order of torchvision's own forward.
        features: Width of what leaves the last stage.
        layout: Where its tensors lie in torchvision's own model.
    """

    stages: Mapping[str, nn.Module]
    features: int
    layout: Layout


def build(name: str, *, image_size: int, in_channels: int = 3, readout: Readout = "vector") -> Architecture:
    """Build a model with random weights, on the current device, and take its classifier off.

    The classifier is the last layer with weights; what stands before it in torchvision's own head (a norm, the first
    linear layers of VGG) belongs to the backbone, and dropout right before it does not. Auxiliary classifiers are not
    built.

    Args:
        name: Torchvision's name of the model.
        image_size: Height and width of what the model sees.
        in_channels: Of a picture.
        readout: ``sequence`` keeps the tokens of a vision transformer or a Swin transformer.

    Raises:
        transfer.ConfigError: It cannot see pictures of that size, or has no tokens.
    """
    options = _options(name, image_size)
    try:
        with _WidthsOnCPU() if name.startswith("regnet") else nullcontext():
            model: nn.Module = models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError) as error:  # sizes that its patches or windows do not divide
        raise ConfigError(f"{name} cannot see pictures of {image_size} x {image_size} pixels: {error}") from error
    input_layer, convolution = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if in_channels != convolution.in_channels:
        convolution.weight = nn.Parameter(adapt_input_weight(convolution.weight.detach(), in_channels))
        convolution.in_channels = in_channels
    classifier, final = _classifier(model)
    known = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    stages = {
        stage: units[0][1] if len(units) == 1 else nn.Sequential(OrderedDict(units))
        for stage, units in _stages(model, name, readout).items()
    }
    names = {
        f"{stage}.{key}": known[id(tensor)]
        for stage, module in stages.items()
        for key, tensor in module.state_dict(keep_vars=True).items()
    }
    takes_linear = isinstance(final, nn.Linear) and readout == "vector"
    layout = Layout(name, options, names, input_layer, in_channels, classifier, takes_linear)
    return Architecture(stages, final.weight.shape[1], layout)


def smallest_image(name: str) -> int:
    """Return the least height and width that a model can see."""
    if name.startswith("swin"):
        return _SWIN_MINIMUM  # four patches of four pixels, halved three times; it pads to its windows
    if name.startswith("vit"):
        return int(name.rsplit("_", 1)[1])
    members = list(models.get_model_weights(name))
    return int(members[0].meta["min_size"][0])


def adapt_input_weight(weight: Tensor, in_channels: int) -> Tensor:
    """Return the weight of a convolution over RGB for another number of channels, as timm's ``adapt_input_conv`` does.

    One channel: the sum over the three. More: the three over and over, scaled so that activations keep their size.

    Args:
        weight: float (F, 3, H, W).
        in_channels: C.

    Returns:
        float (F, C, H, W).
    """
    channels = weight.shape[1]
    if in_channels == channels:
        return weight
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    repeats = -(-in_channels // channels)
    return weight.repeat(1, repeats, 1, 1)[:, :in_channels] * (channels / in_channels)


class _WidthsOnCPU(TorchFunctionMode):
    """RegNet works out its widths with small tensors and reads them: they need numbers on the meta device too."""

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
    """Return the last layer with weights: torchvision registers layers in the order of the forward pass."""
    *_, (name, layer) = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    if layer.weight.shape[0] != _CLASSES:
        raise ConfigError(f"the classifier of torchvision's {type(model).__name__} is not where it was looked for")
    return name, layer


# ------------------------------------------------------------------------------------------------------------- stages


def _stages(model: nn.Module, name: str, readout: Readout) -> dict[str, list[Unit]]:
    """Return the layers of each stage in the order of the model's forward pass, without its classifier."""
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
            f"{name} has no tokens to give as a sequence",
            available=[other for other in model_names() if other.startswith(("vit", "swin"))],
            fix="choose one of these, or leave out readout",
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
        case models.DenseNet():
            body = _named(model.features.named_children(), first="denseblock1")
            return {**body, "pool": [("relu", nn.ReLU()), *pool]}
        case models.GoogLeNet():
            first = {"inception3a", "inception4a", "inception5a"}
            return {**_staged(_until(model, "avgpool"), lambda key, _: key in first), "pool": pool}
        case models.Inception3():
            first = {"Mixed_5b", "Mixed_6a", "Mixed_7a"}
            return {**_staged(_until(model, "avgpool"), lambda key, _: key in first), "pool": pool}
        case models.AlexNet() | models.VGG() | models.SqueezeNet():
            last = str(len(model.features) - 1)
            body = _staged(model.features, lambda key, unit: isinstance(unit, nn.MaxPool2d) and key != last)
            return {**body, "pool": pool, **_rest(model)}
        case models.MobileNetV2() | models.MobileNetV3():
            body = _staged(model.features, lambda key, unit: key == "1" or (key != "0" and _halves(unit)))
            return {**body, "pool": pool, **_rest(model)}
        case models.EfficientNet():
            return {**_staged(model.features, lambda key, _: key != "0"), "pool": pool}
        case models.MNASNet():
            return {**_staged(model.layers, lambda _, unit: isinstance(unit, nn.Sequential)), "pool": pool}
        case models.ConvNeXt():
            body = _staged(model.features, lambda key, _: key in {"1", "2", "4", "6"})
            return {**body, "pool": pool[:1], **_rest(model)}
        case models.MaxVit():
            units = [("stem", model.stem), *model.blocks.named_children()]
            return {**_staged(units, lambda key, _: key != "stem"), **_rest(model)}
    raise ConfigError(f"torchvision's {name} is of a family that is not known here: {type(model).__name__}")


def _named(units: Iterable[Unit], *, first: str) -> dict[str, list[Unit]]:
    """Make a stage of each unit, under its own name, and ``stem`` of those before ``first``."""
    stages: dict[str, list[Unit]] = {"stem": []}
    for unit in units:
        if unit[0] == first or len(stages) > 1:
            stages[unit[0]] = [unit]
        else:
            stages["stem"].append(unit)
    return stages


def _staged(units: nn.Module | Iterable[Unit], begins: Callable[[str, nn.Module], bool]) -> dict[str, list[Unit]]:
    """Make ``stem`` and ``stage1``, ``stage2`` ... of units, a stage beginning at each that says so."""
    stages: dict[str, list[Unit]] = {"stem": []}
    for key, unit in units.named_children() if isinstance(units, nn.Module) else units:
        if begins(key, unit):
            stages[f"stage{len(stages)}"] = []
        stages[next(reversed(stages))].append((key, unit))
    return stages


def _until(model: nn.Module, name: str) -> Iterable[Unit]:
    """Yield a model's children before the one of that name."""
    for unit in model.named_children():
        if unit[0] == name:
            return
        yield unit


def _rest(model: nn.Module) -> dict[str, list[Unit]]:
    """Return what stands in a model's own head before its last layer, as a stage where there is anything."""
    container, _, final = _classifier(model)[0].rpartition(".")
    units = list(_until(model.get_submodule(container), final))
    while units and isinstance(units[-1][1], nn.Dropout):
        units.pop()
    return {"classifier": units} if units else {}


def _halves(unit: nn.Module) -> bool:
    """Tell whether a block lowers the resolution."""
    return any(isinstance(m, nn.Conv2d) and m.stride != (1, 1) for m in unit.modules())


class PatchEmbedding(nn.Module):
    """The first part of a vision transformer: pictures (B, C, S, S) to a class token and patches (B, 1 + N, D).

    Args:
        model: Torchvision's; its layers and parameters are taken over.
    """

    def __init__(self, model: models.VisionTransformer) -> None:
        super().__init__()
        self.conv_proj = model.conv_proj
        self.class_token = model.class_token
        self.pos_embedding = model.encoder.pos_embedding
        self.dropout = model.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        """Return float (B, 1 + N, D), positions added."""
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        # Not len(patches), which would fix the number in an exported graph.
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], 1)
        return self.dropout(tokens + self.pos_embedding)  # type: ignore[no-any-return]


class ClassToken(nn.Module):
    """The first token: (B, T, D) to (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return float (B, D)."""
        return tokens[:, 0]


class AllTokens(nn.Module):
    """All tokens and a mask that leaves none out: (B, T, D) to that and (B, T)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return float (B, T, D) and bool (B, T)."""
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class MapTokens(AllTokens):
    """The places of a map as tokens, row by row: (B, H, W, D) to (B, H W, D) and a mask."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return float (B, H W, D) and bool (B, H W)."""
        return super().forward(tokens.flatten(1, 2))
