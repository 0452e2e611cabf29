"""Mixup and cutmix: batches of blends of two examples, for any task whose loss is per example."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.config.train_settings import Mix
from transfer.errors import ConfigError


@dataclass(frozen=True)
class Blend:
    """Which examples a batch was blended from.

    Args:
        inputs: The blended inputs.
        partners: int64 (B,), the second example of each blend.
        share: How much of each blend is the first example.
    """

    inputs: Tensor
    partners: Tensor
    share: float

    def loss(self, own: Tensor, partners: Tensor) -> Tensor:
        """Blend the losses (B,) against the own and the partners' targets alike."""
        return self.share * own + (1 - self.share) * partners


def check_blendable(inputs: object, mix: Mix) -> Tensor:
    """Return the backbone's input if its examples can be blended, also on the meta device.

    Raises:
        ConfigError: It is no float tensor, or holds no pictures (B, C, H, W) for cutmix.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        message = "train.mix blends the backbone's input, which is no tensor of numbers"
        raise ConfigError(message, fix="remove train.mix")
    if mix.cutmix is not None and inputs.dim() != 4:
        raise ConfigError("cutmix pastes rectangles of pictures (B, C, H, W)", fix="use mixup")
    return inputs


def blend(inputs: object, mix: Mix) -> Blend:
    """Blend a batch with a permutation of itself; random by torch's global generator.

    Mixup (Zhang et al. 2018) averages with a share drawn from Beta(a, a). Cutmix (Yun et al. 2019) pastes a rectangle
    that covers one minus that share of the picture; the share is then corrected to the pixels really kept.

    Args:
        inputs: float (B, ...); float (B, C, H, W) for cutmix.
        mix: Parameters.

    Raises:
        ConfigError: As :func:`check_blendable`.
    """
    inputs = check_blendable(inputs, mix)
    use_cutmix = mix.cutmix is not None and (mix.mixup is None or bool(torch.rand(()) < 0.5))
    concentration = torch.tensor(mix.cutmix if use_cutmix else mix.mixup)
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    partners = torch.randperm(len(inputs)).to(inputs.device)
    if not use_cutmix:
        return Blend(torch.lerp(inputs[partners], inputs, share), partners, share)
    height, width = inputs.shape[2:]
    cut_height, cut_width = (round(side * math.sqrt(1 - share)) for side in (height, width))
    top, left = (int(torch.randint(side, ())) - cut // 2 for side, cut in ((height, cut_height), (width, cut_width)))
    rows = slice(max(0, top), max(0, min(height, top + cut_height)))
    columns = slice(max(0, left), max(0, min(width, left + cut_width)))
    blended = inputs.clone()
    blended[:, :, rows, columns] = inputs[partners][:, :, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Blend(blended, partners, 1 - pasted / (height * width))
