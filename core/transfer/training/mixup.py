"""Mixup and cutmix: batches of blends of two examples, for any task whose loss is per example."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.config.train_settings import MixupCutmix
from transfer.errors import ConfigError


@dataclass(frozen=True)
class MixedBatch:
    """Which examples a batch was blended from.

    Args:
        inputs: The blended inputs.
        permutation: int64 (B,), the second example of each blend.
        lam: How much of each blend is the first example.
    """

    inputs: Tensor
    permutation: Tensor
    lam: float

    def loss(self, own: Tensor, permutation: Tensor) -> Tensor:
        """Return the losses (B,) mixed by ``lam``."""
        return self.lam * own + (1 - self.lam) * permutation


def check_mixable(inputs: object, mix: MixupCutmix) -> Tensor:
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


def mix_batch(inputs: object, mix: MixupCutmix) -> MixedBatch:
    """Mix a batch with a permutation of itself; random by torch's global generator.

    Mixup (Zhang et al. 2018) averages with a lam drawn from Beta(a, a). Cutmix (Yun et al. 2019) pastes a rectangle
    that covers one minus that lam of the picture; the lam is then corrected to the pixels really kept.

    Args:
        inputs: float (B, ...); float (B, C, H, W) for cutmix.
        mix: Parameters.

    Raises:
        ConfigError: As :func:`check_mixable`.
    """
    inputs = check_mixable(inputs, mix)
    use_cutmix = mix.cutmix is not None and (mix.mixup is None or bool(torch.rand(()) < 0.5))
    concentration = torch.tensor(mix.cutmix if use_cutmix else mix.mixup)
    lam = float(torch.distributions.Beta(concentration, concentration).sample())
    permutation = torch.randperm(len(inputs)).to(inputs.device)
    if not use_cutmix:
        return MixedBatch(torch.lerp(inputs[permutation], inputs, lam), permutation, lam)
    height, width = inputs.shape[2:]
    cut_height, cut_width = (round(side * math.sqrt(1 - lam)) for side in (height, width))
    top, left = (int(torch.randint(side, ())) - cut // 2 for side, cut in ((height, cut_height), (width, cut_width)))
    rows = slice(max(0, top), max(0, min(height, top + cut_height)))
    columns = slice(max(0, left), max(0, min(width, left + cut_width)))
    blended = inputs.clone()
    blended[:, :, rows, columns] = inputs[permutation][:, :, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return MixedBatch(blended, permutation, 1 - pasted / (height * width))
