"""Random augmentation of images: torchvision's transforms by name and options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor
from torchvision.transforms import v2

from transfer import ConfigError
from transfer_vision.suggestions import unknown_name

Augmentation = (
    Annotated[
        Literal["default", "strong", "none"],
        BeforeValidator(lambda value: "default" if value == "usual" else value),  # its name until version 0.1
    ]
    | list[dict[str, Any]]
)


def current_name(augmentation: Augmentation | str) -> Any:
    """Return the augmentation under its current name; until version 0.1 the default was called ``usual``."""
    return "default" if augmentation == "usual" else augmentation


def augmentation_transform(
    augmentation: Augmentation, image_size: int, resize: int, channels: int
) -> v2.Compose | None:
    """Return the transform of an augmentation; None if it changes nothing.

    Args:
        augmentation: Name, or a list of torchvision.transforms.v2 classes with options.
        image_size: Height and width of the model's input.
        resize: Pixels of the resized side before the crop.
        channels: Number of channels.

    Raises:
        transfer.ConfigError: A class or option does not exist, or the transform fails on an image.
    """
    if augmentation == "none" or augmentation == []:
        return None
    # The caller may be building on the meta device, and some transforms contain a tensor.
    with torch.device("cpu"):
        default = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        if augmentation == "default":
            return v2.Compose(default)
        if augmentation == "strong":
            transform = v2.Compose([*default, v2.TrivialAugmentWide(), v2.RandomErasing(0.1)])
        else:
            transform = v2.Compose([_named_transform(step) for step in augmentation])
        _try(transform, resize, channels)
    return transform


def _names() -> list[str]:
    classes = {key for key, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)}
    return sorted(classes - {"Transform"})


def _named_transform(step: Mapping[str, Any]) -> v2.Transform:
    options = dict(step)
    name = options.pop("name", None)
    names = _names()
    # Only transforms of this module: any other class would be code that a config can call.
    if name not in names:
        message = f"torchvision.transforms.v2 has no augmentation {name!r}"
        message = "an augmentation needs a name" if name is None else message
        raise unknown_name(message, str(name), names, "write {name: CLASS, OPTION: VALUE}")
    cls: type[v2.Transform] = getattr(v2, name)
    available = [key for key in inspect.signature(cls).parameters if key not in ("args", "kwargs")]
    for key in options:
        if key not in available:
            raise unknown_name(f"augmentation {name} has no option {key!r}", key, available, "remove it")
    # These contain other transforms, which are written in the same form.
    if "transforms" in available:  # RandomApply, RandomChoice, RandomOrder, Compose
        inner = options.get("transforms")
        if not isinstance(inner, list) or not all(isinstance(one, Mapping) for one in inner):
            raise ConfigError(f"augmentation {name} needs transforms", fix="write transforms: [{name: CLASS, ...}]")
        options["transforms"] = [_named_transform(one) for one in inner]
    try:
        return cls(**_with_enums(cls, options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"augmentation {name} does not take {options}: {error}", available=available) from error


def _with_enums(cls: type[v2.Transform], options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert ``bilinear`` or ``imagenet`` to the member of torchvision's enumeration that the option expects."""
    hints = typing.get_type_hints(cls.__init__)
    converted = dict(options)
    for key, value in options.items():
        for hint in (hints.get(key), *typing.get_args(hints.get(key))):
            if isinstance(value, str) and isinstance(hint, type) and issubclass(hint, Enum):
                converted[key] = hint(value)
    return converted


def _try(transform: v2.Transform, resize: int, channels: int) -> None:
    """Apply an augmentation once, so that one that cannot work is refused before any image is read."""
    with torch.random.fork_rng(devices=[]):  # keep the random state of the caller
        image = torch.zeros(channels, resize, resize, dtype=torch.uint8)
        try:
            result = transform(image)
        # Any exception on a plain image would also occur on the user's images.
        except Exception as error:
            raise ConfigError(
                f"the augmentation fails on an image of {resize} x {resize} pixels and {channels} channels: {error}",
                fix="augmentations take and return one image of 8-bit values; check their order and sizes",
            ) from error
    if not isinstance(result, Tensor) or result.ndim != 3 or result.shape[0] != channels:
        shape = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ConfigError(
            f"wrong result of the augmentation: expected an image of {channels} channels, got {shape}",
            fix="remove the step that changes the number of channels",
        )
